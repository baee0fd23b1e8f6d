"""Weights that are no numbers are refused where a model is loaded, by every program."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.algorithms.models import load_model
from rlhf_jax.errors import InputError
from rlhf_jax.io import export_pretrained
from rlhf_jax.io.source import ModelSource
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.testing import byte_tokenizer, tiny_model


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, number: float) -> None:
    model, params = tiny_model(vocab_size=259)
    spoiled = params | {
        "final_norm": jax.tree.map(lambda leaf: jnp.asarray(leaf).at[0].set(number), params["final_norm"])
    }
    export_pretrained(tmp_path / "model", model, spoiled, byte_tokenizer())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    message = r"model: the model's numbers are not finite: 1 of \d+ weights of final_norm.* are NaN or infinite"
    with pytest.raises(InputError, match=message):
        load_model(ModelSource(path=str(tmp_path / "model")), "lm", mesh, None)
