"""From a scored rollout to advantages: conventions, penalties, whitening and the numbers reported of it."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import ops
from rlhf_jax.errors import InputError
from rlhf_jax.learn import PPOConfig, next_kl_coefficient, prepare, warn_if_kl_is_negative
from rlhf_jax.rundir import fetch
from rlhf_jax.testing import completions, prompt_batch
from rlhf_jax.types import Rollout

PLAIN = PPOConfig(whiten_advantages="none", missing_eos_penalty=None, kl_coefficient=0.05)
LOGP, REF = [-1.0, -0.5, -2.0, -0.2], [-1.2, -0.4, -2.5, -0.1]
VALUES = [0.1, 0.2, 0.3, 0.4, 0.5]


def padded(numbers, length=5, outside=np.nan):
    return np.float32([*numbers, *[outside] * (length - len(numbers))])


def rollout_of(responses, scores, *, logprobs=None, ref=None, values=None, length=5, sampled=None, pad_id=0) -> Rollout:
    """Rows of numbers per response; what lies outside is NaN, except in ``values`` (the scorer leaves numbers there)."""
    outcome = completions(
        prompt_batch([[5]] * len(responses)), responses, length=length, pad_id=pad_id, logprobs=sampled
    )
    zeros = [[0.0] * len(row) for row in responses]
    stack = functools.partial(np.stack, axis=0)
    return Rollout(
        completions=outcome,
        logprobs=stack([padded(row, length) for row in logprobs or zeros]),
        ref_logprobs=stack([padded(row, length) for row in ref or zeros]),
        values=stack([padded(row, length, 0.0) for row in values or zeros]),
        scores={"gold": np.asarray(scores, np.float32)},
        scored=np.ones(len(responses), bool),
    )


def example(responses=((7, 8, 9, 2),), scores=(2.0,), **changes):
    return rollout_of(responses, scores, logprobs=[LOGP], ref=[REF], values=[VALUES], **changes)


ORACLES = {  # one response of 4 tokens in 5 columns, beta .05, score 2, discount 1, lam .95
    "eos": ([1.633524, 1.624762, 1.599750, 1.605000, 0.0], [1.733524, 1.824762, 1.899750, 2.005000, 0.0], 4),
    "after_eos": ([1.569221, 1.557075, 1.528500, 1.530000, 0.0], [1.669221, 1.757075, 1.828500, 1.930000, 2.0], 5),
    "last_column": ([1.569221, 1.557075, 1.528500, 1.530000, 0.0], [1.669221, 1.757075, 1.828500, 1.930000, 2.0], 5),
}


@pytest.mark.parametrize("terminal", ORACLES)
def test_three_conventions(terminal):
    """Advantages belong to the policy's tokens only; returns and the value mask reach one column further after EOS."""
    advantages, returns, columns = ORACLES[terminal]
    config = PPOConfig(terminal=terminal, whiten_advantages="none")
    batch, metrics = prepare(example(), config, jnp.asarray(0.05))
    np.testing.assert_allclose(batch.advantages, [advantages], atol=2e-6)
    np.testing.assert_allclose(batch.returns, [returns], atol=2e-6)
    assert batch.value_mask.sum() == columns and batch.completions.mask.sum() == 4
    np.testing.assert_allclose(batch.old_values, [VALUES[:columns] + [0.0] * (5 - columns)], atol=1e-7)
    assert float(metrics["kl"].value()) == pytest.approx(0.5, abs=1e-6)
    assert float(metrics["kl_per_token"].value()) == pytest.approx(0.125, abs=1e-6)
    assert float(metrics["score_shaped"].value()) == pytest.approx(2 - 0.05 * 0.5, abs=1e-6)


def test_a_response_without_room_after_its_end():
    """Four columns: the score of "after_eos" lands on the end token, as under "eos"."""
    four = {"logprobs": [LOGP], "ref": [REF], "values": [VALUES[:4]], "length": 4}
    rollout = rollout_of([(7, 8, 9, 2)], [2.0], **four)
    results = [
        prepare(rollout, PPOConfig(terminal=terminal, whiten_advantages="none"), jnp.asarray(0.05))[0]
        for terminal in ("eos", "after_eos", "last_column")
    ]
    for batch in results:
        np.testing.assert_allclose(batch.advantages, [ORACLES["eos"][0][:4]], atol=2e-6)
        assert batch.value_mask.all()


@pytest.mark.parametrize(
    ("kind", "penalties"),
    [
        ("k1", [0.2, -0.1, 0.5, -0.1]),
        ("k2", [0.02, 0.005, 0.125, 0.005]),
        ("k3", [0.018731, 0.005171, 0.106531, 0.005171]),
    ],
)
def test_kl_estimators_in_the_reward(kind, penalties):
    """d = .2, -.1, .5, -.1; values 0 and lam 1: the return of a token is what is still to come."""
    config = PPOConfig(kl_kind=kind, biased_kl=True, lam=1.0, whiten_advantages="none")
    rollout = rollout_of([(7, 8, 9, 2)], [2.0], logprobs=[LOGP], ref=[REF])
    batch, metrics = prepare(rollout, config, jnp.asarray(0.1))
    expected = 2 - 0.1 * np.cumsum(penalties[::-1])[::-1]
    np.testing.assert_allclose(batch.returns[0, :4], expected, atol=2e-6)
    assert float(metrics["kl"].value()) == pytest.approx(0.5, abs=1e-6)  # reported as k1 whatever is paid


CUT, ENDED = (7, 8, 9), (7, 2)


@pytest.mark.parametrize(
    ("changes", "paid"),
    [
        ({"missing_eos_penalty": None}, [1.5, 1.5]),
        ({"missing_eos_penalty": 1.0, "missing_eos": "replace"}, [1.5, -1.0]),
        ({"missing_eos_penalty": 1.0, "missing_eos": "subtract"}, [1.5, 0.5]),
        ({"missing_eos_penalty": 0.0, "missing_eos": "replace"}, [1.5, 0.0]),  # 0 is a penalty, None is none
        ({"missing_eos_penalty": None, "score_clip": 0.5}, [0.5, 0.5]),
        ({"missing_eos_penalty": 2.0, "missing_eos": "replace", "score_clip": 0.5}, [0.5, -2.0]),
        ({"missing_eos_penalty": 2.0, "missing_eos": "subtract", "score_clip": 0.5}, [0.5, -1.5]),
    ],
)
def test_penalty_and_clip(changes, paid):
    config = PPOConfig(**{"whiten_advantages": "none", "lam": 1.0, **changes})
    batch, metrics = prepare(rollout_of([ENDED, CUT], [1.5, 1.5]), config, jnp.asarray(0.0))
    np.testing.assert_allclose(batch.returns[:, 0], paid)
    assert float(metrics["score"].value()) == 1.5 and float(metrics["ended"].value()) == 0.5
    assert float(metrics["score_shaped"].value()) == pytest.approx(np.mean(paid))


def test_fractions_and_zeros_are_paid():
    """A buffer of the tokens' integer type would make .7 a 0; a test for truth would drop a score of 0."""
    batch, _ = prepare(rollout_of([ENDED, ENDED], [0.7, 0.0]), PLAIN, jnp.asarray(0.0))
    np.testing.assert_allclose(batch.returns[:, 1], [0.7, 0.0])
    assert batch.returns.dtype == batch.advantages.dtype == jnp.float32
    zero, _ = prepare(rollout_of([ENDED, CUT], [0.0, 0.0]), PLAIN, jnp.asarray(0.0))
    assert (zero.returns == 0.0).all()


def test_pad_and_end_may_be_the_same_token():
    """The score sits on the sampled end token, not before it, although everything after it is that token too."""
    rollout = rollout_of([(7, 8, 2)], [0.7], pad_id=2)
    assert rollout.completions.tokens.tolist() == [[7, 8, 2, 2, 2]]
    config = PPOConfig(whiten_advantages="none", lam=0.0)
    batch, _ = prepare(rollout, config, jnp.asarray(0.0))
    np.testing.assert_allclose(batch.returns, [[0.0, 0.0, 0.7, 0.0, 0.0]])
    assert batch.value_mask.tolist() == [[True, True, True, False, False]]


def two_rows():
    """Four counted tokens with advantages 1, 2, 3, 4 (lam 1, values chosen so)."""
    return rollout_of([(7, 2), (8, 2)], [5.0, 5.0], values=[[4.0, 3.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [(0, [-1.341641, -0.447214, 0.447214, 1.341641]), (1, [-1.161895, -0.387298, 0.387298, 1.161895])],
)
def test_advantages_are_whitened_over_the_whole_rollout(ddof, expected):
    config = PPOConfig(lam=1.0, whiten_ddof=ddof)
    batch, _ = prepare(two_rows(), config, jnp.asarray(0.0))
    np.testing.assert_allclose(batch.advantages[:, :2].reshape(-1), expected, atol=1e-5)
    np.testing.assert_array_equal(batch.advantages[:, 2:], 0.0)
    np.testing.assert_allclose(batch.returns[:, :2], 5.0)  # of the advantages before whitening
    for scope in ("none", "minibatch"):  # the latter is done where minibatches are cut
        raw, _ = prepare(two_rows(), PPOConfig(lam=1.0, whiten_advantages=scope), jnp.asarray(0.0))
        np.testing.assert_allclose(raw.advantages[:, :2], [[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize("terminal", ["after_eos", "last_column"])
def test_advantages_are_whitened_over_the_policys_tokens_only(terminal):
    """The column behind the end has an advantage for the value function's sake; it is nobody's token and no statistic."""
    batch, _ = prepare(example(), PPOConfig(terminal=terminal), jnp.asarray(0.05))
    raw = np.array(ORACLES[terminal][0][:4])
    np.testing.assert_allclose(batch.advantages[0], [*(raw - raw.mean()) / raw.std(), 0.0], atol=1e-4)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("terminal", ["eos", "after_eos", "last_column"])
def test_rewards_are_scaled_and_keep_their_mean(terminal, ddof):
    """Statistics over every column where rewards exist, the one behind the end included, with the variance asked for."""
    config = PPOConfig(whiten_rewards=True, whiten_advantages="none", whiten_ddof=ddof, lam=1.0, terminal=terminal)
    batch, metrics = prepare(example(), config, jnp.asarray(0.05))
    rewards = np.array([-0.01, 0.005, -0.025, 2.005] if terminal == "eos" else [-0.01, 0.005, -0.025, 0.005, 2.0])
    scaled = (rewards - rewards.mean()) / rewards.std(ddof=ddof) + rewards.mean()
    np.testing.assert_allclose(batch.returns[0, : len(rewards)], np.cumsum(scaled[::-1])[::-1], atol=1e-4)
    assert float(metrics["score_shaped"].value()) == pytest.approx(rewards.sum(), abs=1e-4)


def test_reported_numbers():
    sampled = np.float32([[-1.0, -0.5, -2.1, -0.2, 0.0], [-0.3, -0.4, 0.0, 0.0, 0.0]])
    rollout = rollout_of(
        [(7, 8, 9, 2), (7, 8)], [2.0, 1.0], logprobs=[LOGP, [-0.3, -0.8]], ref=[REF, [-0.3, -0.8]],
        values=[VALUES, [0.0, 1.0]], sampled=sampled,
    )  # fmt: skip
    config = PPOConfig(lam=1.0, missing_eos_penalty=None, whiten_advantages="none")
    _, metrics = prepare(rollout, config, jnp.asarray(0.0))
    returns, values = np.array([2, 2, 2, 2, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.0, 1.0])
    expected = {
        "score": 1.5, "score_std": 0.5, "kl": 0.25, "kl_per_token": 0.5 / 6,
        "kl_standard_error": 0.25,  # of 0.5 and 0: deviation sqrt(2) / 4, over sqrt(2)
        "sampled_entropy": (3.7 + 1.1) / 2,
        "sampler_gap": (0.1 + 0.4) / 6, "sampler_gap_max": 0.4,
        "response_length": 3.0, "ended": 0.5, "value": values.mean(), "return": returns.mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
    }  # fmt: skip
    for name, value in expected.items():
        assert float(metrics[name].value()) == pytest.approx(value, abs=1e-5), name
    assert set(metrics) == {*expected, "score_shaped", "rollout_refused"}
    assert float(metrics["rollout_refused"].value()) == 0.0


def test_what_is_reported_of_values_is_over_their_own_mask():
    """Under "after_eos" the column behind the end has a value and a return: five of each for four tokens."""
    _, metrics = prepare(example(), PPOConfig(terminal="after_eos"), jnp.asarray(0.05))
    returns, values = np.array(ORACLES["after_eos"][1]), np.array(VALUES)
    expected = {
        "value": 0.3,
        "return": returns.mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
    }
    for name, value in expected.items():
        assert float(metrics[name].value()) == pytest.approx(value, abs=1e-5), name
    assert float(metrics["value"].weight) == 5 and float(metrics["response_length"].value()) == 4


def test_the_old_log_probabilities_are_the_scorers():
    """The update is compared with the scorer's own program; the sampler's numbers differ by rounding."""
    sampled = np.float32([[-1.1, -0.6, -2.1, -0.3, 0.0]])
    batch, _ = prepare(example(sampled=sampled), PLAIN, jnp.asarray(0.05))
    np.testing.assert_array_equal(batch.old_logprobs[0, :4], np.float32(LOGP))


def test_the_discount_is_the_configurations():
    """Score 1 at the third token, discount .5, lam 1, values 0: returns .25, .5, 1. lam .5, discount 1: the same."""
    rollout = rollout_of([(7, 8, 2)], [1.0])
    for fields in ({"discount": 0.5, "lam": 1.0}, {"discount": 1.0, "lam": 0.5}):
        batch, _ = prepare(rollout, PPOConfig(whiten_advantages="none", **fields), jnp.asarray(0.0))
        np.testing.assert_allclose(batch.returns[0, :3], [0.25, 0.5, 1.0])
    # Values 1: discount .5, lam 1: 1 + .25 - 1 ...; the two are told apart by what a value costs.
    valued = rollout_of([(7, 2)], [1.0], values=[[1.0, 1.0]])
    halved, _ = prepare(valued, PPOConfig(whiten_advantages="none", discount=0.5, lam=1.0), jnp.asarray(0.0))
    np.testing.assert_allclose(halved.advantages[0, :2], [-0.5, 0.0])  # .5 * 1 - 1 + .5 * 0


def test_scores_are_clipped_on_both_sides():
    config = PPOConfig(whiten_advantages="none", lam=1.0, score_clip=0.5)
    batch, _ = prepare(rollout_of([ENDED, ENDED], [-3.0, 3.0]), config, jnp.asarray(0.0))
    np.testing.assert_allclose(batch.returns[:, 0], [-0.5, 0.5])


def test_nothing_outside_the_masks_is_read():
    """NaN stands outside the response in every test here; values there are numbers, and any numbers will do."""
    clean, wild = example(), example()
    wild = wild.replace(values=np.where(wild.completions.mask, wild.values, 77.0))
    first, second = (prepare(rollout, PPOConfig(), jnp.asarray(0.05)) for rollout in (clean, wild))
    for a, b in ((first[0].advantages, second[0].advantages), (first[0].returns, second[0].returns)):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_adaptive_controller():
    """Coefficient .15, 512 episodes, target 6, horizon 1e4: the nudge is clipped at 20 % of 512 / 10000."""
    config = PPOConfig(kl_target=6.0, kl_horizon=1e4, kl_coefficient=0.15)
    for kl, expected in ((0.0, 0.148464), (12.0, 0.151536), (6.6, 0.150768), (6.0, 0.15)):
        actual = next_kl_coefficient(config, jnp.asarray(0.15), jnp.asarray(kl), 512)
        assert float(actual) == pytest.approx(expected, abs=1e-6)
    fixed = next_kl_coefficient(PPOConfig(), jnp.asarray(0.15), jnp.asarray(99.0), 512)
    assert float(fixed) == pytest.approx(0.15)


def test_the_score_after_whitening_is_the_rollouts_own():
    """ops.whiten on the same numbers: prepare adds nothing of its own."""
    batch, _ = prepare(two_rows(), PPOConfig(lam=1.0), jnp.asarray(0.0))
    raw, _ = prepare(two_rows(), PPOConfig(lam=1.0, whiten_advantages="none"), jnp.asarray(0.0))
    np.testing.assert_array_equal(batch.advantages, ops.whiten(raw.advantages, raw.completions.mask))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("minibatches", 1.0), ("clip_low", -0.1), ("clip_high", "0.2"), ("dual_clip", 0.5),
        ("value_clip", -1.0), ("discount", 1.1), ("lam", float("nan")), ("kl_coefficient", -0.1), ("kl_kind", "k4"),
        ("kl_kind", "weighted_k3"), ("biased_kl", "yes"),
        ("kl_target", 0.0), ("kl_horizon", 0), ("terminal", "end"), ("missing_eos_penalty", -1.0),
        ("missing_eos", "multiply"), ("whiten_rewards", "False"), ("whiten_advantages", "batch"), ("whiten_ddof", 2),
        ("score_clip", True), ("max_sampler_gap", None),
    ],
)  # fmt: skip
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"PPOConfig\.{field} = ") as error:
        PPOConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["scores", "logprobs", "ref_logprobs", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_rollout_with_one_bad_number_is_not_learned_from(where, bad):
    """One bad number in row 0: no row of the rollout may be learned from, in whichever minibatch."""
    rollout = two_rows()
    field = getattr(rollout, where)
    array = np.array(field["gold"] if where == "scores" else field)
    array[(0,) * array.ndim] = bad
    changed = {"gold": array} if where == "scores" else array
    for whiten in ("rollout", "none"):
        batch, metrics = prepare(
            rollout.replace(**{where: changed}), PPOConfig(whiten_advantages=whiten), jnp.asarray(0.05)
        )
        assert float(metrics["rollout_refused"].value()) == 1.0
        assert np.isnan(batch.advantages).all()


def test_a_kl_beyond_the_limit_is_not_learned_from():
    """The example's KL is 0.2 - 0.1 + 0.5 - 0.1 = 0.5 nats."""
    for limit, refused in ((0.49, True), (0.51, False), (None, False)):
        batch, metrics = prepare(example(), PPOConfig(max_kl=limit), jnp.asarray(0.05))
        assert bool(metrics["rollout_refused"].value()) == refused == bool(np.isnan(batch.advantages).all())


def test_the_controller_stands_still_when_the_kl_is_no_number():
    config = PPOConfig(kl_target=6.0)
    assert float(next_kl_coefficient(config, jnp.float32(0.1), jnp.float32(jnp.nan), 16)) == pytest.approx(0.1)


def one_token_kl(tokens):
    """(kl, standard error) of one-token responses drawn from a policy (.5, .3, .2) whose reference is (.6, .25, .15)."""
    policy, reference = np.log([0.5, 0.3, 0.2]), np.log([0.6, 0.25, 0.15])
    logprobs, ref = ([[row[token]] for token in tokens] for row in (policy, reference))
    rollout = rollout_of([(7,)] * len(tokens), [0.0] * len(tokens), logprobs=logprobs, ref=ref, length=1)
    measured = fetch(prepare(rollout, PLAIN, jnp.asarray(0.0))[1])
    return measured["kl"], measured["kl_standard_error"]


def test_a_negative_kl_beyond_noise_is_told(capsys):
    """The samples of the policy estimate its KL of 0.021; cut down to its two likeliest tokens (.625, .375) the same
    estimator has the mean .625 log(.5/.6) + .375 log(.3/.25) = -0.0456, which is no KL."""
    draw = np.random.default_rng(0)
    kl, error = one_token_kl(draw.choice(3, 2000, p=[0.5, 0.3, 0.2]))
    assert kl == pytest.approx(0.021, abs=3 * error) and not warn_if_kl_is_negative(7, kl, error)
    assert capsys.readouterr().err == ""
    kl, error = one_token_kl(draw.choice(2, 2000, p=[0.625, 0.375]))
    assert kl == pytest.approx(-0.0456, abs=3 * error) and warn_if_kl_is_negative(7, kl, error)
    message = capsys.readouterr().err
    assert (
        message.startswith("warning: step 7: the KL to the reference is estimated as -0.0") and message.count("\n") == 1
    )
    assert "top_k" in message and "lower the kl_coefficient" in message


@pytest.mark.parametrize(
    ("kl", "error", "warned"),
    [(-0.29, 0.1, False), (-0.31, 0.1, True), (-5e-4, 0.0, False), (-2e-3, 0.0, True), (None, None, False)],
)
def test_noise_is_three_standard_errors_and_rounding(kl, error, warned):
    assert warn_if_kl_is_negative(1, kl, error) is warned


def test_a_single_response_has_no_standard_error():
    assert fetch(prepare(example(), PLAIN, jnp.asarray(0.0))[1])["kl_standard_error"] is None


def test_an_unscored_response_counts_nowhere():
    """Whatever its numbers are, the others' rows and every metric are those of a rollout without it."""
    three = {"logprobs": [LOGP, [-0.3, -0.6], LOGP[:3]], "ref": [REF, [-0.9, -0.1], REF[:3]]}
    whole = rollout_of([(7, 8, 9, 2), (7, 2), (8, 8, 2)], [2.0, 77.0, 1.0], values=[VALUES] * 3, **three)
    two = {name: [rows[0], rows[2]] for name, rows in three.items()}
    without = rollout_of([(7, 8, 9, 2), (8, 8, 2)], [2.0, 1.0], values=[VALUES] * 2, **two)
    marked = dataclasses.replace(whole, scored=np.array([True, False, True]))
    for terminal in ORACLES:
        config = PPOConfig(terminal=terminal, whiten_rewards=True)
        batch, metrics = prepare(marked, config, jnp.asarray(0.05))
        target, expected = prepare(without, config, jnp.asarray(0.05))
        assert not (batch.completions.mask[1].any() or batch.value_mask[1].any() or batch.advantages[1].any())
        for name in ("advantages", "returns", "value_mask"):
            np.testing.assert_allclose(getattr(batch, name)[np.array([0, 2])], getattr(target, name), atol=1e-6)
        for name, value in fetch(expected).items():
            assert fetch(metrics)[name] == pytest.approx(value, abs=1e-6), name
