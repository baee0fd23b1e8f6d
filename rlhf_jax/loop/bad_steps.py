"""Bad steps (a loss or gradient that is not finite, a spike): detection, and the record of their metrics and batch.

The train step skips the update on the device (`learn.make_train_step`). LoopConfig.on_bad_step defines what follows:

- ``stop`` ends the run (exit code 3); the newest checkpoint is from before the bad step.
- ``skip`` continues without the update of that batch, at most LoopConfig.bad_steps times in a run.
- ``rollback`` continues from the newest checkpoint with the next batches, also at most LoopConfig.bad_steps times: the
  batches that led to a spike are skipped too.

``bad_steps.jsonl`` records the metrics, ``bad_steps/step_N.npz`` the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.errors import RunStopped
from rlhf_jax.storage.files import json_text
from rlhf_jax.storage.names import BAD_STEPS, BAD_STEPS_FILE

POLICIES = ("stop", "skip", "rollback")
ONLY_WHEN_BAD = ("refused", "rollout_refused")
"""Metrics that are written only when they are not 0."""
Values = Mapping[str, float | None]


def find_problem(values: Values) -> str:
    """Return 'not finite: loss=nan' or 'refused: ...' for the metrics of a bad step; '' for a good one.

    None (nothing was counted) is good.
    """
    if values.get("rollout_refused"):
        metrics = ", ".join(f"{name}={values[name]}" for name in ("kl", "score", "return") if name in values)
        return f"rollout refused: {metrics}: not finite, or beyond PPOConfig.max_kl"
    bad = [f"{name}={value}" for name, value in values.items() if value is not None and not math.isfinite(value)]
    if bad:
        return f"not finite: {', '.join(bad)}"
    if values.get("refused"):
        return (
            f"refused: loss={values.get('loss')}, grad_norm={values.get('grad_norm')}: a spike (OptimizerConfig.spike)"
        )
    return ""


def stop_if_bad(step: int, values: Values) -> None:
    """Check the metrics of a step. Raises RunStopped that names the problem."""
    if problem := find_problem(values):
        raise RunStopped(
            f"step {step}: {problem}; the step was not saved: lower the learning rate or look at its data "
            f"({BAD_STEPS_FILE}), or set LoopConfig.on_bad_step to 'skip' or 'rollback'"
        )


def record(directory: Path, step: int, problem: str, policy: str, values: Values, batch: Any) -> None:
    """Write the metrics and the batch of a bad step into the run directory. batch: a pytree of arrays, or None."""
    if jax.process_index() != 0:
        return
    plain = {name: value if value is None or math.isfinite(value) else str(value) for name, value in values.items()}
    with (directory / BAD_STEPS_FILE).open("a") as file:
        file.write(json_text({"step": step, "wrong": problem, "policy": policy, "metrics": plain}))
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    ]
    if leaves and all(getattr(leaf, "is_fully_addressable", True) for _, leaf in leaves):
        (directory / BAD_STEPS).mkdir(exist_ok=True)
        arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in leaves}
        np.savez(directory / BAD_STEPS / f"step_{step}.npz", **arrays)
