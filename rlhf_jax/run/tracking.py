"""Metrics of a run: ``metrics.jsonl`` (deterministic values), ``timing.jsonl`` (wall clock) and TensorBoard.

One JSON object a line with ``step`` and ``stage``; numbers in full (Python's shortest exact form), so that an
interrupted and resumed run writes the very bytes of an unbroken one. A number that is not finite is written as ``null``;
what follows from it is `run.bad_steps`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.run.provenance import write_atomically
from rlhf_jax.types import Mean

Metrics = Mapping[str, Any]
"""{name: Mean | scalar array | float}."""


def fetch(metrics: Metrics) -> dict[str, float | None]:
    """Plain numbers, sorted by name, with ONE transfer from the devices.

    A Mean becomes total / weight in float64; None when its weight is 0 (nothing counted, which is no error).
    NaN and infinities come back as they are.
    """
    values: dict[str, Any] = jax.device_get(dict(metrics))
    found: dict[str, float | None] = {}
    for name in sorted(values):
        value = values[name]
        if not isinstance(value, Mean):
            found[name] = float(value)
        elif float(value.weight) == 0.0:
            found[name] = None if float(value.total) == 0.0 else math.nan
        else:
            found[name] = float(value.total) / float(value.weight)
    return found


def not_finite(values: Mapping[str, float | None]) -> list[str]:
    """The names of the values that are NaN or infinite."""
    return [name for name, value in values.items() if value is not None and not math.isfinite(value)]


def cut(path: Path, step: int) -> None:
    """Keep the lines of a .jsonl file whose step is <= ``step``: the later ones will be written again.

    A last line torn by a kill goes as well.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


class Tracker:
    """The open metric files of one run directory. Only the first process of a multi-host run writes."""

    def __init__(self, run_dir: Path, stage: str, *, resumed_step: int, tensorboard: bool) -> None:
        """resumed_step: what is logged after it is removed first (0: everything)."""
        self.stage = stage
        self._run_dir, self._tensorboard = run_dir, tensorboard
        self._files: dict[str, Any] = {}
        self._board: Any = None
        self._open(resumed_step)

    def _open(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        for name in ("metrics", "timing"):
            file = self._run_dir / f"{name}.jsonl"
            cut(file, step or -1)  # a fresh start writes step 0 (evaluations) again too
            self._files[name] = file.open("a")
        if self._tensorboard:
            from tensorboardX import SummaryWriter  # a slow import that programs without it need not pay

            self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=step + 1 if step else 0)

    def rewind(self, step: int) -> None:
        """Forget every line after ``step``: these steps will be done again."""
        self.close()
        self._open(step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append one line to metrics.jsonl, and to TensorBoard what is a finite number."""
        bad = set(not_finite(values))
        self._append("metrics", step, {name: None if name in bad else value for name, value in values.items()})
        if self._board is not None:
            for name, value in values.items():
                if value is not None and name not in bad:
                    self._board.add_scalar(f"{self.stage}/{name}", value, step)

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to timing.jsonl. Units are part of the names: ``seconds``, ``tokens_per_second``."""
        self._append("timing", step, values)

    def _append(self, name: str, step: int, values: Mapping[str, float | None]) -> None:
        if name in self._files:
            line = json.dumps({"step": step, "stage": self.stage, **values}, allow_nan=False)
            self._files[name].write(line + "\n")
            self._files[name].flush()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
