"""Steps that a run has dispatched and whose numbers nobody has looked at yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from rlhf_jax.loop import bad_steps
from rlhf_jax.rundir.tracking import Metrics, fetch

Values = dict[str, float | None]


@dataclass
class _Step:
    """values: the fetched metrics, None while they are on the devices."""

    step: int
    metrics: Metrics
    batch: Any
    values: Values | None = None


@dataclass
class Unchecked:
    """A queue that holds the batch of a step no longer than a record of a bad step may need it.

    Batches of rollouts lie in HBM: with a log line every hundred steps a hundred of them would.
    """

    _steps: list[_Step] = field(default_factory=list)

    def add(self, step: int, metrics: Metrics, batch: Any) -> None:
        """Append a step, and drop the batches of steps whose numbers have arrived and are fine. Waits for no device."""
        self._steps.append(_Step(step, metrics, batch))
        for entry in self._steps:
            if entry.batch is not None and entry.values is None and _arrived(entry.metrics):
                entry.values = fetch(entry.metrics)
                entry.batch = entry.batch if bad_steps.what_is_wrong(entry.values) else None

    def take(self) -> list[tuple[int, Values, Any]]:
        """Empty the queue: (step, its numbers, its batch or None) of all, waiting for the devices."""
        steps, self._steps = self._steps, []
        return [
            (entry.step, fetch(entry.metrics) if entry.values is None else entry.values, entry.batch) for entry in steps
        ]


def _arrived(metrics: Metrics) -> bool:
    arrays = (leaf for leaf in jax.tree.leaves(dict(metrics)) if isinstance(leaf, jax.Array))
    return all(array.is_ready() for array in arrays)  # type: ignore[attr-defined]  # of every array with data
