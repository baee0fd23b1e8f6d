"""Attention in blocks of queries: its values and gradients, and which keys each block reads."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attend, blocks, causal_attention, segment_mask

COLUMNS = 200
SETTINGS = {"precision": jax.lax.Precision.HIGHEST, "scale": 0.4}


def test_blocks_by_hand() -> None:
    assert blocks(128, None) == [(0, 128, 0)]  # a single block
    assert blocks(129, None) == [(0, 65, 0), (65, 129, 0)]
    assert blocks(200, 5) == [(0, 67, 0), (67, 134, 63), (134, 200, 130)]  # the query at 67 attends to 63 ... 67
    eight = blocks(2048, None)
    assert len(eight) == 8 and sum((end - first) * (end - low) for first, end, low in eight) == 2048**2 * 9 // 16


@functools.cache
def reference(window: int | None, cap: float | None) -> list[np.ndarray]:
    """Compute the reference: one mask over all pairs."""

    def attention(query, key, value, segments):
        return attend(query, key, value, segment_mask(segments, window), cap=cap, **SETTINGS)

    return mixed_and_gradients(attention)


def mixed_and_gradients(attention) -> list[np.ndarray]:
    """Return values and gradients for two rows of several segments; padding on the left or right is not counted."""
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, COLUMNS, 2, 2, 4), (2, 2, COLUMNS, 4), (2, 2, COLUMNS, 4))
    )
    ends = [np.searchsorted([90, 91, 180], np.arange(COLUMNS), side="right") + 1]
    ends.append(np.where(np.arange(COLUMNS) < 70, 0, ends[0]))
    segments = jnp.asarray(np.stack([np.where(np.arange(COLUMNS) < 190, ends[0], 0), ends[1]]), jnp.int32)
    weights = rng.standard_normal(query.shape).astype(np.float32)

    @jax.jit
    def run(*arrays):
        def total(*arrays):
            mixed = jnp.where((segments > 0)[:, :, None, None, None], attention(*arrays, segments), 0.0)
            return (weights * mixed).sum(), mixed

        (_, mixed), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return mixed, *grads

    return [np.asarray(x) for x in run(query, key, value)]


@pytest.mark.parametrize(("window", "cap"), [(None, None), (1, None), (66, 0.8), (150, None), (None, 0.8)])
def test_values_and_gradients_are_those_of_all_pairs(window, cap) -> None:
    def attention(query, key, value, segments):
        return causal_attention(query, key, value, segments, window, cap=cap, **SETTINGS)

    for actual, expected in zip(mixed_and_gradients(attention), reference(window, cap), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
