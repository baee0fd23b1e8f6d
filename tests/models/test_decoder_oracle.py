"""The decoder against a slow float64 one written from the papers, without jax: every shape of it must agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.testing import random_params, tiny_model
from rlhf_jax.types import InputError


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Pair (i, i + K/2) as one complex number, turned by position * theta^(-2 i / K)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([turned.real, turned.imag])


def attention(config: ModelConfig, layer: dict, x: np.ndarray, positions, segments) -> np.ndarray:
    """One head and one query at a time, over the columns it may see."""
    out = np.zeros_like(x)
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        query = [
            rotate(row @ layer["query"][:, head], p, config.rope_theta) for row, p in zip(x, positions, strict=True)
        ]
        key = [rotate(row @ layer["key"][:, shared], p, config.rope_theta) for row, p in zip(x, positions, strict=True)]
        value = x @ layer["value"][:, shared]
        for s in range(len(x)):
            seen = [c for c in range(s + 1) if segments[c] == segments[s] != 0]
            if not seen:
                continue
            scores = np.array([query[s] @ key[c] for c in seen]) / np.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            out[s] += (weights / weights.sum()) @ value[seen] @ layer["output"][head]
    return out


def slow_hidden(config: ModelConfig, params: dict, tokens, positions, segments) -> np.ndarray:
    """Final hidden states of ONE row, float64 [S, D]."""
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = exact["embed"]["embedding"][np.asarray(tokens)]
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], exact["layers"])
        kernels = {name: each["kernel"] for name, each in layer["attention"].items()}
        normed = rms_norm(x, layer["attention_norm"]["scale"], config.norm_epsilon)
        x = x + attention(config, kernels, normed, positions, segments)
        normed = rms_norm(x, layer["mlp_norm"]["scale"], config.norm_epsilon)
        gate, up, down = (layer["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        x = x + (normed @ gate / (1 + np.exp(-normed @ gate)) * (normed @ up)) @ down
    return rms_norm(x, exact["final_norm"]["scale"], config.norm_epsilon)


def slow_logits(config: ModelConfig, params: dict, tokens, positions=None, segments=None) -> np.ndarray:
    """float64 [B, S, V]."""
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    hidden = np.stack(
        [
            slow_hidden(config, params, *row)
            for row in zip(tokens, np.asarray(positions), np.asarray(segments), strict=True)
        ]
    )
    head = params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"]
    return hidden @ np.asarray(head, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Model, params, tokens, positions=None, segment_ids=None):
    return model.apply(params, tokens, positions=positions, segment_ids=segment_ids)


def tokens_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 64, shape).astype(np.int32)


SHAPES = {
    "grouped": {},
    "one head each": {"num_kv_heads": 4, "tie_embeddings": False},
    "one key head, odd sizes": {"num_kv_heads": 1, "num_layers": 3, "hidden_size": 20, "head_dim": 6, "ffn_size": 24},
    "other constants": {"rope_theta": 37.0, "norm_epsilon": 0.3},
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_slow_decoder(name):
    model, params = tiny_model(**SHAPES[name])
    tokens = tokens_of(0, 2, 9)
    got = apply(model, params, tokens)
    assert got.dtype == jnp.float32
    expected = slow_logits(model.config, params, tokens)
    assert expected.std() > 0.5  # the numbers compared are not all near zero
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


def test_padding_segments_and_positions_equal_the_slow_decoder():
    """Left padding, two documents in a row with restarted positions, right padding, and positions far out at once."""
    model, params = tiny_model()
    tokens = tokens_of(1, 3, 9)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
    positions = np.array([[0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2, 3, 3], list(range(500, 509))], np.int32)
    expected = slow_logits(model.config, params, tokens, positions, segments)
    got = np.asarray(apply(model, params, tokens, positions, segments))
    real = segments > 0
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-4, atol=1e-4)
    assert np.isfinite(got).all()  # padding columns: any finite number


def test_scalars_equal_the_slow_decoder():
    model, params = tiny_model("lm+scalar")
    tokens = tokens_of(2, 2, 7)
    hidden = jax.jit(model.hidden)(params, tokens)
    expected = np.stack([slow_hidden(model.config, params, row, range(7), np.ones(7)) for row in tokens])
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=2e-5)
    kernel, bias = (np.asarray(params["scalar_head"][name], np.float64) for name in ("kernel", "bias"))
    scalars = model.scalars(params, hidden)
    assert scalars.shape == (2, 7) and scalars.dtype == jnp.float32
    np.testing.assert_allclose(scalars, (expected @ kernel)[..., 0] + bias, rtol=1e-5, atol=2e-5)
    # the trunk under another head gives the same logits
    lm, trunk = tiny_model("lm")
    np.testing.assert_allclose(model.logits(params, hidden), apply(lm, trunk, tokens), rtol=1e-6, atol=1e-6)


def test_far_positions_equal_the_slow_decoder():
    """Up to column 8191 of a long context: float32 angles of 8191 radians are off by half an ulp, 2.4e-4."""
    model, params = tiny_model(rope_theta=10000.0, max_length=8192)
    tokens = tokens_of(3, 1, 12)
    positions = np.array([[0, 1, 255, 256, 257, 258, 1023, 4095, 4096, 8189, 8190, 8191]], np.int32)
    expected = slow_logits(model.config, params, tokens, positions)
    np.testing.assert_allclose(apply(model, params, tokens, positions), expected, atol=3e-3)


def test_a_model_without_the_head_says_so():
    lm, params = tiny_model()
    scalar, _ = tiny_model("scalar")
    assert scalar == lm.with_head("scalar")
    hidden = jnp.zeros((1, 1, 16))
    with pytest.raises(InputError, match="'scalar' has no logits"):
        scalar.logits(params, hidden)
    with pytest.raises(InputError, match="'lm' has no scalar"):
        lm.scalars(params, hidden)
    assert "scalar_head" not in lm.abstract() and "lm_head" not in random_params(scalar, 0)
