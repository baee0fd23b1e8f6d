"""Experiments as the processes they are, on one pretended device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compiler_flags import COMPILER
from forked_programs import Forked

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("base", "sft", "completions", "reward", "ppo", "evaluation")


def environment(*, seconds_a_step: float = 0.0) -> dict[str, str]:
    """Return the environment of an experiment. seconds_a_step: > 0 gives a test time to stop the run between two steps."""
    slow = {"PYTHONPATH": f"{Path(__file__).parent / 'slow'}:{ROOT}", "SECONDS_A_STEP": str(seconds_a_step)}
    return {**os.environ, "XLA_FLAGS": COMPILER, **(slow if seconds_a_step else {})}


def command(experiment: str, config: str | Path, **macros: Any) -> list[str]:
    flags = [f"--gin_bindings={name} = {(str(v) if isinstance(v, Path) else v)!r}" for name, v in macros.items()]
    return [sys.executable, str(ROOT / "experiments" / f"{experiment}.py"), f"--gin_file={config}", *flags]


def forked(children: str, experiment: str, config: str | Path, **macros: Any) -> list[str]:
    """Return the command of a pipeline whose ``children`` are forked (tests/forked_children.py)."""
    return [str(ROOT / "tests" / "forked_children.py"), children, *command(experiment, config, **macros)[1:]]


def start(arguments: list[str], *, seconds_a_step: float = 0.0) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    settings = environment(seconds_a_step=seconds_a_step)
    return subprocess.Popen(arguments, cwd=ROOT, env=settings, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Return (stdout, stderr) of a process that must end with ``code``. The limit is for a hanging one: machines differ."""
    try:
        out, err = process.communicate(timeout=1200)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str] | Forked) -> None:
    """Wait until metrics.jsonl holds ``step``."""
    deadline = time.monotonic() + 1200
    file = run_dir / "metrics.jsonl"
    while not file.is_file() or not any(f'"step": {step},' in line for line in file.read_text().splitlines()):
        assert process.poll() is None, process
        assert time.monotonic() < deadline
        time.sleep(0.02)
