"""Queue of dispatched steps whose metrics are not checked yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from rlhf_jax.loop import bad_steps
from rlhf_jax.rundir.tracking import Metrics, fetch

Values = dict[str, float | None]


@dataclass
class _Step:
    """A step in the queue. values: the fetched metrics, None while they are on the devices."""

    step: int
    metrics: Metrics
    batch: Any
    values: Values | None = None


@dataclass
class Unchecked:
    """A queue that holds the batch of a step only until its metrics are known to be good.

    Batches of rollouts are in HBM: without this, a log line every hundred steps would hold a hundred of them.
    """

    _steps: list[_Step] = field(default_factory=list)

    def add(self, step: int, metrics: Metrics, batch: Any) -> None:
        """Append a step, and drop the batches of steps whose metrics are ready and good. It does not wait for devices."""
        self._steps.append(_Step(step, metrics, batch))
        for entry in self._steps:
            if entry.batch is not None and entry.values is None and _is_ready(entry.metrics):
                entry.values = fetch(entry.metrics)
                entry.batch = entry.batch if bad_steps.find_problem(entry.values) else None

    def take(self) -> list[tuple[int, Values, Any]]:
        """Remove and return all entries as (step, metrics, batch or None), waiting for the devices."""
        steps, self._steps = self._steps, []
        return [
            (entry.step, fetch(entry.metrics) if entry.values is None else entry.values, entry.batch) for entry in steps
        ]


def _is_ready(metrics: Metrics) -> bool:
    arrays = (leaf for leaf in jax.tree.leaves(dict(metrics)) if isinstance(leaf, jax.Array))
    return all(array.is_ready() for array in arrays)  # type: ignore[attr-defined]  # of every array with data
