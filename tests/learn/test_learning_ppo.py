"""PPO reaches optima that are known in closed form: of a bandit, and of a task with several tokens.

With a KL penalty b the best policy is ``reference(y) exp(R(y) / b) / Z`` and what it earns, ``E[R] - b KL``, is ``b log Z``
(Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian inference", eq. 6). Both tasks are small enough
to sum over every response.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import learn, ops, rollout
from rlhf_jax.learn import OptimizerConfig, PPOConfig
from rlhf_jax.models import Model
from rlhf_jax.testing import completions, count_reward, prompt_batch, random_params, table_reward, tiny_config
from rlhf_jax.types import Completions

VOCAB, ROWS = 8, 128


@dataclasses.dataclass(frozen=True)
class Task:
    """length: tokens of a response; eos: ends one, or () for none. beta: KL coefficient. reward: of completions."""

    length: int
    eos: tuple[int, ...]
    beta: float
    reward: Callable[[Completions], jax.Array]
    iterations: int


def prompts(iteration: int):
    return prompt_batch(
        [[3, 4]] * ROWS, prompt_ids=[0] * ROWS, sample_ids=range(iteration * ROWS, (iteration + 1) * ROWS)
    )


def train(task: Task):
    """The whole loop with real models: (policy model, reference parameters, trained parameters, metrics of every iteration)."""
    policy = Model(tiny_config(vocab_size=VOCAB, max_length=2 + task.length))
    value = policy.with_head("scalar")
    reference = random_params(policy, 2)
    reference["embed"]["embedding"] *= 0.3  # logits with spread .6: every token has a chance
    models = rollout.RolloutModels(policy, policy, value, None)
    params = jax.tree.map(jnp.asarray, {"policy": reference, "value": random_params(value, 3)})
    config = PPOConfig(
        epochs=2, minibatches=2, kl_coefficient=task.beta, value_coefficient=0.5, value_clip=None,
        missing_eos_penalty=None, whiten_advantages="none", lam=0.95,
    )  # fmt: skip

    def policy_fn(params, done):
        return rollout.policy_and_values(models, params["policy"], params["value"], done, temperature=1.0)

    updates = config.epochs * config.minibatches
    adam = OptimizerConfig(learning_rate=2e-2, schedule="linear", max_grad_norm=1.0)
    optimizer = optax.partition(
        {name: learn.make_optimizer(adam, task.iterations, updates) for name in ("policy", "value")},
        learn.ppo_optimizer_labels,
    )
    step = learn.make_train_step(learn.make_ppo_loss(policy_fn, config), optimizer)
    sampling = rollout.SamplingConfig(temperature=1.0, max_new_tokens=task.length)

    @jax.jit
    def iterate(state, prompts, rng):
        sample_rng, order_rng = jax.random.split(rng)
        done = rollout.generate(
            policy, state.params["policy"], prompts, sample_rng, sampling=sampling, eos_ids=task.eos, pad_id=0
        )
        four = rollout.RolloutParams(state.params["policy"], reference, state.params["value"], None)
        scored = rollout.score(models, four, done, temperature=1.0).replace(scores=task.reward(done))
        prepared, metrics = learn.prepare(scored, config, jnp.asarray(task.beta))
        state, updated = learn.update(step, state, prepared, order_rng, config)
        return state, metrics | updated

    state, seen = learn.initial_state(params, optimizer, jax.random.key(0)), []
    for iteration in range(task.iterations):
        state, metrics = iterate(state, prompts(iteration), jax.random.fold_in(jax.random.key(1), iteration))
        seen.append({name: float(metric.value()) for name, metric in metrics.items()})
    return policy, reference, state.params["policy"], seen


def every_response(task: Task):
    """All possible responses as one batch of completions."""
    texts = []
    for text in itertools.product(range(VOCAB), repeat=task.length):
        ends = [index for index, token in enumerate(text) if token in task.eos]
        texts.append(text[: ends[0] + 1] if ends else text)
    return sorted(set(texts))


def exact(policy: Model, params, texts, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(log-probability, reward) of every response, float64."""
    done = completions(prompt_batch([[3, 4]] * len(texts)), texts, length=task.length, eos_ids=task.eos or (-1,))

    @jax.jit
    def read(params, done):
        batch = rollout.as_token_batch(done)
        logprobs, _ = rollout.sequence_logprobs(policy, params, batch)
        return ops.masked_sum(logprobs, batch.loss_mask, axis=1), task.reward(done)

    logprobs, rewards = jax.device_get(read(params, done))
    assert abs(np.exp(np.float64(logprobs)).sum() - 1) < 1e-4  # they are all
    return np.float64(logprobs), np.float64(rewards)


def test_a_bandit_reaches_reference_times_exp_reward_over_beta():
    """One token, eight arms: the whole distribution is known."""
    arms = jnp.array([0.0, 0.2, -0.5, 1.0, 0.3, 0.9, -1.0, 0.5])
    task = Task(1, (), 0.5, lambda done: table_reward(done, arms), 50)
    policy, reference, trained, seen = train(task)
    texts = every_response(task)
    before, rewards = exact(policy, reference, texts, task)
    after, _ = exact(policy, trained, texts, task)
    best = np.exp(before) * np.exp(rewards / task.beta)
    best /= best.sum()
    distance, start = (0.5 * np.abs(np.exp(p) - best).sum() for p in (after, before))
    print(f"total variation to the optimum {start:.3f} -> {distance:.3f}")
    assert start > 0.3 and distance < 0.04
    assert seen[0]["kl"] == 0.0 and seen[0]["sampler_gap_max"] < 1e-5
    assert max(entry["identity/identity_gap"] for entry in seen) < 1e-4


def test_several_tokens_earn_what_the_best_policy_earns():
    """Up to four tokens, token 5 pays 1 each, token 2 ends: stopping early costs what could still be earned."""
    task = Task(4, (2,), 0.4, lambda done: count_reward(done, 5), 100)
    policy, reference, trained, seen = train(task)
    texts = every_response(task)
    before, rewards = exact(policy, reference, texts, task)
    after, _ = exact(policy, trained, texts, task)
    optimum = task.beta * np.log(np.exp(before + rewards / task.beta).sum())
    start = (np.exp(before) * rewards).sum()
    earned = (np.exp(after) * (rewards - task.beta * (after - before))).sum()
    print(f"reward minus KL {start:.3f} -> {earned:.3f}, optimum {optimum:.3f}")
    assert optimum - start > 0.5
    assert start < earned <= optimum + 1e-6
    assert (earned - start) / (optimum - start) > 0.95
    # what was measured on the way is what is true: the last rollouts' reward and KL against the exact ones
    late = {name: np.mean([entry[name] for entry in seen[-10:]]) for name in ("score", "kl", "explained_variance")}
    assert abs(late["score"] - (np.exp(after) * rewards).sum()) < 0.2
    assert abs(late["kl"] - (np.exp(after) * (after - before)).sum()) < 0.3
