"""A stage of a pipeline that counts instead of training. A program, not a test: test_experiment_pipeline.py starts it.

    python -S fake_stage.py PIPELINE/RUN_DIR [INPUT]

It counts to four, one line of metrics.jsonl a step, and records what it read and wrote as every experiment does. A stage
with an input asks its parent to stop after step 2 while there is a file PIPELINE.stop: it saves and leaves when the
signal reaches itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

STEPS = 4


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def record(run_dir: Path, inputs: list[Path], resumed: int, **more: object) -> None:
    """Write provenance.json; a resumed start is added to those before it."""
    file = run_dir / "provenance.json"
    before = json.loads(file.read_text())["launches"] if resumed else []
    start = {"git": {"commit": None, "dirty": None}, "working_directory": os.getcwd(), "resumed_step": resumed}
    content = {
        "stage": "fake",
        "seed": 0,
        "inputs": [{"name": path.parent.name, "path": str(path), "fingerprint": sha256(path)} for path in inputs],
        "launches": [*before, start],
    }
    file.write_text(json.dumps(content | more))


def stop(step: int) -> None:
    """Leave as an experiment does that gets SIGTERM; the parent passes it on."""
    signal.alarm(60)  # a parent that does not is a failure, not a hang
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigwait({signal.SIGTERM})
    print(f"stopped at step {step}; the same command goes on from here", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def main(run_dir: Path, *inputs: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    metrics = run_dir / "metrics.jsonl"
    resumed = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    record(run_dir, list(inputs), resumed)
    for step in range(resumed + 1, STEPS + 1):
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "count": step * len(inputs)}) + "\n")
        if step == 2 and inputs and run_dir.parent.with_suffix(".stop").exists():
            stop(step)
    (run_dir / "model.txt").write_text(f"counted to {STEPS}")
    launches = json.loads((run_dir / "provenance.json").read_text())["launches"]
    record(run_dir, list(inputs), 0, launches=launches, outputs={metrics.name: sha256(metrics)})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
