"""Metrics of a run: ``metrics.jsonl`` (deterministic values), ``timing.jsonl`` (wall clock) and TensorBoard.

One JSON object a line with ``step`` and ``stage``; numbers in full (Python's shortest exact form), so that an
interrupted and resumed run writes the very bytes of an unbroken one. A number that is not finite is written as ``null``;
what follows from it is `loop.bad_steps`.
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
    """Plain numbers, sorted by name, with one transfer from the devices, none when everything is on the host.

    A Mean becomes total / weight in float64; None when its weight is 0 (nothing counted, which is no error); None stays.
    NaN and infinities come back as they are.
    """
    values: dict[str, Any] = dict(metrics)
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values)):
        values = jax.device_get(values)
    found: dict[str, float | None] = {}
    for name in sorted(values):
        value = values[name]
        if not isinstance(value, Mean):
            found[name] = None if value is None else float(value)
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

    A last line torn by a kill goes as well. Another line that is damaged or doubled goes too, with a warning.
    """
    lines: MetricLines = read_lines(path)
    if not lines.rows and not lines.problems:
        return
    for problem in lines.problems:
        if not problem.endswith("the last line is torn; it does not count"):
            print(f"warning: {problem}", file=sys.stderr)
    kept = [json.dumps(row, allow_nan=False) + "\n" for row in lines.rows if row["step"] <= step]
    write_atomically(path, "".join(kept))


class Events:
    """A TensorBoard event file, written in the calling thread: tensorboardX's own thread dies on a full disk, unheard."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        """purge_step: what earlier files hold of this step and later ones is hidden."""
        from tensorboardX.event_file_writer import EventsWriter  # a slow import that programs without it need not pay
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
        """Write what is left and close the file."""
        self._writer.close()


class Tracker:
    """The open metric files of one run directory. Only the first process of a multi-host run writes."""

    def __init__(self, run_dir: Path, stage: str, *, resumed_step: int, tensorboard: bool) -> None:
        """resumed_step: what is logged after it is removed first (0: everything)."""
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
            cut(file, step or -1)  # a fresh start writes step 0 (evaluations) again too
            self._files[name] = file.open("a")
        if step:
            for problem in read_metrics(self._run_dir, step)[0].problems:
                print(f"warning: {problem}", file=sys.stderr)
        if self._tensorboard:
            self._board = Events(self._run_dir / "tensorboard", step + 1 if step else 0)

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
        """Close every file, also when one of them cannot be written to its end: then the first error is raised."""
        files, board = self._files, self._board
        self._files, self._board = {}, None
        with contextlib.ExitStack() as closing:
            for file in files.values():
                closing.callback(file.close)
            if board is not None:
                closing.callback(board.close)
