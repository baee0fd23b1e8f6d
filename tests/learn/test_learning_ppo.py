"""PPO reaches optima that are known in closed form: of a bandit, and of a task with several tokens.

With a KL penalty b the best policy is ``reference(y) exp(R(y) / b) / Z`` and what it earns, ``E[R] - b KL``, is ``b log Z``
(Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian inference", eq. 6). Both tasks are small enough
to sum over every response.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import learn, ops, rollout
from rlhf_jax.algorithms.scoring import policy_and_values, score
from rlhf_jax.learn import OptimizerConfig, PPOConfig
from rlhf_jax.models import Model, as_token_batch, sequence_logprobs
from rlhf_jax.testing import completions, count_reward, prompt_batch, random_params, table_reward, tiny_config
from rlhf_jax.types import Completions, Rollout

VOCAB, ROWS, LENGTH, ITERATIONS = 8, 128, 4, 60


@dataclasses.dataclass(frozen=True)
class Task:
    """eos: tokens that end a response. beta: KL coefficient. Reward: ``arms`` at the first token plus ``pays`` for every
    token 5."""

    eos: tuple[int, ...]
    beta: float
    arms: tuple[float, ...]
    pays: float

    def reward(self, completions: Completions) -> jax.Array:
        return table_reward(completions, jnp.array(self.arms)) + self.pays * count_reward(completions, 5)


POLICY = Model(tiny_config(vocab_size=VOCAB, max_length=2 + LENGTH))
REFERENCE = random_params(POLICY, 2)
REFERENCE["embed"]["embedding"] *= 0.3  # logits with spread .6: every token has a chance
MODELS = {"policy": POLICY, "reference": POLICY, "value": POLICY.with_head("scalar")}
CONFIG = PPOConfig(
    epochs=2, minibatches=2, value_coefficient=0.5, value_clip=None, missing_eos_penalty=None, whiten_advantages="none"
)  # fmt: skip


def policy_fn(params, completions):
    return policy_and_values(MODELS, params, completions, temperature=1.0)


def make_optimizer():
    adam = OptimizerConfig(learning_rate=2e-2, schedule="linear", max_grad_norm=1.0)
    one = {
        name: learn.make_optimizer(adam, ITERATIONS, CONFIG.epochs * CONFIG.minibatches) for name in ("policy", "value")
    }
    return optax.partition(one, learn.ppo_optimizer_labels)


@jax.jit
def iterate(state, prompts, rng, task):
    """One iteration with real models; the task's numbers are arguments, so that both tests compile once."""
    eos, beta, arms, pays = task
    sample_rng, order_rng = jax.random.split(rng)
    sampling = rollout.SamplingConfig(temperature=1.0, max_new_tokens=LENGTH)
    completions = rollout.generate(
        POLICY, state.params["policy"], prompts, sample_rng, sampling=sampling, eos_ids=tuple(eos), pad_id=0
    )
    scored = score(MODELS, {**state.params, "reference": REFERENCE}, completions, temperature=1.0)
    paid = Rollout.of(scored, {"table": table_reward(completions, arms), "count": pays * count_reward(completions, 5)})
    prepared, metrics = learn.prepare(paid, CONFIG, beta)
    step = learn.make_train_step(learn.make_ppo_loss(policy_fn, CONFIG), make_optimizer())
    state, updated = learn.update(step, state, prepared, order_rng, CONFIG)
    return state, metrics | updated


def train(task: Task):
    """(trained parameters of the policy, metrics of every iteration)."""
    params = {"policy": REFERENCE, "value": random_params(POLICY.with_head("scalar"), 3)}
    state = learn.initial_state(jax.tree.map(jnp.asarray, params), make_optimizer(), jax.random.key(0))
    eos = np.resize(np.int32(task.eos), VOCAB)
    numbers = (eos, np.float32(task.beta), np.float32(task.arms), np.float32(task.pays))
    observed = []
    for iteration in range(ITERATIONS):
        samples = range(iteration * ROWS, (iteration + 1) * ROWS)
        prompts = prompt_batch([[3, 4]] * ROWS, prompt_ids=[0] * ROWS, sample_ids=samples)
        state, metrics = iterate(state, prompts, jax.random.fold_in(jax.random.key(1), iteration), numbers)
        observed.append({name: float(metric.value()) for name, metric in metrics.items()})
    return state.params["policy"], observed


def every_response(task: Task) -> list[tuple[int, ...]]:
    """All that can be sampled."""
    texts = set()
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        ends = [index for index, token in enumerate(text) if token in task.eos]
        texts.add(text[: ends[0] + 1] if ends else text)
    return sorted(texts)


def exact(params, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability, reward) of every response, float64."""
    texts = every_response(task)
    outcome = completions(prompt_batch([[3, 4]] * len(texts)), texts, length=LENGTH, eos_ids=task.eos)

    @jax.jit
    def read(params, outcome):
        batch = as_token_batch(outcome)
        logprobs, _ = sequence_logprobs(POLICY, params, batch)
        return ops.masked_sum(logprobs, batch.loss_mask, axis=1), task.reward(outcome)

    logprobs, rewards = (np.float64(x) for x in jax.device_get(read(params, outcome)))
    assert abs(np.exp(logprobs).sum() - 1) < 1e-4  # they are all
    return logprobs, rewards


def test_a_bandit_reaches_reference_times_exp_reward_over_beta():
    """Every token ends: eight arms, and the whole optimal distribution is known."""
    task = Task(tuple(range(VOCAB)), 0.5, (0.0, 0.2, -0.5, 1.0, 0.3, 0.9, -1.0, 0.5), 0.0)
    trained, observed = train(task)
    before, rewards = exact(REFERENCE, task)
    after, _ = exact(trained, task)
    assert len(before) == VOCAB
    best = np.exp(before) * np.exp(rewards / task.beta)
    best /= best.sum()
    distance, start = (0.5 * np.abs(np.exp(p) - best).sum() for p in (after, before))
    print(f"total variation to the optimum {start:.3f} -> {distance:.3f}")
    assert start > 0.25 and distance < 0.03
    assert observed[0]["kl"] == 0.0 and max(entry["sampler_gap_max"] for entry in observed) < 1e-4
    assert max(entry["identity/identity_gap"] for entry in observed) < 1e-4


def test_several_tokens_earn_what_the_best_policy_earns():
    """Up to four tokens, token 5 pays 1 each, token 2 ends: stopping early costs what could still be earned."""
    task = Task((2,), 0.4, (0.0,) * VOCAB, 1.0)
    trained, observed = train(task)
    before, rewards = exact(REFERENCE, task)
    after, _ = exact(trained, task)
    optimum = task.beta * np.log(np.exp(before + rewards / task.beta).sum())
    start = (np.exp(before) * rewards).sum()
    earned = (np.exp(after) * (rewards - task.beta * (after - before))).sum()
    print(f"reward minus KL {start:.3f} -> {earned:.3f}, optimum {optimum:.3f}")
    assert optimum - start > 0.5
    assert start < earned <= optimum + 1e-6
    assert (earned - start) / (optimum - start) > 0.95
    # what was measured on the way is what is true: the last rollouts' reward and KL against the exact ones
    late = {name: np.mean([entry[name] for entry in observed[-10:]]) for name in ("score", "kl")}
    assert abs(late["score"] - (np.exp(after) * rewards).sum()) < 0.2
    assert abs(late["kl"] - (np.exp(after) * (after - before)).sum()) < 0.3
