"""Metrics of a run: ``metrics.jsonl`` (deterministic values), ``timing.jsonl`` (wall clock) and TensorBoard.

One JSON object a line with ``step`` and ``stage``; numbers in Python's shortest exact form, so that an
interrupted and resumed run writes the same bytes as an uninterrupted one. A number that is not finite is written as
``null``; `loop.bad_steps` defines what the run does then.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.storage.files import write_atomically
from rlhf_jax.storage.metric_files import MetricLines, read_lines, read_metrics
from rlhf_jax.storage.names import METRICS, TIMING
from rlhf_jax.types import Mean

Metrics = Mapping[str, Any]
"""{name: Mean | scalar array | float}."""


def fetch(metrics: Metrics) -> dict[str, float | None]:
    """Return the metrics as Python numbers, sorted by name, with at most one transfer from the devices.

    A Mean becomes total / weight in float64, or None when its weight is 0 (nothing was counted, which is no error).
    None, NaN and infinities are returned unchanged.
    """
    values: dict[str, Any] = dict(metrics)
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values)):
        values = jax.device_get(values)
    numbers: dict[str, float | None] = {}
    for name in sorted(values):
        value = values[name]
        if not isinstance(value, Mean):
            numbers[name] = None if value is None else float(value)
        elif float(value.weight) == 0.0:
            numbers[name] = None if float(value.total) == 0.0 else math.nan
        else:
            numbers[name] = float(value.total) / float(value.weight)
    return numbers


def nonfinite_names(values: Mapping[str, float | None]) -> list[str]:
    """Return the names of the values that are NaN or infinite."""
    return [name for name, value in values.items() if value is not None and not math.isfinite(value)]


def remove_later_lines(path: Path, step: int) -> None:
    """Remove the lines of a .jsonl file whose step is larger than ``step``: those steps will be run again.

    An incomplete last line (of a killed process) is removed as well. Another line that is damaged or doubled is removed
    with a warning.
    """
    lines: MetricLines = read_lines(path)
    if not lines.rows and not lines.problems:
        return
    for problem in lines.problems:
        if not problem.endswith("the last line is torn; it does not count"):
            print(f"warning: {problem}", file=sys.stderr)
    kept_lines = [json.dumps(row, allow_nan=False) + "\n" for row in lines.rows if row["step"] <= step]
    write_atomically(path, "".join(kept_lines))


class Events:
    """A TensorBoard event file, written in the calling thread: tensorboardX's own thread ends silently on a full disk."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        """Open a new event file. purge_step: TensorBoard hides this step and later ones of earlier files."""
        from tensorboardX.event_file_writer import EventsWriter  # imported here: it is slow
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        session = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=purge_step, session_log=session, wall_time=time.time()))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Append one number."""
        event = self._event(summary=self._scalar(name, value), step=step, wall_time=time.time())
        self._writer.write_event(event)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class Tracker:
    """The open metric files of one run directory. Only the first process of a multi-host run writes."""

    def __init__(self, run_dir: Path, stage: str, *, resumed_step: int, tensorboard: bool) -> None:
        """Open the metric files. resumed_step: lines of later steps are removed first (0: all lines)."""
        self.stage = stage
        self._run_dir, self._tensorboard = run_dir, tensorboard
        self._files: dict[str, Any] = {}
        self._board: Events | None = None
        self._open(resumed_step)

    def _open(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        for name, place in (("metrics", METRICS), ("timing", TIMING)):
            file = self._run_dir / place
            remove_later_lines(file, step or -1)  # a fresh start writes step 0 (evaluations) again too
            self._files[name] = file.open("a")
        if step:
            for problem in read_metrics(self._run_dir, step)[0].problems:
                print(f"warning: {problem}", file=sys.stderr)
        if self._tensorboard:
            self._board = Events(self._run_dir / "tensorboard", step + 1 if step else 0)

    def rewind(self, step: int) -> None:
        """Remove every line after ``step``: those steps will be run again."""
        self.close()
        self._open(step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append one line to metrics.jsonl, and the finite numbers to TensorBoard."""
        bad = set(nonfinite_names(values))
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
        """Close every file, also when one of them cannot be flushed. Raises the first error."""
        files, board = self._files, self._board
        self._files, self._board = {}, None
        with contextlib.ExitStack() as closing:
            for file in files.values():
                closing.callback(file.close)
            if board is not None:
                closing.callback(board.close)
