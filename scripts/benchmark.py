"""Time training steps and rollouts of the SmolLM2-135M shape on this machine, beside torch and TRL when they are given.

    python scripts/benchmark.py --suite=cpu
    python scripts/benchmark.py --rows=sft,generate --torch_python=PATH/bin/python --repeats=5

Each row (`benchmark_rows.ROWS`) runs in a process of its own for every side, one after the other; a ratio is that of their
medians. Prints a table: throughput in useful tokens (pairs,
iterations) a second (median and spread of the repetitions), share of the measured peak of a matrix product, CPU seconds
and peak memory of the process. Weights are random: no number here depends on them. torch's side needs torch and
transformers in its own interpreter, TRL's also trl; docs/performance.md says how they were installed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from benchmark_rows import PEERS, ROWS, SHAPES, Row

from rlhf_jax.errors import InputError
from rlhf_jax.launch.command import run_command

FOLDER = Path(__file__).resolve().parent
NAMES = [row.name for row in ROWS]
HEAD = ["row", "side", "median", "spread", "of peak", "CPU s", "memory", "ours is"]
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
"""Freed memory stays with the process and in huge pages: a fresh buffer costs its page faults, a used one nothing."""


class Side:
    """A process that has one row ready and runs it once for every line it is sent."""

    def __init__(self, python: str, script: str, row: str, shape: str, environment: dict[str, str]) -> None:
        self._name = f"{script} {row}"
        self._process = subprocess.Popen(
            [python, str(FOLDER / script), row, shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        """Return the next line of JSON; trainers print other lines too."""
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith('{"')), None)
        if line is None:
            raise InputError(f"{self._name}: ended with code {self._process.wait()} (its own message is above)")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def runs(self, repeats: int) -> list[dict[str, Any]]:
        """Return of every repetition: seconds, cpu_seconds, amount (in units of the row), flops, peak_bytes. Ends the process."""
        assert self._process.stdin is not None
        actual = []
        for _ in range(repeats):
            print("go", file=self._process.stdin, flush=True)
            actual.append(self._answer())
        self._process.stdin.close()
        self._process.wait()
        return actual


def measure(row: Row, shape: str, pythons: dict[str, str], repeats: int, tuned: bool) -> Iterator[list[str]]:
    """Return the lines of a row in the table: ours, then those of peers with an interpreter.

    Processes run one at a time: memory that is idle for some seconds becomes slow, and two sides may not fit.
    """
    actual = Side(sys.executable, "benchmark_jax.py", row.name, shape, {"GLIBC_TUNABLES": MALLOC} if tuned else {})
    facts, beside = actual.facts, actual.runs(repeats)
    yield line(row, facts["version"], beside, None, facts["peak_flops"])
    for peer in row.peers:
        if peer in pythons:
            side = Side(pythons[peer], PEERS[peer], row.name, shape, {})
            yield line(row, side.facts["version"], side.runs(repeats), beside, facts["peak_flops"])


def line(
    row: Row, name: str, runs: list[dict[str, Any]], actual: list[dict[str, Any]] | None, peak: float
) -> list[str]:
    """Return the line of one side, under `HEAD`. ours: None for our own line."""
    speed = speeds(runs)
    return [
        row.name,
        name,
        f"{statistics.median(speed):.3g} {row.unit}/s",
        f"{min(speed):.3g} to {max(speed):.3g}",
        f"{statistics.median(run['flops'] / run['seconds'] for run in runs) / peak:.2f}",
        f"{statistics.median(run['cpu_seconds'] for run in runs):.1f}",
        f"{max(run['peak_bytes'] for run in runs) / 1e9:.1f} GB",
        "" if actual is None else f"{statistics.median(speeds(actual)) / statistics.median(speed):.2f}x",
    ]


def speeds(runs: list[dict[str, Any]]) -> list[float]:
    """Return the units of the row per second, of every repetition."""
    return [run["amount"] / run["seconds"] for run in runs]


def benchmark() -> int:
    """Run the rows and print the table. Raises InputError for unknown rows and processes that fail."""
    settings = flags.FLAGS
    rows = [row for row in ROWS if not settings.rows or row.name in settings.rows]
    for name in settings.rows:
        if name not in NAMES:
            raise InputError(f"--rows: {name!r} is none of {', '.join(NAMES)}")
    if settings.repeats < 1:
        raise InputError(f"--repeats = {settings.repeats}: give a number >= 1")
    pythons = {"torch": settings.torch_python, "trl": settings.trl_python, "trl_ppo": settings.trl_ppo_python}
    pythons = {peer: python for peer, python in pythons.items() if python is not None}
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}; {versions}")
    print(f"malloc (ours): {MALLOC if settings.malloc else 'as it is'}")
    print(" | ".join(HEAD))
    for row in rows:
        for cells in measure(row, settings.shape, pythons, settings.repeats, settings.malloc):
            print(" | ".join(cells), flush=True)
        print(f"    {row.meaning}; load average {os.getloadavg()[0]:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("suite", "cpu", ["cpu"], "Which shapes: those that a CPU measures in minutes.")
    flags.DEFINE_list("rows", [], f"Of {', '.join(NAMES)}; all when empty.")
    flags.DEFINE_enum("shape", "smollm2", list(SHAPES), "Of the model; tiny only tries the script out.")
    flags.DEFINE_integer("repeats", 3, "Timed repetitions of each side.")
    flags.DEFINE_string("torch_python", None, "A Python with torch and transformers to run beside ours.")
    flags.DEFINE_string("trl_python", None, "A Python with trl as well.")
    flags.DEFINE_string("trl_ppo_python", None, "A Python with a trl that still has PPO (0.19.1).")
    flags.DEFINE_bool("malloc", True, "Run ours with the malloc settings printed above the table.")
    names = ("suite", "rows", "shape", "repeats", "torch_python", "trl_python", "trl_ppo_python", "malloc")
    sys.exit(run_command(benchmark, sys.argv, __doc__ or "", names))
