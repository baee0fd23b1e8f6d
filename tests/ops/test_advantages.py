from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.ops import (
    gae,
    kl_estimate,
    penalise_missing_eos,
    shape_rewards,
    terminal_index,
    terminal_mask,
    value_mask,
    whiten,
)

NAN = float("nan")


def slow_gae(rewards, values, mask, discount, lam):
    """Float64, straight from the definition as a double sum over the counted tokens of each row."""
    advantages = np.zeros(rewards.shape)
    for row in range(rewards.shape[0]):
        columns = np.flatnonzero(mask[row])
        r = np.asarray(rewards[row], np.float64)[columns]
        v = np.append(np.asarray(values[row], np.float64)[columns], 0.0)
        deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(len(columns))]
        for t, column in enumerate(columns):
            advantages[row, column] = sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, len(columns)))
    return advantages, np.where(mask, advantages + np.where(mask, values, 0.0), 0.0)


def test_gae_hand_numbers():
    # A_2 = 1 - .7 = .3; A_1 = .7 - .6 + .95 * .3 = .385; A_0 = .6 - .5 + .95 * .385 = .46575
    advantages, returns = gae(
        jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.6, 0.7]]), jnp.ones((1, 3), bool), discount=1.0, lam=0.95
    )
    np.testing.assert_allclose(advantages, [[0.46575, 0.385, 0.3]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.96575, 0.985, 1.0]], atol=1e-6)


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_definition(discount, lam):
    # uniform(20, 40) as in vwxyzjn/lm-human-preference-details @ ccc1953, tests/test_gae.py; masks with holes here
    rng = np.random.default_rng(0)
    rewards, values = rng.uniform(20, 40, (2, 6, 9)).astype(np.float32)
    mask = rng.random((6, 9)) < 0.7
    mask[0], mask[1] = True, False
    expected = slow_gae(rewards, values, mask, discount, lam)
    dirty = (jnp.asarray(np.where(mask, x, NAN)) for x in (rewards, values))
    actual = jax.jit(gae, static_argnames=("discount", "lam"))(*dirty, jnp.asarray(mask), discount=discount, lam=lam)
    for own, slow in zip(actual, expected, strict=True):
        assert own.dtype == jnp.float32
        np.testing.assert_allclose(own, slow, rtol=2e-5, atol=1e-4)


def test_lam_one_returns_are_rewards_to_go():
    rewards = jnp.array([[1.0, -2.0, 0.5, 3.0]])
    values = jnp.array([[9.0, -4.0, 2.0, 7.0]])
    _, returns = gae(rewards, values, jnp.ones((1, 4), bool), discount=1.0, lam=1.0)
    np.testing.assert_allclose(returns, [[2.5, 1.5, 3.5, 3.0]], atol=1e-6)


def test_zero_values_give_the_discounted_lambda_return():
    # a value head that starts at zero: R_t = sum_k (discount lam)^(k - t) r_k; .9 * .5 = .45
    rewards = jnp.array([[1.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, jnp.zeros((1, 3)), jnp.ones((1, 3), bool), discount=0.9, lam=0.5)
    np.testing.assert_allclose(returns, [[1 + 0.45 * 2 + 0.2025 * 4, 2 + 0.45 * 4, 4.0]], rtol=1e-6)
    np.testing.assert_array_equal(advantages, returns)


def test_inserted_masked_tokens_change_nothing():
    plain = gae(
        jnp.array([[0.1, -0.2, 1.0]]), jnp.array([[0.5, 0.6, 0.7]]), jnp.ones((1, 3), bool), discount=0.9, lam=0.8
    )
    mask = jnp.array([[True, False, False, True, True, False]])
    tools = gae(
        jnp.array([[0.1, 50.0, NAN, -0.2, 1.0, 70.0]]),
        jnp.array([[0.5, NAN, 60.0, 0.6, 0.7, 80.0]]),
        mask,
        discount=0.9,
        lam=0.8,
    )
    for with_tools, without in zip(tools, plain, strict=True):
        np.testing.assert_array_equal(with_tools[:, [0, 3, 4]], without)
        np.testing.assert_array_equal(with_tools[:, [1, 2, 5]], 0.0)


def test_gradients_through_gae_stay_inside_the_mask():
    mask = jnp.array([[True, True, False]])

    def total(values):
        return gae(jnp.array([[0.0, 1.0, NAN]]), values, mask, discount=1.0, lam=0.95)[0].sum()

    gradient = jax.grad(total)(jnp.array([[0.5, 0.6, NAN]]))
    # A_0 + A_1 = (V_1 - V_0) + 1.95 (1 - V_1): gradient [-1, 1 - 1.95]
    np.testing.assert_allclose(gradient, [[-1.0, -0.95, 0.0]], atol=1e-6)


LOGP, REF = jnp.array([[-1.0, -0.5, -2.0, -0.2, 0.0]]), jnp.array([[-1.2, -0.4, -2.5, -0.1, 0.0]])
VALUES = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5]])
FOUR_OF_FIVE = jnp.array([[True, True, True, True, False]])


def advantages_under(convention, logp=LOGP, values=VALUES):
    kl = kl_estimate(logp, REF, "k1")
    rewards = shape_rewards(jnp.array([2.0]), kl, FOUR_OF_FIVE, kl_coefficient=0.05, convention=convention)
    mask = value_mask(FOUR_OF_FIVE, convention)
    return rewards, gae(rewards, values, mask, discount=1.0, lam=0.95)


def test_score_paid_at_the_end_token():
    # kl [.2, -.1, .5, -.1], sum .5; rewards -.05 kl with 2 added on column 3
    np.testing.assert_allclose(jnp.where(FOUR_OF_FIVE, kl_estimate(LOGP, REF), 0.0).sum(), 0.5, atol=1e-6)
    rewards, (advantages, returns) = advantages_under("eos")
    np.testing.assert_allclose(rewards, [[-0.01, 0.005, -0.025, 2.005, 0.0]], atol=1e-6)
    np.testing.assert_allclose(advantages, [[1.633524, 1.624762, 1.599750, 1.605000, 0.0]], atol=2e-6)
    np.testing.assert_allclose(returns, [[1.733524, 1.824762, 1.899750, 2.005000, 0.0]], atol=2e-6)


def test_score_paid_after_the_end_token():
    rewards, (advantages, returns) = advantages_under("after_eos")
    np.testing.assert_allclose(rewards, [[-0.01, 0.005, -0.025, 0.005, 2.0]], atol=1e-6)
    np.testing.assert_allclose(advantages, [[1.569221, 1.557075, 1.528500, 1.530000, 1.500000]], atol=2e-6)
    np.testing.assert_allclose(returns, [[1.669221, 1.757075, 1.828500, 1.930000, 2.000000]], atol=2e-6)


def test_score_paid_on_the_last_column():
    # a longer row: the two columns between the end token and the last one carry values and no reward
    mask = jnp.array([[True, True, False, False, False]])
    kl = jnp.array([[0.2, -0.1, NAN, NAN, NAN]])
    rewards = shape_rewards(jnp.array([2.0]), kl, mask, kl_coefficient=0.05, convention="last_column")
    np.testing.assert_allclose(rewards, [[-0.01, 0.005, 0.0, 0.0, 2.0]], atol=1e-6)
    grid = value_mask(mask, "last_column")
    assert grid.all()
    actual = gae(rewards, VALUES, grid, discount=1.0, lam=0.95)
    expected = slow_gae(np.asarray(rewards), np.asarray(VALUES), np.ones((1, 5), bool), 1.0, 0.95)
    for own, slow in zip(actual, expected, strict=True):
        np.testing.assert_allclose(own, slow, atol=2e-6)


@pytest.mark.parametrize("convention", ["eos", "after_eos"])
def test_garbage_in_padding_does_not_leak(convention):
    dirty_logp = LOGP.at[0, 4].set(NAN)
    dirty_values = VALUES.at[0, 4].set(NAN) if convention == "eos" else VALUES
    for clean, dirty in zip(
        jax.tree.leaves(advantages_under(convention)),
        jax.tree.leaves(advantages_under(convention, dirty_logp, dirty_values)),
        strict=True,
    ):
        np.testing.assert_array_equal(clean, dirty)


MASKS = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], bool)


@pytest.mark.parametrize(
    ("convention", "index"),
    [("eos", [1, 2, 3, -1, 2]), ("after_eos", [2, 3, 3, -1, 3]), ("last_column", [3, 3, 3, 3, 3])],
)
def test_terminal_columns(convention, index):
    assert terminal_index(MASKS, convention).tolist() == index
    one_hot = [[column == i for column in range(4)] for i in index]
    assert terminal_mask(MASKS, convention).tolist() == one_hot


def test_value_masks():
    assert (value_mask(MASKS, "eos") == MASKS).all()
    assert value_mask(MASKS, "after_eos").astype(int).tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 1, 1],
    ]
    assert value_mask(MASKS, "last_column").all()


def test_fractional_and_zero_scores_survive():
    # an integer buffer would truncate .7 to 0; `if score` would drop 0
    rewards = shape_rewards(jnp.array([0.7, 0.0]), jnp.zeros((2, 3)), jnp.ones((2, 3), bool), kl_coefficient=0.1)
    np.testing.assert_allclose(rewards, [[0.0, 0.0, 0.7], [0.0, 0.0, 0.0]])
    assert rewards.dtype == jnp.float32


def test_rewards_whitened_with_their_mean_kept():
    # rewards [-.01, .005, -.025, 2.005]: mean .49375, biased variance 1/4 sum r^2 - mean^2 = .761329
    rewards, _ = advantages_under("eos")
    whitened = whiten(rewards, FOUR_OF_FIVE, shift_mean=False)
    exact = np.array([-0.01, 0.005, -0.025, 2.005])
    expected = (exact - exact.mean()) / exact.std() + exact.mean()
    np.testing.assert_allclose(whitened[0, :4], expected, atol=1e-5)
    np.testing.assert_allclose(whitened[0, :4].mean(), 0.49375, atol=1e-6)
    assert whitened[0, 4] == 0.0


def test_missing_end_token_is_penalised():
    scores, ended = jnp.array([2.0, 2.0, -3.0]), jnp.array([True, False, False])
    assert penalise_missing_eos(scores, ended, penalty=1.0, mode="replace").tolist() == [2.0, -1.0, -1.0]
    assert penalise_missing_eos(scores, ended, penalty=1.0, mode="subtract").tolist() == [2.0, 1.0, -4.0]
    assert penalise_missing_eos(jnp.array([2, 2, 2]), ended, penalty=0.5, mode="replace").tolist() == [2.0, -0.5, -0.5]


def test_bad_names_and_signs_are_refused():
    with pytest.raises(InputError, match="'end'"):
        terminal_index(MASKS, "end")
    with pytest.raises(InputError, match="'multiply'"):
        penalise_missing_eos(jnp.zeros(1), jnp.ones(1, bool), penalty=1.0, mode="multiply")
    with pytest.raises(InputError, match=r"penalty=-1\.0"):
        penalise_missing_eos(jnp.zeros(1), jnp.ones(1, bool), penalty=-1.0)
