"""The decoder against a slow float64 implementation written from the papers in numpy, for every option."""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.testing import random_params, tiny_model


def norm(config: ModelConfig, x: np.ndarray, weights: dict, *, kind: str | None = None) -> np.ndarray:
    """Normalize over the last axis; only layer norms have a "bias"."""
    if (kind or config.norm) == "layer":
        x = x - x.mean(-1, keepdims=True)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return normed * (config.norm_offset + weights["scale"]) + weights.get("bias", 0.0)


def rotate(x: np.ndarray, position: int, theta: float, size: int) -> np.ndarray:
    """Rotate pairs (i, i + size/2) of the first ``size`` numbers, as complex numbers, by position * theta^(-2 i / size)."""
    half = size // 2
    turned = (x[:half] + 1j * x[half:size]) * np.exp(1j * position * theta ** (-2 * np.arange(half) / size))
    return np.concatenate([turned.real, turned.imag, x[size:]])


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def dense(x: np.ndarray, weights: dict) -> np.ndarray:
    return np.tensordot(x, weights["kernel"], 1) + weights.get("bias", 0.0)


def queries_and_keys(config: ModelConfig, index: int, layer: dict, x: np.ndarray, positions):
    query, key = dense(x, layer["query"]), dense(x, layer["key"])  # [S, H, K], [S, G, K]
    if config.qk_norm == "width":
        for name, one in (("query_norm", query), ("key_norm", key)):
            flat = {"scale": layer[name]["scale"].reshape(-1)}
            one[...] = norm(config, one.reshape(len(x), -1), flat, kind="rms").reshape(one.shape)
    elif config.qk_norm == "head":
        query, key = (
            norm(config, query, layer["query_norm"], kind="rms"),
            norm(config, key, layer["key_norm"], kind="rms"),
        )
    name = config.layer_pattern[index % len(config.layer_pattern)] if config.layer_pattern else "full"
    if config.positions == "rotary" and "nope" not in name:
        local = "sliding" in name and config.rope_theta_sliding
        theta, size = (
            (config.rope_theta_sliding if local else config.rope_theta),
            int(config.head_dim * config.rope_fraction),
        )
        for one in (query, key):
            for s, head in np.ndindex(one.shape[:2]):
                one[s, head] = rotate(one[s, head], positions[s], theta, size)
    return query, key, (config.sliding_window if "sliding" in name else None)


def attention(config: ModelConfig, index: int, layer: dict, x: np.ndarray, positions, segments) -> np.ndarray:
    """Compute attention one head and one query at a time, over the columns that the query may attend to."""
    query, key, window = queries_and_keys(config, index, layer, x, positions)
    value = dense(x, layer["value"])
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    out = np.zeros_like(x) + layer["output"].get("bias", 0.0)
    for head in range(config.num_heads):
        shared = head * config.num_kv_heads // config.num_heads
        for s in range(len(x)):
            first = 0 if window is None else max(0, s - window + 1)
            visible = [c for c in range(first, s + 1) if segments[c] == segments[s] != 0]
            if not visible:
                continue
            scores = capped(
                np.array([query[s, head] @ key[c, shared] for c in visible]) * scale, config.attention_soft_cap
            )
            weights = np.exp(scores - scores.max())
            out[s] += (weights / weights.sum()) @ value[visible, shared] @ layer["output"]["kernel"][head]
    return out


def activated(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    if config.activation == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def experts(config: ModelConfig, layer: dict, x: np.ndarray) -> np.ndarray:
    """Compute the mixture one token and one expert at a time."""
    out = np.zeros_like(x)
    for s, row in enumerate(x):
        odds = np.exp(row @ layer["router"])
        odds /= odds.sum()
        best = np.argsort(-odds)[: config.experts_per_token]
        total = odds[best].sum() if config.normalize_expert_weights else 1.0
        for e in best:
            inner = activated(config, row @ layer["gate"][e]) * (row @ layer["up"][e])
            out[s] += odds[e] / total * (inner @ layer["down"][e])
    return out


def feed_forward(config: ModelConfig, index: int, layer: dict, x: np.ndarray) -> np.ndarray:
    if config.num_experts and index not in config.dense_layers:
        return experts(config, layer, x)
    up = dense(x, layer["up"])
    inner = activated(config, dense(x, layer["gate"])) * up if config.gated_mlp else activated(config, up)
    return dense(inner, layer["down"])


def layer_of(config: ModelConfig, params: dict, index: int) -> dict:
    """Return the parameters of one layer, wherever they are stacked."""
    if "attention" in params["layers"]:
        return jax.tree.map(lambda leaf: leaf[index], params["layers"])
    for path, layers in config.layer_stacks():
        if index in layers:
            stack = params["layers"][path.removeprefix("layers/")]
            return jax.tree.map(operator.itemgetter(layers.index(index)), stack)
    raise AssertionError(index)


def slow_hidden(config: ModelConfig, params: dict, tokens, positions, segments) -> np.ndarray:
    """Return the final hidden states of one row, float64 [S, D]."""
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = exact["embed"]["embedding"][np.asarray(tokens)]
    if config.scale_embeddings:
        x = x * math.sqrt(config.hidden_size)
    if config.positions == "learned":
        x = x + exact["position_embed"]["embedding"][np.asarray(positions)]
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    for index in range(config.num_layers):
        layer = layer_of(config, exact, index)
        read = norm(config, x, layer["attention_norm"]) if before else x
        added = attention(config, index, layer["attention"], read, positions, segments)
        middle = x + (norm(config, added, layer["attention_post_norm"]) if after else added)
        source = x if config.parallel_residual else middle
        added = feed_forward(config, index, layer["mlp"], norm(config, source, layer["mlp_norm"]) if before else source)
        x = middle + (norm(config, added, layer["mlp_post_norm"]) if after else added)
    return norm(config, x, exact["final_norm"])


def slow_logits(config: ModelConfig, params: dict, tokens, positions=None, segments=None) -> np.ndarray:
    """Return logits, float64 [B, S, V]."""
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    hidden = np.stack(
        [
            slow_hidden(config, params, *row)
            for row in zip(tokens, np.asarray(positions), np.asarray(segments), strict=True)
        ]
    )
    head = params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"]
    return capped(hidden @ np.asarray(head, np.float64), config.logit_soft_cap)


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
    "sliding": {"layer_pattern": ("sliding",), "sliding_window": 3},
    "two bases, soft caps, offsets, norms on both sides": {
        "num_layers": 5, "layer_pattern": ("sliding", "sliding", "full"), "sliding_window": 4, "rope_theta_sliding": 77.0,
        "attention_soft_cap": 2.0, "logit_soft_cap": 3.0, "attention_scale": 0.7, "norm_placement": "both",
        "norm_offset": 1.0, "scale_embeddings": True, "activation": "gelu_tanh", "qk_norm": "head",
    },
    "no positions in some layers, runs of layers": {
        "num_layers": 4, "layer_pattern": ("full", "full", "full", "sliding_nope"), "sliding_window": 2, "qkv_bias": True,
        "output_bias": True, "mlp_bias": True,
    },
    "norms behind, over the width": {"norm_placement": "post", "qk_norm": "width", "tie_embeddings": False},
    "parallel, partial rotation, layer norms": {
        "parallel_residual": True, "rope_fraction": 0.5, "norm": "layer", "gated_mlp": False, "mlp_bias": True,
        "activation": "gelu", "qkv_bias": True, "output_bias": True,
    },
    "learned positions": {"positions": "learned", "max_length": 16, "norm": "layer", "gated_mlp": False},
    "experts": {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 12},
    "experts in some layers": {
        "num_layers": 4, "num_experts": 5, "experts_per_token": 3, "expert_ffn_size": 12, "dense_layers": (0, 2),
        "normalize_expert_weights": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_slow_decoder(name):
    model, params = tiny_model(**SHAPES[name])
    tokens = tokens_of(0, 2, 9)
    logits = apply(model, params, tokens)
    assert logits.dtype == jnp.float32
    expected = slow_logits(model.config, params, tokens)
    assert expected.std() > 0.5  # the numbers compared are not all near zero
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"layer_pattern": ("full", "sliding"), "sliding_window": 2}])
def test_padding_segments_and_positions_equal_the_slow_decoder(changes):
    """Left padding, two documents in a row with restarted positions, right padding, and large positions, all at once."""
    model, params = tiny_model(**changes)
    tokens = tokens_of(1, 3, 9)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
    positions = np.array([[0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2, 3, 3], list(range(500, 509))], np.int32)
    expected = slow_logits(model.config, params, tokens, positions, segments)
    logits = np.asarray(apply(model, params, tokens, positions, segments))
    real = segments > 0
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    assert np.isfinite(logits).all()  # padding columns: any finite number


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
