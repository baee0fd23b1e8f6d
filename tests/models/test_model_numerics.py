"""Precision of the model, and the distributions of initial parameters."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import Model, ModelConfig, RopeScaling, parameter_count
from rlhf_jax.models.attention import attend
from rlhf_jax.models.rope import Rope, inverse_frequencies, rotary
from rlhf_jax.testing import tiny_config, tiny_model

POSITIONS = np.unique([0, 1, 2, 255, 256, 257, 511, 1000, 2047, 4095, 4096, 8190, *range(0, 8192, 97), 8191])


def exact_rotation(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotate pairs (i, i + K/2) as complex numbers in float64. x: [S, K]."""
    half = x.shape[1] // 2
    phases = positions[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * phases)
    return np.concatenate([turned.real, turned.imag], axis=1)


@pytest.mark.parametrize("theta", [10000.0, 100000.0])
def test_rotary_phases_are_float32_to_position_8191(theta):
    """A float32 angle near 8191 is rounded by up to 2.4e-4, its frequency by as much again; bfloat16 angles are off by 16."""
    x = np.random.default_rng(0).standard_normal((len(POSITIONS), 64))
    exact = exact_rotation(x, POSITIONS, theta)
    rotated = rotary(jnp.asarray(x, jnp.float32)[None, :, None], jnp.asarray(POSITIONS)[None], Rope(theta, 64))[0, :, 0]
    radius = np.sqrt(x[:, :32] ** 2 + x[:, 32:] ** 2)
    assert np.abs((rotated - exact) / np.tile(radius, 2)).max() < 1.5e-3
    near = POSITIONS <= 257
    assert np.abs((rotated - exact)[near]).max() < 1e-4


def test_rotary_in_bfloat16_tells_position_257_from_256():
    """bfloat16 input and output, but float32 inside: the result is the exact one, rounded once."""
    x = np.asarray(
        jnp.asarray(np.random.default_rng(1).standard_normal((len(POSITIONS), 64)), jnp.bfloat16), np.float64
    )
    rotated = rotary(jnp.asarray(x, jnp.bfloat16)[None, :, None], jnp.asarray(POSITIONS)[None], Rope(10000.0, 64))
    assert rotated.dtype == jnp.bfloat16
    exact = exact_rotation(x, POSITIONS, 10000.0)
    error = np.abs(np.asarray(rotated, np.float64)[0, :, 0] - exact)
    # half an ulp of bfloat16 is 2^-9 of the value; the float32 angle adds up to 1.5e-3 of the radius
    assert (error <= np.abs(exact) * 2.0**-9 + 6e-3).all()
    same = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    two = rotary(same, jnp.array([[256, 257]]), Rope(10000.0, 8))[0, :, 0]
    assert np.abs(np.asarray(two[0] - two[1], np.float64)).max() > 0.1


def test_a_query_that_sees_nothing_is_finite():
    query, key = jnp.ones((1, 2, 1, 1, 4)), jnp.full((1, 1, 3, 4), 50.0)
    value = jnp.arange(12.0).reshape(1, 1, 3, 4)
    mask = jnp.array([[[False, False, False], [False, True, False]]])
    out = attend(query, key, value, mask, None)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[0, 1, 0, 0], value[0, 0, 1])


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Model, params, tokens, positions):
    return model.apply(params, tokens, positions=positions)


@pytest.mark.parametrize("start", [0, 8000])
def test_bfloat16_compute_stays_within_its_bound(start):
    """8 bits of mantissa through 2 layers: an error of 2 % of the logits' spread on average, 15 % at most.

    It is not larger at position 8000 than at 0 (bfloat16 rotary angles would give noise there, error 1).
    """
    model, params = tiny_model(max_length=8192)
    tokens = np.random.default_rng(0).integers(3, 64, (4, 16)).astype(np.int32)
    positions = np.tile(np.arange(start, start + 16, dtype=np.int32), (4, 1))
    exact = np.asarray(apply(model, params, tokens, positions), np.float64)
    short = apply(Model(model.config.replace(compute_dtype="bfloat16")), params, tokens, positions)
    assert short.dtype == jnp.float32  # the logits themselves
    error = np.abs(short - exact) / exact.std()
    assert 1e-3 < error.mean() < 0.02 and error.max() < 0.15


def test_activations_have_compute_dtype_and_results_float32():
    model, params = tiny_model("lm+scalar", compute_dtype="bfloat16")
    hidden, cache = jax.eval_shape(
        lambda p: model.prefill(
            p, jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool), jnp.zeros((1, 3), jnp.int32), 5
        ),
        params,
    )
    assert hidden.dtype == cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.keys.shape == (2, 1, 2, 5, 8)
    for read in (model.logits, model.scalars):
        assert jax.eval_shape(read, params, hidden).dtype == jnp.float32
    halved = tiny_model(param_dtype="bfloat16")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype(jnp.bfloat16)}


BIG = ModelConfig(
    vocab_size=97, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=10, ffn_size=40,
    tie_embeddings=False, head="lm+scalar",
)  # fmt: skip


def leaves_by_name(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_initial_parameters():
    """Deterministic in the key; layers and kernels all different; norms 1; the documented spreads."""
    model = Model(BIG)
    init = jax.jit(model.init)
    params, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract()
    )
    for first, second in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first, second)
    kernels, other_kernels = (
        {name: leaf for name, leaf in leaves_by_name(tree).items() if "scale" not in name and "bias" not in name}
        for tree in (params, other)
    )
    assert len(kernels) == 4 + 3 + 3
    for name, leaf in kernels.items():
        assert (leaf != other_kernels[name]).all()
        if name.startswith("['layers']"):
            assert (leaf[0] != leaf[1]).all()
    # truncated at two sigma of 1/sqrt(fan_in): no larger value, and the spread is .880 of sigma
    for name, fan_in in {
        "['layers']['mlp']['down']['kernel']": 40,
        "['layers']['attention']['output']['kernel']": 30,
        "['layers']['attention']['query']['kernel']": 24,
        "['lm_head']['kernel']": 24,
    }.items():
        scaled = np.asarray(kernels[name]) * math.sqrt(fan_in)
        assert np.abs(scaled).max() <= 2.0 and abs(scaled.std() - 0.880) < 0.05
    assert abs(np.asarray(kernels["['embed']['embedding']"]).std() - 0.02) < 0.002
    for norm in (params["final_norm"], params["layers"]["attention_norm"], params["layers"]["mlp_norm"]):
        assert (norm["scale"] == 1.0).all()
    assert params["scalar_head"]["bias"].tolist() == [0.0]


def test_scalar_head_starts_with_the_square_root():
    """std 1 / sqrt(D + 1) = .2425 for D = 16; the paper's misprint 1 / (D + 1) = .0588 was shipped by others."""
    model = Model(tiny_config(head="scalar"))
    heads = jax.jit(jax.vmap(lambda key: model.init(key)["scalar_head"]["kernel"]))(
        jax.random.split(jax.random.key(0), 256)
    )
    spread = float(heads.std())
    assert abs(spread - 17**-0.5) < 0.01 and abs(float(heads.mean())) < 0.01


def test_counts_by_hand():
    # table 97*24, head 24*97, final norm 24, scalar 25; a layer: q 24*30, k and v 24*10 each, o 30*24, mlp 3*24*40, norms 2*24
    expected = 2 * 97 * 24 + 24 + 25 + 2 * (2 * 24 * 30 + 2 * 24 * 10 + 3 * 24 * 40 + 2 * 24)
    assert parameter_count(Model(BIG).abstract()) == expected


# theta 10000, 8 dimensions: 1, .1, .01, .001 radians a position, so wavelengths 6.28, 62.8, 628, 6283
SCALINGS = {
    # a factor of 4 in all dimensions
    "linear": (RopeScaling("linear", 4.0), [0.25, 0.025, 0.0025, 0.00025]),
    # context 1000: turns 159, 15.9, 1.59, .159; kept above 8, divided by 4 below 1, at 1.5915: (1.5915 - 1) / 7 = .0845 kept
    "llama3": (
        RopeScaling("llama3", 4.0, 1000, low_frequency_factor=1.0, high_frequency_factor=8.0),
        [1.0, 0.1, 0.01 * (0.084507 + 0.915493 / 4), 0.00025],
    ),
    # context 1000: 32 turns at dimension 8 ln(1000 / 64 pi) / (2 ln 10^4) = .69667 -> 0, one turn at 2.2018 -> 3
    "yarn": (RopeScaling("yarn", 4.0, 1000), [1.0, 0.1 * (2 / 3 + 1 / 12), 0.01 * (1 / 3 + 2 / 12), 0.00025]),
    # the same without rounding: (1 - .69667) / 1.50516 = .20153 and .86591 of the way to a quarter
    "yarn, not truncated": (
        RopeScaling("yarn", 4.0, 1000, truncate=False),
        [1.0, 0.1 * (1 - 0.75 * 0.20153), 0.01 * (1 - 0.75 * 0.86591), 0.00025],
    ),
    "longrope": (
        RopeScaling("longrope", 4.0, 1000, short_factors=(1, 2, 4, 5), long_factors=(10, 10, 10, 10)),
        [1.0, 0.05, 0.0025, 0.0002],
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_by_hand(name):
    scaling, expected = SCALINGS[name]
    frequencies = inverse_frequencies(Rope(10000.0, 8, scaling))
    assert frequencies.dtype == jnp.float32
    np.testing.assert_allclose(frequencies, expected, rtol=1e-4)


def test_longrope_uses_long_factors_beyond_the_original_length():
    scaling = SCALINGS["longrope"][0]
    chosen = [tiny_config(rope_scaling=scaling, max_length=length).layer(0).rope.long for length in (999, 1000, 1001)]
    assert chosen == [False, False, True]
    np.testing.assert_allclose(
        inverse_frequencies(Rope(10000.0, 8, scaling, True)), [0.1, 0.01, 0.001, 0.0001], rtol=1e-6
    )


def test_the_attention_factor_scales_rotated_dimensions():
    x = jnp.ones((1, 2, 1, 8))
    positions = jnp.array([[0, 3]])
    plain = rotary(x, positions, Rope(10000.0, 4, RopeScaling("yarn", 4.0, 1000)))
    stretched = rotary(x, positions, Rope(10000.0, 4, RopeScaling("yarn", 4.0, 1000, attention_factor=1.5)))
    np.testing.assert_allclose(stretched[..., :4], 1.5 * plain[..., :4], rtol=1e-6)
    np.testing.assert_array_equal(stretched[..., 4:], x[..., 4:])  # not rotated, not stretched


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "dynamic"}, "kind = 'dynamic': one of linear"),
        ({"factor": 0.0}, "factor = 0.0: give a positive number"),
        ({"original_max_length": 0}, "original_max_length = 0"),
        ({"low_frequency_factor": 4.0}, "must be below high_frequency_factor"),
        ({"short_factors": (1.0, -1.0)}, "short_factors = -1.0"),
        ({"truncate": 1}, "truncate = 1"),
    ],
)
def test_bad_scalings_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        RopeScaling(**({"kind": "llama3", "factor": 2.0, "original_max_length": 64} | changes))
