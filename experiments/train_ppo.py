"""PPO against a reward model, or against a programmatic reward.

    python experiments/train_ppo.py --gin_file=configs/support_desk/ppo.gin

One iteration: sample, score, prepare, update, adapt the KL coefficient.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, learn, rollout
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, make_mesh, on_all, to_global, to_host
from rlhf_jax.programs import PPOSettings, asleep, awake, placed
from rlhf_jax.run import LoopConfig, bound_config, fetch, launch, open_run
from rlhf_jax.run.cast import assemble, load_cast
from rlhf_jax.run.configurables import BatchConfig, ModelSource, ScoreTexts, refuse_unused
from rlhf_jax.run.models import write_model_card
from rlhf_jax.run.records import Records, encode_prompts, tell_left_out
from rlhf_jax.run.rewards import text_rewards
from rlhf_jax.types import InputError


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
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
    rollout_mesh: MeshConfig | None = None,
    reward: ModelSource | None = None,
    reward_texts: ScoreTexts | None = None,
    reward_key: str = "gold",
    monitor: ScoreTexts | None = None,
    share_trunk: bool = False,
    lora: LoraConfig | None = None,
    offload_optimizer: bool = False,
) -> None:
    """steps: iterations. Exactly one of reward (a model; the value model starts from it) and reward_texts (its
    ``reward_key`` is the score). monitor: scores of the texts that are logged and not trained on.
    share_trunk: the value head stands on the policy's trunk. rollout_mesh: the same devices in another shape, to sample.
    lora: train adapters on policy and value model. offload_optimizer: its state lies with the hosts but for updates."""
    bound = bound_config()
    if (reward is None) == (reward_texts is None):
        raise InputError("run.reward, run.reward_texts: give exactly one")
    refuse_unused(batch, "packed")
    refuse_unused(loop, "evaluate_every")
    devices = make_mesh(mesh)
    init_rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))

    # 1. Models and prompts.
    cast = load_cast(policy, reward, share_trunk, devices, init_rng, lora=lora)
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")
    tokenizer, pad = cast.policy.tokenizer, cast.policy.tokenizer.pad_token_id
    encoded, none = encode_prompts(prompts, tokenizer, batch.length)
    rollout.refuse_unshared(encoded.items, slots)
    batches = data.prompt_batches(
        encoded.items, batch_size=batch.batch_size, length=batch.length, seed=seed, pad_id=pad
    )

    # 2. State, and the four jitted functions.
    settings = PPOSettings(
        steps=steps,
        sampling=sampling,
        ppo=ppo,
        policy_optimizer=policy_optimizer,
        value_optimizer=value_optimizer,
        microbatches=batch.microbatches,
        slots=slots,
        share_trunk=share_trunk,
        rollout_mesh=rollout_mesh,
    )
    state, functions = assemble(cast, settings, prompts.template, devices, train_rng)
    generate, score, prepare, update = functions
    home = placed(state.train.opt_state)

    # 3. The loop.
    inputs = [*cast.inputs, *prompts.as_inputs()]
    with open_run(run_dir, stage="ppo", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(prompts, encoded, none)
        write_model_card(
            here.directory,
            cast.models.policy,
            tokenizer,
            prompts.template,
            subtree="train/params/policy",
            base=cast.policy.input,
        )
        state, host = here.restore(state, {"data": batches.get_state()})
        batches.set_state(host["data"])
        for step in here.steps(here.resumed_step, steps):
            sample_rng, order_rng = jax.random.split(jax.random.fold_in(train_rng, step))

            # 3.1 Sample.
            here.enter("rollout")
            if offload_optimizer:
                state = state.replace(train=asleep(state.train))
            completions = jax.block_until_ready(
                generate(state.train.params, to_global(next(batches), devices), sample_rng, cast.frozen)
            )
            replies = to_host(completions)

            # 3.2 Score: log-probabilities, values, reward.
            here.enter("score")
            new, most = replies.mask.sum(axis=1), sampling.max_new_tokens
            rows = (replies.prompts.mask.sum(axis=1) + new, batch.length + most, new, most)
            fold = batch.fold(cast.models.policy, 1, *rows)
            scored = jax.block_until_ready(score(state.train.params, cast.frozen, completions, fold=fold))
            here.enter("reward")
            texts = data.responses(replies, encoded.records, tokenizer) if reward_texts or monitor else None
            if reward_texts is not None:
                scored = scored.replace(scores=to_global(text_rewards(reward_texts(*texts), reward_key), devices))
            watched = {} if monitor is None else {f"monitor/{key}": np.mean(v) for key, v in monitor(*texts).items()}

            # 3.3 Rewards and advantages over the whole rollout; is the sampler the scorer?
            here.enter("prepare")
            prepared, metrics = prepare(scored, state.kl_coefficient)
            measured = fetch(metrics)
            learn.stop_if_sampler_differs(step, measured.get("sampler_gap"), ppo)
            learn.warn_if_kl_is_negative(step, measured["kl"], measured["kl_standard_error"])

            # 3.4 Update; did it begin with the policy that was scored?
            here.enter("update")
            fold = batch.fold(cast.models.policy, ppo.minibatches * batch.microbatches, *rows)
            train = awake(state.train, home) if offload_optimizer else state.train
            train, updated = update(train, prepared, order_rng, cast.frozen, fold=fold)
            learn.stop_if_not_identity(step, fetch(updated)["identity/identity_gap"], ppo)

            # 3.5 Adapt the KL coefficient to what was measured.
            now, kl = jnp.asarray(to_host(state.kl_coefficient)), jnp.asarray(measured["kl"], jnp.float32)
            coefficient = learn.next_kl_coefficient(ppo, now, kl, batch.batch_size)
            reported = metrics | updated | watched | {"kl_coefficient": now}
            state = learn.PPOState(train, *on_all((coefficient, np.int32(step)), devices))

            tokens = int(replies.mask.sum())
            timing = {"slot_use": tokens / int(replies.slot_steps.sum())}
            if not here.log(step, reported, tokens=tokens, timing=timing, batch=prepared):
                state = here.rolled_back(state)
                continue
            here.save(step, state, {"data": batches.get_state()})


if __name__ == "__main__":
    launch(run)
