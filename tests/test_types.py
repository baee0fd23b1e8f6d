"""Means with weights on numbers given by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.types import Mean

VALUES = jnp.array([1.0, 4.0, jnp.nan, jnp.inf])
MASK = jnp.array([True, True, False, True])
WEIGHT = jnp.array([3.0, 1.0, 5.0, 0.0])


def test_a_weighted_mean_by_hand() -> None:
    """(3 x 1 + 1 x 4) / 4 = 7 / 4; what is masked or has weight 0 is not read, and gets no gradient."""
    mean = Mean.weighted(VALUES, MASK, WEIGHT)
    assert (float(mean.total), float(mean.weight), float(mean.value())) == (7.0, 4.0, 1.75)
    gradient = jax.grad(lambda values: Mean.weighted(values, MASK, WEIGHT).value())(VALUES)
    assert gradient.tolist() == [0.75, 0.25, 0.0, 0.0]


def test_a_group_weighs_all_columns_of_its_row() -> None:
    """Rows of 2 and 1 tokens with weights 2 and 1: (2 x 1 + 2 x 2 + 1 x 8) / 5 tokens."""
    values, mask = jnp.array([[1.0, 2.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])
    mean = Mean.weighted(values, mask, jnp.array([[2.0], [1.0]]))
    assert (float(mean.total), float(mean.weight)) == (14.0, 5.0)


def test_weights_of_one_give_the_plain_mean() -> None:
    plain, weighted = Mean.of(VALUES[:2], MASK[:2]), Mean.weighted(VALUES[:2], MASK[:2], jnp.ones(2))
    assert (float(weighted.total), float(weighted.weight)) == (float(plain.total), float(plain.weight))


def test_weights_are_no_mask() -> None:
    with pytest.raises(InputError, match="Mean.weighted: mask of dtype float32: give booleans"):
        Mean.weighted(VALUES, WEIGHT, WEIGHT)
