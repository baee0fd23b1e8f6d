"""The losses of supervised fine-tuning and reward modelling on numbers given by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import RankedBatch
from rlhf_jax.learn import gradients, make_reward_loss, make_sft_loss, pair_mask, pair_scores
from rlhf_jax.testing import token_batch

KEY = jax.random.key(0)


def test_sft_loss_counts_targets_only():
    """-(.5 + 1 + 3) / 3 targets = 1.5; log-probabilities elsewhere, NaN included, are not read."""
    batch = token_batch([[5, 6, 7], [8, 9]], length=4, prompt_lengths=[1, 1])
    nan = np.nan
    logprobs = jnp.array([[nan, -0.5, -1.0, nan], [0.0, -3.0, nan, nan]])
    entropy = jnp.array([[nan, 1.0, 2.0, nan], [9.0, 4.5, nan, nan]])

    def fixed(params, batch):
        return params["scale"] * logprobs, entropy

    _, metrics = gradients(make_sft_loss(fixed), {"scale": jnp.ones(())}, {}, batch, KEY, 1)
    assert float(metrics["loss"].value()) == pytest.approx(1.5)
    assert float(metrics["entropy"].value()) == pytest.approx(2.5)
    assert float(metrics["tokens_per_row"].value()) == 1.5


def table(params, batch):
    """The reward of a row: a number looked up at its first token."""
    return params["table"][batch.tokens[:, 0]]


def pairs(chosen, rejected, margin=None) -> RankedBatch:
    sides = [token_batch([[t] if t else [] for t in side], length=2) for side in (chosen, rejected)]
    return RankedBatch.of_pairs(*sides, margin)


TABLE = {"table": jnp.array([99.0, 1.0, 0.0, -2.0])}


def measured(batch, microbatches=1, **options):
    return gradients(make_reward_loss(table, **options), TABLE, {}, batch, KEY, microbatches)


def test_pairwise_loss_by_hand():
    # chosen 1, rejected 0: .313262; with margin .5: .474077; centring .01: + .01 (1 + 0)^2 = .323262
    assert float(measured(pairs([1], [2]))[1]["loss"].value()) == pytest.approx(0.313262, abs=1e-6)
    assert float(measured(pairs([1], [2], [0.5]))[1]["loss"].value()) == pytest.approx(0.474077, abs=1e-6)
    _, metrics = measured(pairs([1], [2]), centring=0.01)
    assert float(metrics["loss"].value()) == pytest.approx(0.323262, abs=1e-6)
    assert float(metrics["loss/centring"].value()) == pytest.approx(1.0)


def test_gradient_by_hand():
    """-sigmoid(-(1 - 0)) = -.268941 on the chosen reward, the opposite on the rejected one, halved over two pairs."""
    grads, _ = measured(pairs([1, 3], [2, 3]))
    assert grads["table"].tolist() == pytest.approx([0.0, -0.268941 / 2, 0.268941 / 2, 0.0], abs=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_metrics_and_rows_that_only_fill_up(microbatches):
    """Pairs: right (1 > -2), tie (wrong), wrong (0 > -2 the other way round), and a filler row that counts nowhere."""
    batch = pairs([1, 2, 3, 0], [3, 2, 2, 0])
    assert pair_mask(batch).tolist() == [True, True, True, False]
    _, metrics = measured(batch, microbatches)
    expected = {
        "accuracy": 1 / 3,
        "reward_gap": (3.0 + 0.0 - 2.0) / 3,
        "reward_chosen": (1.0 + 0.0 - 2.0) / 3,
        "reward_rejected": (-2.0 + 0.0 + 0.0) / 3,
        "loss": (np.log1p(np.exp(-3)) + np.log(2) + np.log1p(np.exp(2))) / 3,
    }
    for name, value in expected.items():
        assert float(metrics[name].value()) == pytest.approx(value, abs=1e-6), name


def test_rows_that_only_fill_up_are_not_centred():
    """(1 + 0)^2 = 1 is the mean over the one pair; the filler's rewards, whatever a model says of padding, are not in it."""
    for batch in (pairs([1], [2]), pairs([1, 0], [2, 0])):
        grads, metrics = measured(batch, centring=0.5)
        assert float(metrics["loss/centring"].value()) == pytest.approx(1.0)
        assert float(grads["table"][0]) == 0.0


def test_scores_keep_their_side_and_order():
    chosen, rejected = pair_scores(table, TABLE, pairs([1, 2, 3], [3, 1, 2]))
    assert (chosen.tolist(), rejected.tolist()) == ([1.0, 0.0, -2.0], [-2.0, 1.0, 0.0])


def test_at_equal_rewards_the_loss_is_log_two():
    _, metrics = gradients(make_reward_loss(table), {"table": jnp.full(4, 3.3)}, {}, pairs([1, 2], [2, 3]), KEY, 1)
    assert float(metrics["loss"].value()) == pytest.approx(0.693147, abs=1e-6)
    assert float(metrics["accuracy"].value()) == 0.0
