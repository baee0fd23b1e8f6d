"""What a run shows while it works: a bar on a terminal, plain lines (one every ten seconds at most) everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_jax.messages import Messages, behind

SUPERVISED = ("loss", "accuracy")
ROLLOUTS = ("score", "kl", "response_length")
"""Metrics that the line shows: of a run with rollouts the latter. Held-out figures, and two of a monitor, come after them."""
HELDOUT, MONITOR = "heldout/", "monitor/"


def headline(values: Mapping[str, float | None]) -> str:
    """'loss 0.6931  accuracy 0.5  heldout/loss 0.7' of all the metrics."""
    names = list(ROLLOUTS if "score" in values else SUPERVISED)
    names += [name for name in (f"{HELDOUT}loss", f"{HELDOUT}accuracy") if name in values]
    names += sorted(name for name in values if name.startswith(MONITOR))[:2]
    shown = {name: values.get(name) for name in names}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)


def line(stage: str, step: int, total: int, values: Mapping[str, float | None], seconds: float, done: int) -> str:
    """One plain line. seconds: since this process began its first step; done: steps it has finished."""
    left = seconds / done * (total - step) if done else 0.0
    return f"{stage} {step}/{total}  {headline(values)}  {seconds:.0f} s, {left:.0f} s left"


class Display:
    """Progress of one loop, on stderr."""

    def __init__(self, stage: str, start: int, total: int, shown: bool) -> None:
        self.stage, self.start, self.total, self.shown = stage, start, total, shown
        self._began = time.monotonic()
        self._last = float("-inf")
        self._heldout: dict[str, float | None] = {}
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if shown and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
            )
            console = Console(file=behind(sys.stderr))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(stage, total=total, completed=start, shown="")
            self._bar.start()
            sys.stderr = cast(TextIO, Messages(sys.stderr))  # rich puts a stream of its own there, until the bar stops

    def keep_heldout(self, values: Mapping[str, float | None]) -> None:
        """Show the held-out figures among ``values`` until there are newer ones: they are measured every few steps."""
        self._heldout |= {name: value for name, value in values.items() if name.startswith(HELDOUT)}

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show that ``step`` is done, with its metrics."""
        now, values = time.monotonic(), {**self._heldout, **values}
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=headline(values))
        elif self.shown and (now - self._last >= 10.0 or step == self.total):
            self._last = now
            text = line(self.stage, step, self.total, values, now - self._began, step - self.start)
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
