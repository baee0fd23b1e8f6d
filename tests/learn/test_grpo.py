"""GRPO and its relatives on numbers given by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PromptBatch
from rlhf_jax.errors import InputError
from rlhf_jax.learn import GRPOConfig, gradients, make_grpo_loss, prepare_groups
from rlhf_jax.learn.grpo import reduced
from rlhf_jax.ops import group_advantages
from rlhf_jax.types import Completions, Rollout

KEY = jax.random.key(0)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)


@pytest.mark.parametrize(
    ("scores", "kind", "epsilon", "expected"),
    [
        ([1, 0, 0, 1], "standardised", 1e-4, [0.865875, -0.865875, -0.865875, 0.865875]),  # .5 / (.577350 + 1e-4)
        ([1, 0, 0, 1], "standardised", 1e-6, [0.866024, -0.866024, -0.866024, 0.866024]),
        ([1, 0, 0, 0], "standardised", 1e-4, [1.4997, -0.4999, -0.4999, -0.4999]),  # .75 / .5001
        ([1, 0, 0, 0], "centred", 1e-4, [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], "leave_one_out", 1e-4, [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ([0.1, 0.1, 0.1], "standardised", 0.0, [0.0, 0.0, 0.0]),  # all alike: nothing to learn, not 0 / 0
    ],
)
def test_group_advantages(scores, kind, epsilon, expected):
    actual = group_advantages(jnp.float32(scores), len(scores), kind=kind, epsilon=epsilon)
    assert actual.tolist() == pytest.approx(expected, abs=1e-5)


def test_groups_do_not_see_each_other_and_one_is_none():
    two = group_advantages(jnp.float32([1, 0, 7, 3]), 2, kind="centred")
    assert two.tolist() == [0.5, -0.5, 2.0, -2.0]
    with pytest.raises(InputError, match="samples = 1: a response needs others"):
        group_advantages(jnp.float32([1, 0]), 1)


def completions(mask=MASK, ended=None) -> Completions:
    rows, columns = mask.shape
    prompts = PromptBatch(np.ones((rows, 1), np.int32), np.ones((rows, 1), bool), *[np.zeros(rows, np.int32)] * 2)
    ended = np.ones(rows, bool) if ended is None else np.array(ended)
    return Completions(prompts, np.zeros((rows, columns), np.int32), mask, np.zeros(mask.shape, np.float32), ended)


def rollout(scores, logprobs=None, reference=None, mask=MASK, ended=None) -> Rollout:
    zeros = np.zeros(mask.shape, np.float32)
    logprobs = zeros if logprobs is None else np.float32(logprobs)
    outcome = completions(mask, ended).replace(logprobs=logprobs)
    reference = None if reference is None else np.float32(reference)
    return Rollout(outcome, logprobs, reference, None, {"gold": np.float32(scores)}, np.ones(len(scores), bool))


def measured(config, logprobs, scores=(1.0, 0.0), microbatches=1, **about):
    """Metrics of the loss at ``logprobs`` of a rollout of one prompt whose old log-probabilities are 0."""
    batch, _ = prepare_groups(rollout(scores, **about), config, 2)

    def logprobs_fn(params, outcome):
        picked = jnp.asarray(logprobs)[outcome.tokens[:, 0]]  # by row, whatever the microbatch holds
        return params["scale"] * picked, jnp.zeros(picked.shape)

    rows = np.arange(len(scores), dtype=np.int32)[:, None]
    batch = batch.replace(completions=batch.completions.replace(tokens=np.broadcast_to(rows, MASK.shape).copy()))
    return gradients(make_grpo_loss(logprobs_fn, config), {"scale": jnp.ones(())}, {}, batch, KEY, microbatches)[1]


RAISED = [[np.log(1.1)] * 2 + [np.nan] * 2, [np.log(1.05)] * 4]  # ratios 1.1 and 1.05; what follows the end is not read


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # Advantages .5 and -.5: losses per token -.55 (2 of them) and .525 (4 of them).
        ("tokens", (-1.1 + 2.1) / 6),
        ("sequences", (-0.55 + 0.525) / 2),
        ("columns", (-1.1 + 2.1) / 8),
    ],
)
def test_reductions_by_hand(reduction, expected, microbatches):
    actual = measured(GRPOConfig(advantages="centred", reduction=reduction), RAISED, microbatches=microbatches)
    assert float(actual["loss"].value()) == pytest.approx(expected, abs=1e-6)
    assert float(actual["ratio"].value()) == pytest.approx((2.2 + 4.2) / 6, abs=1e-6)


def test_clipping_is_one_sided():
    """Ratio 1.5, clips .2 and .28: advantage .5 is held at 1.28, advantage -.5 is not."""
    logprobs = np.full((2, 4), np.log(1.5))
    actual = measured(GRPOConfig(advantages="centred", clip_high=0.28), logprobs)
    assert float(actual["loss"].value()) == pytest.approx((-0.5 * 1.28 * 2 + 0.5 * 1.5 * 4) / 6, abs=1e-6)
    assert float(actual["clip_fraction"].value()) == pytest.approx(2 / 6)


def test_gspo_ratio_is_the_geometric_mean():
    """Log ratios .1, -.05, .2: s = exp(.25 / 3) = 1.086904; their product 1.284025 is wrong. The other row is at 1."""
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    logprobs = [[0.1, -0.05, 0.2, np.nan], [0.0, np.nan, np.nan, np.nan]]
    config = GRPOConfig(advantages="centred", ratio="sequence", reduction="sequences")
    actual = measured(config, logprobs, mask=mask)
    assert float(actual["loss"].value()) == pytest.approx((-0.5 * 1.086904 + 0.5) / 2, abs=1e-6)


def test_gspo_counts_every_response_once():
    """Ratios 1.5 of two tokens and 1 of four, clips .2: mean ratio 1.25 and half the responses clipped. A mean over tokens
    would be 7 / 6 and 1 / 3."""
    config = GRPOConfig(advantages="centred", ratio="sequence", reduction="sequences")
    for microbatches in (1, 2):
        actual = measured(config, [[np.log(1.5)] * 4, [0.0] * 4], microbatches=microbatches)
        assert float(actual["ratio"].value()) == pytest.approx(1.25, abs=1e-6)
        assert float(actual["clip_fraction"].value()) == 0.5


def test_a_response_that_does_not_count_has_no_ratio():
    config = GRPOConfig(advantages="centred", ratio="sequence", reduction="sequences", mask_truncated=True)
    actual = measured(config, [[np.log(1.5)] * 4, [0.0] * 4], ended=[False, True])
    assert float(actual["ratio"].value()) == 1.0 and float(actual["ratio"].weight) == 1.0


def test_dual_clip_bounds_the_loss_of_a_bad_response():
    """Ratio 5, advantages .5 and -.5, clips .2, bound 3: -.5 x 1.2 on two tokens and .5 x 3 on four, not .5 x 5."""
    logprobs = np.full((2, 4), np.log(5.0))
    for dual_clip, worst in ((None, 2.5), (3.0, 1.5)):
        actual = measured(GRPOConfig(advantages="centred", dual_clip=dual_clip), logprobs)
        assert float(actual["loss"].value()) == pytest.approx((-0.6 * 2 + worst * 4) / 6, abs=1e-6)


def test_kl_in_the_loss_by_hand():
    """k3 of policy 0 against reference .2 at every token: e^.2 - .2 - 1 = .021403, coefficient .04."""
    config = GRPOConfig(advantages="centred", kl_coefficient=0.04, kl_kind="k3")
    reference = np.full((2, 4), 0.2)
    actual = measured(config, np.zeros((2, 4)), reference=reference)
    assert float(actual["loss/kl"].value()) == pytest.approx(0.021403, abs=1e-6)
    assert float(actual["loss"].value()) == pytest.approx((-0.5 * 2 + 0.5 * 4) / 6 + 0.04 * 0.021403, abs=1e-6)


def test_kl_in_the_reward_by_hand():
    """RLOO: scores 1 and 0 minus .1 x summed k1, .3 x 2 = .6 and .3 x 4 = 1.2: .94 and -.12, advantages +-1.06."""
    config = GRPOConfig(advantages="leave_one_out", kl_in="reward", kl_coefficient=0.1)
    batch, metrics = prepare_groups(rollout([1, 0], reference=np.full((2, 4), -0.3)), config, 2)
    assert batch.advantages.tolist() == pytest.approx([1.06, -1.06], abs=1e-6)
    assert float(metrics["kl"].value()) == pytest.approx((0.6 + 1.2) / 2, abs=1e-6)
    assert "loss/kl" not in measured(config, np.zeros((2, 4)), reference=np.full((2, 4), -0.3))


def test_untrained_responses_count_nowhere():
    """Row 0 was cut: only row 1's four tokens count, in every reduction; TRL counted the cut ones too (its issue 6439)."""
    for reduction, expected in (("tokens", 0.525), ("sequences", 0.525), ("columns", 0.525)):
        config = GRPOConfig(advantages="centred", mask_truncated=True, reduction=reduction)
        actual = measured(config, RAISED, ended=[False, True])
        assert float(actual["loss"].value()) == pytest.approx(expected, abs=1e-6), reduction


def test_trl_divides_by_the_responses_that_were_cut_too():
    """As above with divisor "all": the mean .525 of row 1 over two responses; its sum 2.1 over 2 x 4 columns."""
    for reduction, expected in (("sequences", 0.525 / 2), ("columns", 2.1 / 8)):
        config = GRPOConfig(advantages="centred", mask_truncated=True, reduction=reduction, divisor="all")
        for microbatches in (1, 2):
            actual = measured(config, RAISED, ended=[False, True], microbatches=microbatches)
            assert float(actual["loss"].value()) == pytest.approx(expected, abs=1e-6), reduction


@pytest.mark.parametrize(
    ("reduction", "divisor", "expected"),
    [
        ("sequences", "all", 1.0),
        ("columns", "all", 10 / 24),
        ("sequences", "trained", 1.5),
        ("tokens", "all", 10 / 6),
    ],
)
def test_reduced_by_hand(reduction, divisor, expected):
    values, mask = np.zeros((3, 8), np.float32), np.zeros((3, 8), bool)
    values[0, :2], values[1, :4], mask[0, :2], mask[1, :4] = 1, 2, True, True
    counts = jnp.array([True, True, False])
    term = reduced(jnp.asarray(values), jnp.asarray(mask), counts, reduction, 1.0, divisor)
    assert float(term.total / term.weight) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("reduction", "divisor"), [("token", "all"), ("columns", "rows")])
def test_unknown_reductions_are_refused(reduction, divisor):
    with pytest.raises(InputError, match="one of"):
        reduced(jnp.ones((1, 2)), jnp.ones((1, 2), bool), jnp.ones(1, bool), reduction, 1.0, divisor)


def test_zero_variance_groups_are_dropped_on_request():
    mask = np.ones((4, 2), bool)
    for drop in (False, True):
        config = GRPOConfig(drop_zero_variance_groups=drop)
        batch, metrics = prepare_groups(rollout([1, 1, 0, 1], mask=mask), config, 2)
        assert float(metrics["zero_variance_groups"].value()) == 0.5
        assert batch.counts.tolist() == [not drop, not drop, True, True]
        assert batch.advantages[:2].tolist() == [0.0, 0.0] and batch.advantages[3] > 0.7


@pytest.mark.parametrize("bad", ["score", "kl", "too far"])
def test_a_rollout_that_is_not_usable_is_refused(bad):
    scores = [np.nan, 0.0] if bad == "score" else [1.0, 0.0]
    reference = np.full((2, 4), {"kl": np.inf, "too far": -1.0, "score": 0.0}[bad])
    config = GRPOConfig(kl_coefficient=0.1, max_kl=2.5)  # "too far": (2 + 4) / 2 = 3 nats
    batch, metrics = prepare_groups(rollout(scores, reference=reference), config, 2)
    assert float(metrics["rollout_refused"].value()) == 1.0 and np.isnan(batch.advantages).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"advantages": "mean"}, "GRPOConfig.advantages = 'mean': one of 'standardised'"),
        ({"ratio": "sequence"}, "needs reduction = 'sequences'"),
        ({"divisor": "all"}, "GRPOConfig.divisor = 'all': reduction = 'tokens' divides by tokens"),
        ({"divisor": "rows", "reduction": "columns"}, "GRPOConfig.divisor = 'rows': one of 'trained', 'all'"),
        ({"max_kl": 1.0}, "GRPOConfig.max_kl: without kl_coefficient"),
        ({"minibatches": 0}, "GRPOConfig.minibatches = 0: give a whole number >= 1"),
        ({"kl_coefficient": float("nan")}, "GRPOConfig.kl_coefficient = nan: give a number >= 0.0"),
        ({"dual_clip": 0.5}, "GRPOConfig.dual_clip = 0.5: give a number >= 1.0"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        GRPOConfig(**fields)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Scores 1, 0, 0 beside a failure: mean 1/3, deviation sqrt(1/3) = .577350; 2/3 / .577350 = 1.154701.
        ("standardised", [1.154701, 0.0, -0.577350, -0.577350]),
        ("centred", [2 / 3, 0.0, -1 / 3, -1 / 3]),
        ("leave_one_out", [1.0, 0.0, -0.5, -0.5]),
    ],
)
def test_advantages_among_those_that_have_a_score(kind, expected):
    scores, scored = jnp.float32([1, 77, 0, 0, 5, 77, 77, 77]), jnp.array([True, False, True, True, True] + [False] * 3)
    advantages = group_advantages(scores, 4, kind=kind, epsilon=0.0, scored=scored)
    np.testing.assert_allclose(advantages, [*expected, 0, 0, 0, 0], atol=1e-6)  # one alone has nothing to compare with
    all_there = group_advantages(scores, 4, kind=kind, scored=jnp.ones(8, bool))
    np.testing.assert_allclose(all_there, group_advantages(scores, 4, kind=kind), rtol=1e-6)


def test_an_unscored_response_is_not_trained_on():
    whole = rollout([1.0, 77.0, 0.0, 0.5], mask=np.ones((4, 2), bool))
    scored = dataclasses.replace(whole, scored=jnp.array([True, False, True, True]))
    batch, metrics = prepare_groups(scored, GRPOConfig(advantages="centred"), 4)
    np.testing.assert_allclose(batch.advantages, [0.5, 0.0, -0.5, 0.0], atol=1e-6)
    assert batch.counts.tolist() == [True, False, True, True]
    values = {name: float(mean.value()) for name, mean in metrics.items()}
    assert values["score"] == pytest.approx(0.5) and values["trained_responses"] == 0.75
    assert values["score_within"] == pytest.approx(0.5) and values["zero_variance_groups"] == 0.0
    alone = dataclasses.replace(whole, scored=jnp.array([True, False, False, False]))
    batch, metrics = prepare_groups(alone, GRPOConfig(), 4)
    assert not batch.advantages.any() and float(metrics["zero_variance_groups"].value()) == 1.0
    assert float(metrics["score_within"].weight) == 0.0 and float(metrics["rollout_refused"].value()) == 0.0
