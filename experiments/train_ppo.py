"""PPO against a reward model, or against a programmatic reward.

    python experiments/train_ppo.py --gin_file=configs/support_desk/ppo.gin

One iteration: sample, score, prepare, update, adapt the KL coefficient.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import data, learn, rollout
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.run import LoopConfig, bound_config, fetch, launch, open_run
from rlhf_jax.run.configurables import (
    BatchConfig,
    ModelSource,
    Records,
    ScoreTexts,
    decode_responses,
    load_model,
    write_model_card,
)
from rlhf_jax.types import InputError, RunStopped


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

    # 1. Four models: policy, frozen reference (a real copy), reward, value.
    loaded = load_model(policy, "lm+scalar" if share_trunk else "lm", devices, init_rng)
    reference = load_model(policy, "lm", devices, init_rng)
    judge = None if reward is None else load_model(reward, "scalar", devices, init_rng)
    critic = None if share_trunk else load_model(reward or policy, "scalar", devices, init_rng)
    tokenizer = loaded.tokenizer
    for other in (judge, critic):
        if other is not None and other.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{other.input}: its tokenizer is not the policy's; train both from one base model")
    for each in filter(None, (loaded, judge, critic)):
        each.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")
    models = rollout.RolloutModels(
        loaded.model, reference.model, None if critic is None else critic.model, None if judge is None else judge.model
    )
    trainable = {"policy": loaded.params} | ({} if critic is None else {"value": critic.params})
    if share_trunk:  # at the start every value is 0 (Ziegler et al. 2019)
        head = jax.tree.map(jnp.zeros_like, loaded.params["scalar_head"])
        trainable["policy"] = loaded.params | {"scalar_head": head}
    frozen = {"reference": reference.params, "reward": None if judge is None else judge.params}

    # 2. Four jitted functions: generate, score, prepare, update.
    eos, pad = (tokenizer.eos_token_id,), tokenizer.pad_token_id
    updates = ppo.epochs * ppo.minibatches
    optimizer = optax.partition(
        {
            "policy": learn.make_optimizer(policy_optimizer, steps, updates),
            "value": learn.make_optimizer(value_optimizer, steps, updates),
        },
        learn.ppo_optimizer_labels,
    )

    def policy_fn(params, completions):
        return rollout.policy_and_values(
            models, params["policy"], params.get("value"), completions, temperature=sampling.temperature
        )

    train_step = learn.make_train_step(learn.make_ppo_loss(policy_fn, ppo), optimizer, microbatches=batch.microbatches)

    @jax.jit
    def generate(params, prompts, rng):
        return rollout.generate(
            models.policy, params["policy"], prompts, rng, sampling=sampling, eos_ids=eos, pad_id=pad
        )

    @jax.jit
    def score(params, frozen, completions):
        four = rollout.RolloutParams(params["policy"], frozen["reference"], params.get("value"), frozen["reward"])
        return rollout.score(models, four, completions, temperature=sampling.temperature)

    prepare = jax.jit(lambda scored, coefficient: learn.prepare(scored, ppo, coefficient))

    def update(train, prepared, rng):
        return learn.update(train_step, train, prepared, rng, ppo)

    update = jax.jit(update, donate_argnums=0)

    # 3. Prompts and state.
    def encode(record: data.Prompt) -> list[int] | data.Skipped:
        return data.encode_prompt(record, tokenizer, prompts.template, max_prompt_length=batch.length)

    encoded = data.encode_all(prompts.of(data.Prompt).train, encode)
    batches = data.prompt_batches(
        encoded.items, batch_size=batch.batch_size, length=batch.length, seed=seed, pad_id=pad
    )
    shardings = {"policy": tree_shardings(models.policy.abstract(), models.policy.logical_axes(), devices)}
    if models.value is not None:
        shardings["value"] = tree_shardings(models.value.abstract(), models.value.logical_axes(), devices)

    def begin(params):
        train = learn.initial_state(params, optimizer, train_rng)
        return learn.PPOState(train, jnp.asarray(ppo.kl_coefficient, jnp.float32), jnp.zeros((), jnp.int32))

    state = born_sharded(begin, shardings, devices, trainable)

    # 4. The loop.
    inputs = [*loaded.as_inputs("policy"), *(judge.as_inputs("reward") if judge else []), *prompts.as_inputs()]
    with open_run(run_dir, stage="ppo", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        write_model_card(here.directory, models.policy, tokenizer, subtree="train/params/policy")
        state, host = here.restore(state, {"data": batches.get_state()})
        batches.set_state(host["data"])
        for step in here.steps(here.resumed_step, steps):
            iteration_rng = jax.random.fold_in(train_rng, step)
            sample_rng, order_rng = jax.random.split(iteration_rng)

            # 4.1 Sample.
            began = time.monotonic()
            completions = jax.block_until_ready(
                generate(state.train.params, to_global(next(batches), devices), sample_rng)
            )
            sampled = time.monotonic()

            # 4.2 Score: log-probabilities, values, reward.
            scored = score(state.train.params, frozen, completions)
            texts = {}
            if reward_texts is not None or monitor is not None:
                rows = [{"id": encoded.records[i].id} for i in np.asarray(completions.prompts.prompt_id)]
                replies = decode_responses(tokenizer, np.asarray(completions.tokens), np.asarray(completions.mask))
                ended = np.asarray(completions.ended).tolist()
            if reward_texts is not None:
                values = reward_texts(rows, replies, ended)
                if reward_key not in values:
                    raise InputError(f"run.reward_key = {reward_key!r}: reward_texts gives {', '.join(sorted(values))}")
                scored = scored.replace(scores=jnp.asarray(values[reward_key], jnp.float32))
            if monitor is not None:
                texts = {f"monitor/{name}": float(np.mean(v)) for name, v in monitor(rows, replies, ended).items()}

            # 4.3 Rewards and advantages over the whole rollout; is the sampler the scorer?
            prepared, metrics = prepare(scored, state.kl_coefficient)
            measured = fetch(metrics)
            if measured["sampler_gap"] is not None and measured["sampler_gap"] > ppo.max_sampler_gap:
                raise RunStopped(
                    f"step {step}: sampler and scorer differ by {measured['sampler_gap']:.2e} nats a token, limit "
                    f"PPOConfig.max_sampler_gap = {ppo.max_sampler_gap}: the ratio would be wrong"
                )

            # 4.4 Update.
            before = time.monotonic()
            train, updated = update(state.train, prepared, order_rng)
            gap = fetch(updated)["identity/identity_gap"]
            if gap is not None and gap > ppo.max_identity_gap:
                raise RunStopped(
                    f"step {step}: before the first update |log ratio| is {gap:.2e}, limit PPOConfig.max_identity_gap "
                    f"= {ppo.max_identity_gap}: update and scorer see different models or masks"
                )

            # 4.5 Adapt the KL coefficient to what was measured.
            kl = jnp.asarray(measured["kl"], jnp.float32)
            coefficient = learn.next_kl_coefficient(ppo, state.kl_coefficient, kl, batch.batch_size)
            reported = metrics | updated | texts | {"kl_coefficient": state.kl_coefficient}
            state = learn.PPOState(train, coefficient, jnp.asarray(step, jnp.int32))

            seconds = {"seconds_rollout": sampled - began, "seconds_update": time.monotonic() - before}
            here.log(step, reported, tokens=int(np.asarray(completions.mask).sum()), timing=seconds)
            here.save(step, state, {"data": batches.get_state()})


if __name__ == "__main__":
    launch(run)
