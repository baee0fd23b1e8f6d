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

from rlhf_jax import data, learn, rollout
from rlhf_jax.algorithms.cast import assemble, load_cast
from rlhf_jax.algorithms.folds import refuse_folded, row_fold
from rlhf_jax.algorithms.models import write_model_card
from rlhf_jax.algorithms.programs import PPOSettings, asleep, awake, placed
from rlhf_jax.algorithms.rollouts import Rollouts, refuse_uncorrected, row_lengths, step_keys
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.algorithms.text_rewards import TextRewards
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, encode_prompts, tell_left_out
from rlhf_jax.errors import refuse_unused
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, make_mesh, on_all, to_global, to_host
from rlhf_jax.rewards import Reward
from rlhf_jax.rundir import fetch


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
    reward_texts: Reward | None = None,
    reward_key: str = "gold",
    monitor: Reward | None = None,
    share_trunk: bool = False,
    lora: LoraConfig | None = None,
    offload_optimizer: bool = False,
    one_step_off: bool = False,
) -> None:
    """steps: iterations. Exactly one of reward (a model; the value model starts from it) and reward_texts (its
    ``reward_key`` is the score). monitor: scores of the texts that are logged and not trained on.
    share_trunk: the value head stands on the policy's trunk. rollout_mesh: the same devices in another shape, to sample.
    lora: train adapters on policy and value model. offload_optimizer: its state lies with the hosts but for updates.
    one_step_off: sample the next rollout while texts are judged, by the policy before the update (docs/performance.md)."""
    bound = bound_config()
    texts = TextRewards.beside(reward, reward_texts, reward_key, monitor)
    refuse_uncorrected(one_step_off, ppo, texts)
    refuse_unused(batch, "packed")
    refuse_unused(loop, "evaluate_every")
    devices = make_mesh(mesh)
    refuse_folded(batch, devices)
    init_rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))

    # 1. Models and prompts.
    cast = load_cast(policy, reward, share_trunk, devices, init_rng, lora=lora)
    prompts = with_date(prompts, cast.policy, run_dir)
    cast.refuse_other_template(prompts.template)
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")
    tokenizer, pad = cast.policy.tokenizer, data.padding_id(cast.policy.tokenizer)
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
    sampled = (generate, batches, devices, train_rng, state.train.params, cast.frozen)
    rollouts = Rollouts(*sampled, one_step_off=one_step_off)

    # 3. The loop.
    spread = learn.RewardSpread()
    inputs = [*cast.inputs, *prompts.as_inputs()]
    with open_run(run_dir, stage="ppo", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(prompts, encoded, none, tokenizer)
        write_model_card(
            here.directory,
            cast.models.policy,
            tokenizer,
            prompts.template,
            subtree=rollouts.within("train/params/policy"),
            base=cast.policy.input,
            generation=cast.policy.generation,
        )
        saved, host = here.restore(rollouts.packed(state), {"data": batches.get_state()})
        state = rollouts.unpacked(saved, keep=bool(here.resumed_step))
        batches.set_state(host["data"])
        for step in here.steps(here.resumed_step, steps):
            # 3.1 Sample.
            here.enter("rollout")
            if offload_optimizer:
                state = state.replace(train=asleep(state.train))
            completions = rollouts.take(step, state.train.params)
            replies = to_host(completions)
            rollout.stop_if_not_finite(replies, f"step {step}: run.policy")

            # 3.2 Score: log-probabilities, values, reward. The devices work while the hosts judge texts.
            here.enter("score")
            rows = row_lengths(replies)
            fold = row_fold(batch, cast.models.policy, 1, *rows)
            scored = score(state.train.params, cast.frozen, completions, fold=fold)
            rollouts.begin(step + 1, state.train.params)
            here.enter("reward")
            judged = texts(replies, encoded.records, tokenizer)
            here.enter("score")
            scored = jax.block_until_ready(scored)
            if judged.scores is not None:
                scored = scored.replace(scores=to_global(judged.scores, devices))
            if judged.scored is not None:
                scored = scored.replace(scored=to_global(judged.scored, devices))

            # 3.3 Rewards and advantages over the whole rollout; is the sampler the scorer?
            here.enter("prepare")
            prepared, metrics = prepare(scored, state.kl_coefficient)
            measured = fetch(metrics)
            learn.stop_if_sampler_differs(step, measured.get("sampler_gap"), ppo, stale=rollouts.stale)
            learn.warn_if_kl_is_negative(step, measured["kl"], measured["kl_standard_error"])
            spread.warn(step, measured)

            # 3.4 Update; did it begin with the policy that was scored?
            here.enter("update")
            fold = row_fold(batch, cast.models.policy, ppo.minibatches * batch.microbatches, *rows)
            train = awake(state.train, home) if offload_optimizer else state.train
            train, updated = update(train, prepared, step_keys(train_rng, step)[1], cast.frozen, fold=fold)
            learn.stop_if_not_identity(step, fetch(updated)["identity/identity_gap"], ppo, stale=rollouts.stale)

            # 3.5 Adapt the KL coefficient to what was measured.
            now, kl = jnp.asarray(to_host(state.kl_coefficient)), jnp.asarray(measured["kl"], jnp.float32)
            coefficient = learn.next_kl_coefficient(ppo, now, kl, batch.batch_size)
            reported = metrics | updated | judged.metrics | {"kl_coefficient": now}
            state = learn.PPOState(train, on_all(coefficient, devices))

            tokens = int(replies.mask.sum())
            timing = {"slot_use": tokens / int(replies.slot_steps.sum())}
            if not here.log(step, reported, tokens=tokens, timing=timing, batch=prepared):
                state = rollouts.unpacked(here.rolled_back(rollouts.packed(state)), keep=False)
                continue
            here.save(step, rollouts.packed(state), {"data": batches.get_state()})


if __name__ == "__main__":
    launch(run)
