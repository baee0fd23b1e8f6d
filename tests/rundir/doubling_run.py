"""A minimal run without a program: one vector, doubled in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rlhf_jax.config import BoundConfig
from rlhf_jax.loop import LoopConfig, open_run


def train(run_dir: Path, steps: int, *, stage: str = "toy", seed: int = 0, **loop: Any) -> list[int]:
    """Double w and add 1 in each step; return the steps that this call ran."""
    settings = LoopConfig(**{"save_every": 1, "keep": 2, "tensorboard": False, "progress": False, **loop})
    config, completed = BoundConfig(f"run.steps = {steps}\n", f"run.steps = {steps}\n"), []
    state = {"params": {"w": jnp.full(3, float(seed))}}
    with open_run(run_dir, stage=stage, bound=config, seed=seed, loop=settings) as run:
        state, _ = run.restore(state, {})
        for step in run.steps(run.resumed_step, steps):
            state = {"params": {"w": 2 * state["params"]["w"] + 1}}
            run.log(step, {"w": float(state["params"]["w"][0])})
            run.save(step, state, {})
            completed.append(step)
    return completed
