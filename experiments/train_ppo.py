"""PPO against a reward model, or against a programmatic reward.

    python experiments/train_ppo.py --gin_file=configs/support_desk/ppo.gin

One iteration: sample, score, prepare, update, adapt the KL coefficient.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import data, learn, rollout
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.run import Input, LoopConfig, bound_config, fetch, launch, open_run
from rlhf_jax.run.configurables import (
    BatchConfig,
    Loaded,
    ModelSource,
    Records,
    ScoreTexts,
    encode_records,
    load_model,
    load_reward,
    tell_left_out,
    write_model_card,
)
from rlhf_jax.types import InputError, Params


@gin.configurable
def run(
    run_dir: str,
    steps: int,
    seed: int,
    policy: ModelSource,
    prompts: Records,
    batch: BatchConfig,
    sampling: rollout.SamplingConfig,
    ppo: learn.PPOConfig,
    policy_optimizer: learn.OptimizerConfig,
    value_optimizer: learn.OptimizerConfig,
    loop: LoopConfig,
    mesh: MeshConfig = MeshConfig(),
    reward: ModelSource | None = None,
    reward_texts: ScoreTexts | None = None,
    reward_key: str = "gold",
    monitor: ScoreTexts | None = None,
    share_trunk: bool = False,
) -> None:
    """steps: iterations. Exactly one of reward (a model; the value model starts from it) and reward_texts (its
    ``reward_key`` is the score). monitor: scores of the texts that are logged and not trained on.
    share_trunk: the value head stands on the policy's trunk."""
    bound = bound_config()
    if (reward is None) == (reward_texts is None):
        raise InputError("run.reward, run.reward_texts: give exactly one")
    devices = make_mesh(mesh)
    init_rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))

    # 1. Models, prompts, and the four jitted functions.
    cast = load_cast(policy, reward, share_trunk, devices, init_rng)
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")
    tokenizer, pad = cast.policy.tokenizer, cast.policy.tokenizer.pad_token_id
    encoded, none = encode_records(
        prompts,
        data.Prompt,
        lambda record: data.encode_prompt(record, tokenizer, prompts.template, max_prompt_length=batch.length),
    )
    batches = data.prompt_batches(
        encoded.items, batch_size=batch.batch_size, length=batch.length, seed=seed, pad_id=pad
    )
    updates = ppo.epochs * ppo.minibatches
    optimizer = optax.partition(
        {
            "policy": learn.make_optimizer(policy_optimizer, steps, updates),
            "value": learn.make_optimizer(value_optimizer, steps, updates),
        },
        learn.ppo_optimizer_labels,
    )
    generate, score, prepare, update = functions(cast, prompts.template, sampling, ppo, optimizer, batch.microbatches)

    # 2. State.
    def begin(params):
        train = learn.initial_state(params, optimizer, train_rng)
        return learn.PPOState(train, jnp.asarray(ppo.kl_coefficient, jnp.float32), jnp.zeros((), jnp.int32))

    state = born_sharded(begin, cast.shardings(devices), devices, cast.trainable)

    # 3. The loop.
    inputs = [*cast.inputs, *prompts.as_inputs()]
    with open_run(run_dir, stage="ppo", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(prompts, encoded, none)
        write_model_card(here.directory, cast.models.policy, tokenizer, subtree="train/params/policy")
        state, host = here.restore(state, {"data": batches.get_state()})
        batches.set_state(host["data"])
        for step in here.steps(here.resumed_step, steps):
            sample_rng, order_rng = jax.random.split(jax.random.fold_in(train_rng, step))

            # 3.1 Sample.
            began = time.monotonic()
            completions = jax.block_until_ready(
                generate(state.train.params, to_global(next(batches), devices), sample_rng)
            )
            sampled = time.monotonic()

            # 3.2 Score: log-probabilities, values, reward.
            scored = score(state.train.params, cast.frozen, completions)
            texts = data.responses(completions, encoded.records, tokenizer) if reward_texts or monitor else None
            if reward_texts is not None:
                scored = scored.replace(scores=text_rewards(reward_texts(*texts), reward_key))
            watched = {} if monitor is None else {f"monitor/{key}": np.mean(v) for key, v in monitor(*texts).items()}

            # 3.3 Rewards and advantages over the whole rollout; is the sampler the scorer?
            prepared, metrics = prepare(scored, state.kl_coefficient)
            measured = fetch(metrics)
            learn.stop_if_sampler_differs(step, measured["sampler_gap"], ppo)

            # 3.4 Update; did it begin with the policy that was scored?
            before = time.monotonic()
            train, updated = update(state.train, prepared, order_rng)
            learn.stop_if_not_identity(step, fetch(updated)["identity/identity_gap"], ppo)

            # 3.5 Adapt the KL coefficient to what was measured.
            kl = jnp.asarray(measured["kl"], jnp.float32)
            coefficient = learn.next_kl_coefficient(ppo, state.kl_coefficient, kl, batch.batch_size)
            reported = metrics | updated | watched | {"kl_coefficient": state.kl_coefficient}
            state = learn.PPOState(train, coefficient, jnp.asarray(step, jnp.int32))

            seconds = {"seconds_rollout": sampled - began, "seconds_update": time.monotonic() - before}
            here.log(step, reported, tokens=int(np.asarray(completions.mask).sum()), timing=seconds)
            here.save(step, state, {"data": batches.get_state()})


@dataclasses.dataclass(frozen=True)
class Cast:
    """The models of PPO. policy: as it was loaded. trainable: {"policy"[, "value"]}; frozen: {"reference", "reward"}."""

    policy: Loaded
    judge: Loaded | None
    models: rollout.RolloutModels
    trainable: Params
    frozen: dict[str, Params | None]

    @property
    def inputs(self) -> list[Input]:
        """For `open_run`."""
        return [*self.policy.as_inputs("policy"), *(self.judge.as_inputs("reward") if self.judge else [])]

    def shardings(self, mesh: jax.sharding.Mesh) -> Params:
        """Of ``trainable``."""
        owners = {"policy": self.models.policy, "value": self.models.value}
        return {
            name: tree_shardings(owners[name].abstract(), owners[name].logical_axes(), mesh) for name in self.trainable
        }

    def refuse_longer(self, tokens: int, what: str) -> None:
        """As `Loaded.refuse_longer`, for every model (a value model is as long as what it started from)."""
        for each in filter(None, (self.policy, self.judge)):
            each.refuse_longer(tokens, what)


def load_cast(policy: ModelSource, reward: ModelSource | None, share_trunk: bool, mesh: Any, rng: jax.Array) -> Cast:
    """Policy, frozen reference (a real copy), reward model, value model (from the reward model, else the policy's trunk)."""
    actor = load_model(policy, "lm+scalar" if share_trunk else "lm", mesh, rng)
    reference = load_model(policy, "lm", mesh, rng)
    judge = None if reward is None else load_reward(reward, mesh)
    critic = None if share_trunk else load_model(reward or policy, "scalar", mesh, rng)
    for other in filter(None, (judge, critic)):
        if other.tokenizer.get_vocab() != actor.tokenizer.get_vocab():
            raise InputError(f"{other.input}: its tokenizer is not the policy's; train both from one base model")
    trainable = {"policy": actor.params} | ({} if critic is None else {"value": critic.params})
    if share_trunk:  # at the start every value is 0 (Ziegler et al. 2019)
        trainable["policy"] = actor.params | {"scalar_head": jax.tree.map(jnp.zeros_like, actor.params["scalar_head"])}
    models = rollout.RolloutModels(actor.model, reference.model, critic and critic.model, judge and judge.model)
    return Cast(actor, judge, models, trainable, {"reference": reference.params, "reward": judge and judge.params})


def functions(
    cast: Cast,
    template: data.Template,
    sampling: rollout.SamplingConfig,
    ppo: learn.PPOConfig,
    optimizer: optax.GradientTransformation,
    microbatches: int,
) -> tuple[Callable, Callable, Callable, Callable]:
    """generate(params, prompts, rng), score(params, frozen, completions), prepare(rollout, kl_coefficient) and
    update(train state, batch, rng), each jitted; params: what is trained."""
    models, tokenizer = cast.models, cast.policy.tokenizer
    ends = {"eos_ids": data.stop_ids(tokenizer, template), "pad_id": tokenizer.pad_token_id}

    def policy_fn(params, completions):
        return rollout.policy_and_values(
            models, params["policy"], params.get("value"), completions, temperature=sampling.temperature
        )

    train_step = learn.make_train_step(learn.make_ppo_loss(policy_fn, ppo), optimizer, microbatches=microbatches)

    def generate(params, prompts, rng):
        return rollout.generate(models.policy, params["policy"], prompts, rng, sampling=sampling, **ends)

    def score(params, frozen, completions):
        four = rollout.RolloutParams(params["policy"], frozen["reference"], params.get("value"), frozen["reward"])
        return rollout.score(models, four, completions, temperature=sampling.temperature)

    def prepare(scored, coefficient):
        return learn.prepare(scored, ppo, coefficient)

    def update(train, prepared, rng):
        return learn.update(train_step, train, prepared, rng, ppo)

    return jax.jit(generate), jax.jit(score), jax.jit(prepare), jax.jit(update, donate_argnums=0)


def text_rewards(values: dict[str, list[float]], key: str) -> jax.Array:
    """float32 [B]. Raises InputError when the scorer has no such key."""
    if key not in values:
        raise InputError(f"run.reward_key = {key!r}: reward_texts gives {', '.join(sorted(values))}")
    return jnp.asarray(values[key], jnp.float32)


if __name__ == "__main__":
    launch(run)
