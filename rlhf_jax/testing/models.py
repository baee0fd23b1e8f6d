"""Models small enough to compile in a second, with parameters that exercise every part of them."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from rlhf_jax.models import Head, Model, ModelConfig
from rlhf_jax.types import Params


def tiny_config(**changes: Any) -> ModelConfig:
    """Return a configuration of vocabulary 64, hidden 16, 2 layers, 4 query heads on 2 key/value heads of 8, feed-forward 32.

    changes: other fields of the configuration.

    The sizes differ where mixing them up should show (heads x head_dim is not hidden) and divide over every mesh of
    eight devices with tensor <= 2.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 32,
    }
    return ModelConfig(**(sizes | changes))


def random_params(model: Model, seed: int) -> Params:
    """Return parameters of ``model`` (numpy leaves, its shapes and dtypes) with nothing left at a special value.

    `Model.init` starts norm scales at 1 and biases at 0, which hides a missing scale or bias; here they are random too, and
    matrices are large enough for peaked logits. A leaf depends on (seed, path, shape) alone, so that models which share
    a part share its numbers. No compilation.
    """

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        digest = hashlib.sha256(f"{seed} {name} {leaf.shape}".encode()).digest()
        noise = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(leaf.shape)
        if name.endswith("['scale']"):
            values = 1.0 + 0.2 * noise
        elif name.endswith("['embedding']"):
            values = 0.5 * noise
        else:
            values = 0.3 * noise
        scaled: np.ndarray = values.astype(leaf.dtype)
        return scaled

    params: Params = jax.tree_util.tree_map_with_path(draw, model.abstract())
    return params


def tiny_model(head: Head = "lm", *, seed: int = 0, **changes: Any) -> tuple[Model, Params]:
    """Return a `tiny_config` model under ``head`` with `random_params`. changes: other fields of the configuration."""
    model = Model(tiny_config(head=head, **changes))
    return model, random_params(model, seed)
