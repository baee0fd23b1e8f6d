"""Time training steps and rollouts of the SmolLM2-135M shape on this machine, beside a bare torch loop when one is given.

    python scripts/benchmark.py --suite=cpu
    python scripts/benchmark.py --rows=sft,generate --torch_python=/path/to/venv/bin/python --repeats=5

Each row runs in a process of its own, ours and torch's in turn, so that both see the same machine; the ratio is the median
of the ratios of neighbouring runs. Prints a table: throughput in useful tokens (pairs, iterations) a second (median and
spread of the repetitions), share of the measured matmul peak, CPU seconds and peak memory of the process. Weights are
random: no number here depends on them. The torch side needs torch and transformers in its own interpreter.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from rlhf_jax.command import run_command
from rlhf_jax.types import InputError

HERE = Path(__file__).resolve().parent
UNITS = {
    "sft": "tokens/s",
    "sft_ragged": "useful tokens/s",
    "generate": "new tokens/s",
    "generate_ragged": "useful tokens/s",
    "rm": "pairs/s",
    "ppo": "iterations/s",
}
MEANING = {
    "sft": "SFT step, 8 x 256",
    "sft_ragged": "SFT step, documents of 32..256 tokens: ours packed into rows of 256, torch padded, 16 at a time",
    "generate": "16 prompts x 64, 128 new tokens each",
    "generate_ragged": "64 prompts x 64, replies of 8..128 (each token ends one with probability 1/60), 16 at a time",
    "rm": "reward model step, 8 pairs x 256",
    "ppo": "PPO iteration, 16 x (64 + 64), four 135M models, 4 epochs",
}
ON_TORCH = ("sft", "sft_ragged", "generate", "generate_ragged", "rm")
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
"""Freed memory stays with the process and in huge pages: a fresh buffer costs its page faults, a used one nothing."""


class Side:
    """A process that has one row ready and runs it once for every line it is sent."""

    def __init__(self, python: str, script: str, row: str, shape: str, environment: dict[str, str]) -> None:
        command = [python, str(HERE / script), row, shape]
        self._name = f"{script} {row}"
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError(f"{self._name}: ended with code {self._process.wait()} (its own message is above)")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def once(self) -> dict[str, Any]:
        """One repetition: seconds, cpu_seconds, amount (of the row's unit), flops, peak_bytes."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(row: str, shape: str, torch_python: str | None, repeats: int, tuned: bool) -> list[list[str]]:
    """The table's lines of a row, ours and torch's."""
    ours = Side(sys.executable, "benchmark_jax.py", row, shape, {"GLIBC_TUNABLES": MALLOC} if tuned else {})
    sides = {f"ours (jax {ours.facts['version']})": ours}
    if torch_python is not None and row in ON_TORCH:
        theirs = Side(torch_python, "benchmark_torch.py", row, shape, {})
        sides[f"torch {theirs.facts['version']}"] = theirs
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(side.once())
    for side in sides.values():
        side.close()
    speeds = {name: [run["amount"] / run["seconds"] for run in found] for name, found in runs.items()}
    first, lines = next(iter(speeds)), []
    for name, found in runs.items():
        speed = speeds[name]
        use = statistics.median(run["flops"] / run["seconds"] for run in found) / ours.facts["peak_flops"]
        ratio = statistics.median(a / b for a, b in zip(speeds[first], speed, strict=True))
        lines.append(
            [
                row,
                name,
                f"{statistics.median(speed):.3g} {UNITS[row]}",
                f"{min(speed):.3g} to {max(speed):.3g}",
                f"{use:.2f}",
                f"{statistics.median(run['cpu_seconds'] for run in found):.1f}",
                f"{max(run['peak_bytes'] for run in found) / 1e9:.1f} GB",
                "" if name == first else f"ours is {ratio:.2f}x",
            ]
        )
    return lines


def benchmark() -> int:
    """Raises InputError for unknown rows and processes that fail."""
    given = flags.FLAGS
    rows = list(UNITS) if not given.rows else given.rows
    for row in rows:
        if row not in UNITS:
            raise InputError(f"--rows: {row!r} is none of {', '.join(UNITS)}")
    if given.repeats < 1:
        raise InputError(f"--repeats = {given.repeats}: give a number >= 1")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}; {versions}")
    print(
        f"malloc: {MALLOC if given.malloc else 'as it is'} (ours); load average {os.getloadavg()[0]:.2f} at the start"
    )
    head = ["row", "side", "median", "spread", "of peak", "CPU s", "memory", "ratio"]
    print("\t".join(head))
    for row in rows:
        for line in measure(row, given.shape, given.torch_python, given.repeats, given.malloc):
            print("\t".join(line), flush=True)
        print(f"\t{MEANING[row]}; load average {os.getloadavg()[0]:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("suite", "cpu", ["cpu"], "Which shapes: those that a CPU measures in minutes.")
    flags.DEFINE_list("rows", [], f"Of {', '.join(UNITS)}; all when empty.")
    flags.DEFINE_enum("shape", "smollm2", ["smollm2", "tiny"], "Of the model; tiny only tries the script out.")
    flags.DEFINE_integer("repeats", 3, "Timed repetitions of each side.")
    flags.DEFINE_string("torch_python", None, "A Python with torch and transformers to run beside ours.")
    flags.DEFINE_bool("malloc", True, "Run ours with the malloc settings printed above the table.")
    names = ("suite", "rows", "shape", "repeats", "torch_python", "malloc")
    sys.exit(run_command(benchmark, sys.argv, __doc__ or "", names))
