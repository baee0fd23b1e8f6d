"""Counts from the architecture, against numbers worked by hand and against compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.models import Model
from rlhf_jax.plan import count, parse_module
from rlhf_jax.plan.analytic import (
    block_weights,
    forward_flops,
    generate_flops,
)
from rlhf_jax.testing import tiny_config


def test_weights_a_token_meets() -> None:
    """2 layers of hidden 16, 4 + 4 heads and 2 + 2 key/value heads of 8, feed-forward 32: 2 x (16 x 8 x 12 + 3 x 16 x 32)."""
    assert block_weights(tiny_config()) == 2 * (1536 + 1536)


def test_forward_pass_equals_the_compiled_program() -> None:
    """3 rows of 10: 2 x 30 x 6144 + 3 x 4 x 2 x 100 x 4 x 8 + 2 x 30 x 16 x 64."""
    config = tiny_config()
    assert forward_flops(config, 3, 10, 10) == 368640 + 76800 + 61440
    model = Model(config)
    tokens = jax.ShapeDtypeStruct((3, 10), jnp.int32)
    text = jax.jit(model.apply).lower(model.abstract(), tokens).compile().as_text()
    assert count(parse_module(text), {"x": 1}).flops == 506880


def test_decoding() -> None:
    """Prefill without logits, then 5 tokens each read a cache of 10 + 5: 2 x 3 x 6144 + 3 x 4 x 2 x 15 x 32 + 2 x 3 x 16 x 64."""
    config = tiny_config()
    assert generate_flops(config, 3, 10, 5) == (368640 + 76800) + 5 * (36864 + 11520 + 6144)
