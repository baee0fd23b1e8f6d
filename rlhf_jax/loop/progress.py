"""Progress of a run: a bar on a terminal, plain lines (at most one every ten seconds) elsewhere."""

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
"""Metrics that the line shows, ROLLOUTS for a run with rollouts; held-out metrics and two monitor metrics follow them."""
HELDOUT, MONITOR = "heldout/", "monitor/"


def headline(values: Mapping[str, float | None]) -> str:
    """Return the main metrics as text: 'loss 0.6931  accuracy 0.5  heldout/loss 0.7'."""
    names = list(ROLLOUTS if "score" in values else SUPERVISED)
    names += [name for name in (f"{HELDOUT}loss", f"{HELDOUT}accuracy") if name in values]
    names += sorted(name for name in values if name.startswith(MONITOR))[:2]
    selected = {name: values.get(name) for name in names}
    return "  ".join(f"{name} {value:.4g}" for name, value in selected.items() if value is not None)


def line(stage: str, step: int, total: int, values: Mapping[str, float | None], seconds: float, completed: int) -> str:
    """Return a plain line. seconds: since this process began its first step; completed: the steps it has finished since."""
    remaining = seconds / completed * (total - step) if completed else 0.0
    return f"{stage} {step}/{total}  {headline(values)}  {seconds:.0f} s, {remaining:.0f} s left"


class Display:
    """Progress of one loop, on stderr."""

    def __init__(self, stage: str, start: int, total: int, enabled: bool) -> None:
        self.stage, self.start, self.total, self.enabled = stage, start, total, enabled
        self._began = time.monotonic()
        self._last = float("-inf")
        self._heldout: dict[str, float | None] = {}
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[headline]}", markup=False),
            )
            console = Console(file=behind(sys.stderr))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(stage, total=total, completed=start, headline="")
            self._bar.start()
            sys.stderr = cast(TextIO, Messages(sys.stderr))  # rich replaces stderr until the bar stops

    def keep_heldout(self, values: Mapping[str, float | None]) -> None:
        """Show the held-out metrics among ``values`` until newer ones are measured."""
        self._heldout |= {name: value for name, value in values.items() if name.startswith(HELDOUT)}

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show that ``step`` is finished, with its metrics."""
        time_now, values = time.monotonic(), {**self._heldout, **values}
        if self._bar is not None:
            self._bar.update(self._task, completed=step, headline=headline(values))
        elif self.enabled and (time_now - self._last >= 10.0 or step == self.total):
            self._last = time_now
            text = line(self.stage, step, self.total, values, time_now - self._began, step - self.start)
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar and restore the terminal."""
        if self._bar is not None:
            self._bar.stop()
