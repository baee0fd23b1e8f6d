"""Run directories for tests: a model card and checkpoints, saved without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.models import write_model_card
from rlhf_jax.data import Template
from rlhf_jax.models import Head, Model
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.testing import byte_tokenizer, random_params, tiny_config
from rlhf_jax.types import Params

TEMPLATE = Template(style="plain", prompt_format="Q {prompt}\nA:", bos="never")


def make_run(
    run_dir: Path, head: Head = "lm", *, subtree: str = "params", steps: tuple[int, ...] = (1,), **changes: Any
) -> tuple[Model, Params]:
    """Write a run that saved ``steps``; the parameters of step n have seed n. Returns the newest model and parameters."""
    run_dir.mkdir()
    model = Model(tiny_config(head=head, vocab_size=272, **changes))
    write_model_card(run_dir, model, byte_tokenizer(), TEMPLATE, subtree)
    with Checkpoints(run_dir, Retention(3)) as checkpoints:
        for step in steps:
            params = jax.tree.map(jnp.asarray, random_params(model, step))
            state: Any = params
            for key in reversed(subtree.split("/")):
                state = {key: state, "other": jnp.ones((3,))}
            checkpoints.save(step, state, {})
    return model, params
