"""Steps that must not be learned from: what they are, what is done about them, what is kept of them for study.

The step itself refuses them on the device, before the update (`learn.make_train_step`: a loss or gradient that is not
finite, a spike). Here is what follows. LoopConfig.on_bad_step:

- ``stop`` ends the run (exit code 3); the newest checkpoint is from before it.
- ``skip`` goes on without that batch's update, at most LoopConfig.bad_steps times in a run.
- ``rollback`` goes on from the newest checkpoint with the batches that follow, as often at most: what led to a spike is
  passed over too.

``bad_steps.jsonl`` says what happened, ``bad_steps/step_N.npz`` holds the batch.
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
"""Metrics that a line holds when they are not 0."""
Values = Mapping[str, float | None]


def what_is_wrong(values: Values) -> str:
    """'not finite: loss=nan' or 'refused: ...' of a step's numbers; '' when they are fine. None (nothing counted) is fine."""
    if values.get("rollout_refused"):
        seen = ", ".join(f"{name}={values[name]}" for name in ("kl", "score", "return") if name in values)
        return f"rollout refused: {seen}: not finite, or beyond PPOConfig.max_kl"
    bad = [f"{name}={value}" for name, value in values.items() if value is not None and not math.isfinite(value)]
    if bad:
        return f"not finite: {', '.join(bad)}"
    if values.get("refused"):
        return (
            f"refused: loss={values.get('loss')}, grad_norm={values.get('grad_norm')}: a spike (OptimizerConfig.spike)"
        )
    return ""


def stop_if_bad(step: int, values: Values) -> None:
    """Raises RunStopped naming what is wrong."""
    if wrong := what_is_wrong(values):
        raise RunStopped(
            f"step {step}: {wrong}; the step was not saved: lower the learning rate or look at its data "
            f"({BAD_STEPS_FILE}), or set LoopConfig.on_bad_step to 'skip' or 'rollback'"
        )


def keep(directory: Path, step: int, wrong: str, policy: str, values: Values, batch: Any) -> None:
    """Write what is known of a bad step below the run directory. batch: a pytree of arrays, or None."""
    if jax.process_index() != 0:
        return
    plain = {name: value if value is None or math.isfinite(value) else str(value) for name, value in values.items()}
    with (directory / BAD_STEPS_FILE).open("a") as file:
        file.write(json_text({"step": step, "wrong": wrong, "policy": policy, "metrics": plain}))
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    ]
    if leaves and all(getattr(leaf, "is_fully_addressable", True) for _, leaf in leaves):
        (directory / BAD_STEPS).mkdir(exist_ok=True)
        arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in leaves}
        np.savez(directory / BAD_STEPS / f"step_{step}.npz", **arrays)
