"""Arguments that no function takes: each is an error that names argument and remedy when it is traced, never another number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn, ops
from rlhf_jax.errors import InputError
from rlhf_jax.learn import DPOConfig, GRPOConfig, OptimizerConfig, PPOConfig
from rlhf_jax.rollout import SamplingConfig, generate
from rlhf_jax.testing import prompt_batch, tiny_model
from rlhf_jax.types import Mean

ROW, TWO = jnp.zeros(2), jnp.zeros((2, 3))
COLUMN, MASK, SHARES = jnp.zeros((2, 1)), jnp.ones((2, 3), bool), jnp.full((2, 3), 0.5)
IDS, KEY, RBG = jnp.zeros(2, jnp.int32), jax.random.key(0), jax.random.key(0, impl="rbg")
KEYS = jax.random.split(KEY, 2)
POLICY = {"clip_low": 0.2, "clip_high": 0.2}
GREEDY = {"temperature": 0.0}

REFUSED = {
    "a preference loss by another name": (lambda: ops.preference_loss(ROW, beta=0.1, kind="dpo"), "kind = 'dpo': one of"),
    "robust to half the labels": (
        lambda: ops.preference_loss(ROW, beta=0.1, kind="robust", label_smoothing=0.5),
        r"label_smoothing = 0.5: give a share in \[0, 0.5\)",
    ),
    "smoothing that has no effect": (
        lambda: ops.preference_loss(ROW, beta=0.1, kind="ipo", label_smoothing=0.1),
        "0 with 'hinge' and 'ipo'",
    ),
    "no beta": (lambda: ops.preference_loss(ROW, beta=0.0, kind="ipo"), "beta = 0.0: give a number above 0"),
    "beta is not true": (lambda: DPOConfig(beta=True), "DPOConfig.beta = True: give a number"),
    "a weight that is text": (lambda: DPOConfig(sft_coefficient="much"), "DPOConfig.sft_coefficient = 'much': give"),
    "an unknown baseline": (lambda: ops.group_advantages(jnp.zeros(4), 2, kind="rloo"), "advantages = 'rloo': use"),
    "groups that do not divide": (lambda: ops.group_advantages(jnp.zeros(5), 2), r"\[5\] are no groups of samples = 2"),
    "grouped scores": (lambda: ops.group_advantages(COLUMN, 2), r"scores \[2, 1\] are no groups"),
    "a negative epsilon": (lambda: ops.group_advantages(jnp.zeros(4), 2, epsilon=-1.0), "epsilon = -1.0: give"),
    "scores in a column": (
        lambda: ops.shape_rewards(COLUMN, TWO, MASK, kl_coefficient=0.1),
        r"shape_rewards: scores \[2, 1\] beside \[2, 3\]: give shape \[2\]",
    ),
    "KL of other columns": (lambda: ops.shape_rewards(ROW, COLUMN, MASK, kl_coefficient=0.1), "give equal shapes"),
    "a KL that is paid": (lambda: ops.shape_rewards(ROW, TWO, MASK, kl_coefficient=-0.1), "kl_coefficient = -0.1: give"),
    "ends in a column": (lambda: ops.penalise_missing_eos(COLUMN, MASK[:, 0], penalty=1.0), "give equal shapes"),
    "values of one column more": (
        lambda: ops.gae(TWO, jnp.zeros((2, 4)), MASK, discount=1.0, lam=1.0),
        r"gae: rewards \[2, 3\], values \[2, 4\]",
    ),
    "a growing discount": (lambda: ops.gae(TWO, TWO, MASK, discount=1.1, lam=1.0), r"discount = 1.1: give a number in"),
    "lam that is no number": (lambda: ops.gae(TWO, TWO, MASK, discount=1.0, lam=float("nan")), "lam = nan: give"),
    "a dual clip that cuts good tokens": (
        lambda: ops.policy_loss(ROW, ROW, ROW, **POLICY, dual_clip=0.5),
        "policy_loss: dual_clip = 0.5: give a number >= 1.0",
    ),
    "a negative clip": (lambda: ops.policy_loss(ROW, ROW, ROW, clip_low=-0.1, clip_high=0.2), "clip_low = -0.1: give"),
    "one advantage for all": (lambda: ops.policy_loss(TWO, TWO, COLUMN, **POLICY), r"advantages \[2, 1\]: give equal"),
    "returns of other rows": (lambda: ops.value_loss(TWO, TWO, COLUMN, 0.2), r"returns \[2, 1\]: give equal"),
    "a negative value clip": (lambda: ops.value_loss(TWO, TWO, TWO, -0.2), "clip = -0.2: give a number >= 0.0"),
    "bounds the wrong way round": (
        lambda: ops.bounded_importance(ROW, 2.0, 0.5, "clip"),
        r"bounded_importance: low = 2.0: give a number in \[0.0, 0.5\]",
    ),
    "weights of one sampler row": (lambda: ops.importance_weights(TWO, COLUMN, MASK), "give equal shapes"),
    "an estimator of a broadcast": (lambda: ops.kl_estimate(TWO, COLUMN), "kl_estimate: .* give equal shapes"),
    "a KL per response": (
        lambda: ops.adaptive_kl_coefficient(0.1, ROW, episodes=2, target=6.0, horizon=1e4),
        "must be single numbers",
    ),
    "pairs of a row and a column": (lambda: ops.pairwise_loss(ROW, COLUMN), r"rejected \[2, 1\]: give equal shapes"),
    "margins in a column": (lambda: ops.pairwise_loss(ROW, ROW, COLUMN), r"margin \[2, 1\]: give equal shapes"),
    "centring of a column": (lambda: ops.centring_penalty(ROW, COLUMN), "centring_penalty: .* give equal shapes"),
    "ratings in a column": (lambda: ops.rating_loss(ROW, COLUMN), "rating_loss: .* give equal shapes"),
    "differences in a column": (lambda: ops.magnitude_loss(ROW, ROW, COLUMN), "magnitude_loss: .* give equal shapes"),
    "labels that are shares": (lambda: ops.binary_label_loss(ROW, ROW), "labels of dtype float32: give booleans"),
    "a pick that is a share": (lambda: ops.best_of_k_loss(TWO, ROW), "best of dtype float32: give whole numbers"),
    "picks in a column": (lambda: ops.best_of_k_loss(TWO, IDS[:, None]), r"best \[2, 1\] beside \[2, 3\]"),
    "a ranking by shares": (lambda: ops.plackett_luce_loss(TWO, SHARES), "mask of dtype float32: give booleans"),
    "pairs by shares": (lambda: ops.kwise_loss(TWO, SHARES), "mask of dtype float32: give booleans"),
    "a mean over shares": (lambda: ops.masked_mean(TWO, SHARES), "mask of dtype float32: give booleans"),
    "a variance over counts": (lambda: ops.masked_var(TWO, IDS[:, None]), "mask of dtype int32: give booleans"),
    "whitening over shares": (lambda: ops.whiten(TWO, SHARES), "mask of dtype float32: give booleans"),
    "positions of shares": (lambda: ops.positions_from_mask(SHARES), "mask of dtype float32: give booleans"),
    "the last share": (lambda: ops.last_true_index(SHARES), "mask of dtype float32: give booleans"),
    "the first share": (lambda: ops.first_true(SHARES), "mask of dtype float32: give booleans"),
    "values where there are shares": (lambda: ops.value_mask(SHARES, "last_column"), "mask of dtype float32"),
    "a metric over shares": (lambda: Mean.of(TWO, SHARES), "Mean.of: mask of dtype float32: give booleans"),
    "ends of fractions": (lambda: ops.end_mask(TWO, 2), "tokens of dtype float32: give whole numbers"),
    "targets that are fractions": (lambda: ops.token_logprobs(TWO, ROW), "targets of dtype float32: give whole numbers"),
    "targets in a column": (lambda: ops.token_logprobs(TWO, IDS[:, None]), r"targets \[2, 1\] beside \[2, 3\]"),
    "no tokens at all": (
        lambda: ops.sample_tokens(TWO, KEYS, temperature=1.0, top_p=0.0),
        r"top_p=0.0, min_p=0.0: need a whole top_k >= 0, 0 < top_p <= 1",
    ),
    "nothing left by truncation": (lambda: ops.truncate_logits(TWO, top_p=0.0), "0 < top_p <= 1"),
    "half a token": (lambda: ops.truncate_logits(TWO, top_k=1.5), "need a whole top_k"),
    "infinite temperature": (lambda: ops.sample_tokens(TWO, KEYS, temperature=float("inf")), "temperature=inf: need"),
    "one key for all rows": (lambda: ops.sample_tokens(TWO, KEY, **GREEDY), r"keys \[\] beside \[2, 3\]: give shape \[2\]"),
    "keys of another generator": (
        lambda: ops.sample_tokens(TWO, jax.random.split(RBG, 2), **GREEDY),
        "give a key of jax.random.key",
    ),
    "a run's key of another generator": (lambda: ops.token_keys(RBG, IDS, IDS, 0), "impl='threefry2x32'"),
    "a raw key": (lambda: ops.token_keys(jax.random.PRNGKey(0), IDS, IDS, 0), "impl='threefry2x32'"),
    "a reward for repetition": (lambda: ops.penalise_repetition(TWO, MASK, 0.0), "penalty = 0.0: give a number above 0"),
    "tokens that occurred by half": (lambda: ops.penalise_repetition(TWO, SHARES, 2.0), "occurred of dtype float32: give booleans"),
    "a state with another generator": (
        lambda: learn.initial_state({}, learn.make_optimizer(OptimizerConfig(), 1), RBG),
        "initial_state: give a key",
    ),
    "an order by another generator": (lambda: learn.minibatch_indices(RBG, 4, PPOConfig()), "minibatch_indices: give a key"),
    "no microbatches": (
        lambda: learn.make_train_step(None, learn.make_optimizer(OptimizerConfig(), 1), microbatches=0),
        "microbatches = 0: give a whole number >= 1",
    ),
    "a run of no steps": (lambda: learn.make_schedule(OptimizerConfig(), 0), "steps = 0: give a whole number >= 1"),
    "negative centring": (lambda: learn.make_reward_loss(None, centring=-0.1), "centring = -0.1: give a number >= 0.0"),
    "a reference of other rows": (
        lambda: learn.implicit_rewards(TWO, COLUMN, prompt_batch([[1, 2, 3]] * 2), DPOConfig()),
        "implicit_rewards: .* give equal shapes",
    ),
    "an unknown reduction": (lambda: GRPOConfig(reduction="token"), "GRPOConfig.reduction = 'token': one of"),
    "a setting of no nucleus": (lambda: SamplingConfig(top_p=0), r"SamplingConfig.top_p = 0: give a number in \(0, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a mean over shares", "scores in a column", "a run's key of another generator"])
def test_it_is_refused_while_tracing(name):
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        jax.jit(call)()


def test_ends_outside_the_vocabulary_are_refused():
    model, params = tiny_model()
    options = {"sampling": SamplingConfig(max_new_tokens=2), "pad_id": 0}
    for ends in ((64,), (2, -1)):
        with pytest.raises(InputError, match="generate: eos_ids or pad_id .*: the vocabulary has the ids 0 to 63"):
            generate(model, params, prompt_batch([[1]]), KEY, eos_ids=ends, **options)


@pytest.mark.parametrize("target", [-100, -1, 3])
def test_a_target_outside_the_vocabulary_is_nan(target):
    """-100 marks ignored targets elsewhere: counted from the end of a vocabulary it would be a token. Masked it is nothing."""
    logits, targets = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 2)), jnp.array([1, target])
    for actual in (ops.token_logprobs(logits, targets), ops.logprobs_and_entropy(logits, targets)[0]):
        np.testing.assert_allclose(actual, [np.log(0.3), np.nan], rtol=1e-6)
    assert np.isnan(ops.best_of_k_loss(logits, targets)[1]) and np.isfinite(ops.best_of_k_loss(logits, targets)[0])

    def total(hidden):
        mask = jnp.array([[True, False]])
        return ops.hidden_logprobs(hidden, lambda x: x, targets[None], chunk_size=2, mask=mask)[0].sum()

    value, slope = jax.value_and_grad(total)(logits[None])
    np.testing.assert_allclose(value, np.log(0.3), rtol=1e-6)
    np.testing.assert_allclose(slope[0], [[-0.5, 0.7, -0.2], [0, 0, 0]], atol=1e-6)
