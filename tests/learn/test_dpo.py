"""DPO's loss on numbers given by hand, and a planted preference recovered by a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.algorithms import DPO
from rlhf_jax.batches import RankedBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.errors import InputError
from rlhf_jax.learn import DPOConfig, gradients, make_dpo_loss
from rlhf_jax.models import Model, sequence_logprobs
from rlhf_jax.testing import IN_MEMORY, loaded_model, mesh_of, random_params, setting_of, tiny_config, token_batch

KEY = jax.random.key(0)


def pairs() -> RankedBatch:
    """Two pairs and a filler; prompts of one token, replies chosen 2 and 1, rejected 1 and 3 tokens."""
    chosen = token_batch([[5, 1, 2], [5, 3], []], length=4, prompt_lengths=[1, 1, 0])
    rejected = token_batch([[5, 4], [5, 1, 1, 3], []], length=4, prompt_lengths=[1, 1, 0])
    return RankedBatch.of_pairs(chosen, rejected)


def table(params, batch):
    """The log-probability of a token: a number looked up; garbage outside the replies must not be read."""
    actual = params["table"][batch.tokens]
    return jnp.where(batch.loss_mask, actual, jnp.nan), jnp.zeros_like(actual)


POLICY = {"table": jnp.array([7.0, -1.0, -2.0, -4.0, -3.0, 9.0])}
REFERENCE = {"table": jnp.array([7.0, -1.5, -2.5, -3.0, -3.5, 9.0])}


def measured(config, microbatches=1, policy=POLICY):
    loss = make_dpo_loss(table, lambda frozen, batch: table(frozen, batch)[0], config)
    return gradients(loss, policy, REFERENCE, pairs(), KEY, microbatches)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_by_hand(microbatches):
    """Log ratios per reply: chosen (.5 + .5) = 1 and -1; rejected .5 and (.5 + .5 - 1) = 0. D = .5 and -1; beta .1:
    log(1 + e^-.05) = .668460 and log(1 + e^.1) = .744397, mean .706428."""
    _, metrics = measured(DPOConfig(), microbatches)
    expected = {
        "loss": 0.706428,
        "accuracy": 0.5,
        "reward_chosen": 0.1 * (1.0 - 1.0) / 2,
        "reward_rejected": 0.1 * 0.5 / 2,
        "reward_gap": 0.1 * (0.5 - 1.0) / 2,
        "logprob_chosen": (-3.0 - 4.0) / 2,
        "logprob_rejected": (-3.0 - 6.0) / 2,
    }
    for name, value in expected.items():
        assert float(metrics[name].value()) == pytest.approx(value, abs=1e-6), name


def test_averaged_ipo_by_hand():
    """Per token: chosen 1 / 2 and -1; rejected .5 and 0. D = 0 and -1; beta .5: (0 - 1)^2 and (-1 - 1)^2, mean 2.5."""
    _, metrics = measured(DPOConfig(loss="ipo", beta=0.5, average=True))
    assert float(metrics["loss"].value()) == pytest.approx(2.5, abs=1e-6)


def test_the_chosen_replies_cross_entropy_beside_it():
    """Tokens of the chosen replies: -1, -2, -4: mean 7 / 3 nats a token, weight .3."""
    without, added = (measured(DPOConfig(sft_coefficient=c))[1]["loss"].value() for c in (0.0, 0.3))
    assert float(added - without) == pytest.approx(0.3 * 7 / 3, abs=1e-5)


def test_gradient_by_hand():
    """-beta sigmoid(-beta D) / 2 on every chosen token, the opposite on every rejected one; the prompt's token and the
    reference get none. Pair 1: .1 x .487503 / 2 = .024375; pair 2: .1 x .524979 / 2 = .026249."""
    grads, _ = measured(DPOConfig())
    first, second = 0.024375, 0.026249
    expected = [0.0, -first + 2 * second, -first, -second + second, first, 0.0]
    assert grads["table"].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_reference_gets_no_gradient():
    """Not even when policy and reference are the same arrays, as with adapters."""
    loss = make_dpo_loss(table, lambda frozen, batch: table(frozen, batch)[0], DPOConfig())

    def total(reference):
        terms, _ = loss(POLICY, reference, pairs(), KEY)
        return terms["preference"].total

    assert jax.grad(total)(REFERENCE)["table"].tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "DPOConfig.beta = 0.0: give a number above 0"),
        ({"loss": "dpo"}, "DPOConfig.loss = 'dpo': one of"),
        ({"label_smoothing": 0.5}, r"DPOConfig.label_smoothing = 0.5: give a share in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "has no effect on loss = 'ipo'"),
        ({"sft_coefficient": -1.0}, "DPOConfig.sft_coefficient = -1.0: give a number >= 0"),
        ({"sft_coefficient": float("nan")}, "DPOConfig.sft_coefficient"),
        ({"average": 1}, "DPOConfig.average = 1: True or False"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        DPOConfig(**fields)


@functools.cache
def trained():
    """(metrics of 60 steps, held-out implicit rewards before and after) on pairs in which token 7 is preferred to 8."""
    model = Model(tiny_config(vocab_size=16, max_length=6))
    start, mesh, steps = random_params(model, 0), mesh_of(), 60
    algorithm = DPO(
        model=IN_MEMORY,
        batch=BatchConfig(16, 6, microbatches=2),
        optimizer=learn.OptimizerConfig(learning_rate=3e-3),
        dpo=DPOConfig(beta=0.1),
    )
    loaded = loaded_model(model, start)
    job = algorithm.wire(setting_of(mesh, steps=steps), loaded, loaded, None)
    state, step, evaluate, frozen, rng = job.state, job.train_step, job.evaluate, job.frozen, np.random.default_rng(0)

    def draw(rows):
        prompts = rng.integers(3, 7, (rows, 2)).tolist()
        sides = [token_batch([[*p, token] for p in prompts], length=6, prompt_lengths=[2] * rows) for token in (7, 8)]
        return RankedBatch.of_pairs(*sides)

    states, history = draw(32), []
    before = jax.device_get(evaluate(state.params, frozen, states)[1])
    for _ in range(steps):
        state, metrics = step(state, frozen, draw(16))
        history.append({name: float(mean.value()) for name, mean in metrics.items()})
    logprobs = sequence_logprobs(model, state.params, jax.tree.map(lambda leaf: leaf[:, 0], states.rows))[0]
    return history, before, jax.device_get(evaluate(state.params, frozen, states)[1]), logprobs


def test_the_first_step_is_at_the_reference():
    history, before, _, _ = trained()
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert history[0]["reward_gap"] == pytest.approx(0.0, abs=1e-6) and history[0]["accuracy"] < 0.6
    np.testing.assert_allclose(before, np.zeros_like(before), atol=1e-6)


def test_a_planted_preference_is_learned():
    history, _, (chosen, rejected), _ = trained()
    assert history[-1]["loss"] < 0.5 and (chosen > rejected).all()
    assert (chosen - rejected).mean() > 0.5
