"""Groups of responses in the losses: their order in one pass, which pairs count and how much."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import RankedBatch
from rlhf_jax.errors import InputError
from rlhf_jax.learn import (
    DPOConfig,
    gradients,
    make_dpo_loss,
    make_reward_loss,
    pair_halves,
    pair_mask,
    pair_rows,
    pair_scores,
    rank_major,
)
from rlhf_jax.testing import token_batch
from rlhf_jax.types import Mean, Term

KEY = jax.random.key(0)
TABLE = {"table": jnp.array([99.0, 1.0, 0.0, -2.0])}


def sides():
    return [token_batch([[token] for token in side], length=2) for side in ([1, 2, 3], [3, 1, 2])]


def pairs(**changes) -> RankedBatch:
    return dataclasses.replace(RankedBatch.of_pairs(*sides()), **changes)


def table(params, batch):
    """The reward of a row, looked up at its first token."""
    return params["table"][batch.tokens[:, 0]]


def logprobs(params, batch):
    actual = params["table"][batch.tokens]
    return jnp.where(batch.loss_mask, actual, jnp.nan), jnp.zeros_like(actual)


def measured(loss, batch, microbatches=1, frozen=None):
    _, metrics = gradients(loss, TABLE, frozen or {}, batch, KEY, microbatches)
    return {name: float(mean.value()) for name, mean in metrics.items()}


def dpo():
    return make_dpo_loss(logprobs, lambda frozen, batch: logprobs(frozen, batch)[0], DPOConfig(sft_coefficient=0.5))


def targets() -> RankedBatch:
    """Prompts of one token; responses of one token, 1 or 2 chosen, 3 rejected."""
    chosen, rejected = token_batch([[3, 1], [3, 2]], length=2), token_batch([[3, 3], [3, 3]], length=2)
    return RankedBatch.of_pairs(chosen, rejected)


def test_rows_come_rank_by_rank():
    """All chosen rows and then all rejected ones, in every field; groups of three likewise."""
    flat = pair_rows(pairs())
    for actual, *pair in zip(*map(jax.tree.leaves, (flat, *sides())), strict=True):
        np.testing.assert_array_equal(actual, np.concatenate(pair))
    assert rank_major(jnp.array([[1, 2, 3], [4, 5, 6]])).tolist() == [1, 4, 2, 5, 3, 6]
    assert [half.tolist() for half in pair_halves(jnp.arange(4))] == [[0, 1], [2, 3]]


def test_microbatches_are_cut_between_groups():
    """Chosen rows hold 1, 2, 3 and rejected ones 11, 12, 13: every microbatch has both rows of its pairs."""
    observed = []

    def loss(params, frozen, batch, rng):
        del frozen, rng
        jax.debug.callback(lambda rows: observed.append(rows.tolist()), batch.rows.tokens[:, :, 0], ordered=True)
        return {"nll": Term(params["table"].sum(), jnp.ones(()))}, {"rows": Mean.of(batch.label)}

    chosen, rejected = (token_batch([[first + k] for k in (1, 2, 3)], length=2) for first in (0, 10))
    gradients(loss, TABLE, {}, RankedBatch.of_pairs(chosen, rejected), KEY, 3)
    jax.effects_barrier()
    assert {str(rows) for rows in observed} == {"[[1, 11]]", "[[2, 12]]", "[[3, 13]]"}


def test_a_pair_counts_where_both_rows_do():
    mask = np.array([[True, True], [True, False], [False, True]])
    batch = pairs(mask=mask)
    assert pair_mask(batch).tolist() == [True, False, False]
    numbers = measured(make_reward_loss(table, centring=0.5), batch)
    assert numbers["reward_gap"] == 3.0 and numbers["loss/centring"] == 1.0
    assert numbers["loss/pairwise"] == pytest.approx(np.log1p(np.exp(-3)), abs=1e-6)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_pair_weighs_in_the_loss_and_not_in_metrics(microbatches):
    """Gaps 3, -1, -2 with weights 2, 1, 0; accuracy is that of three pairs."""
    batch = pairs(weight=np.float32([2, 1, 0]))
    numbers = measured(make_reward_loss(table), batch, microbatches)
    assert numbers["loss"] == pytest.approx((2 * np.log1p(np.exp(-3)) + np.log1p(np.exp(1))) / 3, abs=1e-6)
    assert numbers["accuracy"] == pytest.approx(1 / 3) and numbers["reward_gap"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_weights_in_the_terms_of_dpo(microbatches):
    """At the reference the preference is log 2; log-probabilities 1 and 0 of the chosen tokens, weights 3 and 1: -3 / 4."""
    batch = dataclasses.replace(targets(), weight=np.float32([3, 1]))
    numbers = measured(dpo(), batch, microbatches, TABLE)
    assert numbers["loss/preference"] == pytest.approx(np.log(2), abs=1e-6)
    assert numbers["loss/nll"] == pytest.approx(-0.75) and numbers["logprob_chosen"] == pytest.approx(0.5)


def test_a_pair_that_does_not_count_teaches_no_tokens():
    batch = dataclasses.replace(targets(), mask=np.array([[True, True], [True, False]]))
    assert measured(dpo(), batch, 1, TABLE)["loss/nll"] == pytest.approx(-1.0)


def test_groups_of_three_are_refused_in_losses_of_pairs():
    batch = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:, :1]], axis=1) if leaf.ndim > 1 else leaf, pairs())
    message = "RankedBatch: groups of 3 rows in a loss of pairs; give groups of 2"
    for call in (lambda: pair_scores(table, TABLE, batch), lambda: pair_mask(batch)):
        with pytest.raises(InputError, match=message):
            call()
