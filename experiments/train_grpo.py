"""GRPO and its relatives (DAPO, Dr. GRPO, GSPO, RLOO) against a reward model, or against a programmatic reward.

    python experiments/train_grpo.py --gin_file=configs/support_desk/grpo.gin

One iteration: sample several responses a prompt, score, compare within each prompt, update.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax

from rlhf_jax import data, learn, rollout
from rlhf_jax.algorithms.cast import assemble_grpo, load_cast
from rlhf_jax.algorithms.folds import refuse_folded, row_fold
from rlhf_jax.algorithms.models import write_model_card
from rlhf_jax.algorithms.programs import GRPOSettings, asleep, awake, placed
from rlhf_jax.algorithms.rollouts import Rollouts, refuse_uncorrected, row_lengths, step_keys
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.algorithms.text_rewards import TextRewards
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, encode_prompts, tell_left_out
from rlhf_jax.errors import InputError, refuse_unused, require_whole
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, make_mesh, to_global, to_host
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
    samples: int,
    sampling: rollout.SamplingConfig,
    grpo: learn.GRPOConfig,
    optimizer: learn.OptimizerConfig,
    loop: LoopConfig,
    mesh: MeshConfig = MeshConfig(),
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
    rollout_mesh: MeshConfig | None = None,
    reward: ModelSource | None = None,
    reward_texts: Reward | None = None,
    reward_key: str = "gold",
    monitor: Reward | None = None,
    lora: LoraConfig | None = None,
    offload_optimizer: bool = False,
    one_step_off: bool = False,
) -> None:
    """steps: iterations. batch.batch_size: responses of an iteration, ``samples`` of each prompt. Exactly one of reward (a
    model) and reward_texts (its ``reward_key`` is the score). The rest as in train_ppo."""
    bound = bound_config()
    texts = TextRewards.beside(reward, reward_texts, reward_key, monitor)
    refuse_uncorrected(one_step_off, grpo, texts)
    require_whole("run.samples", samples, 2)
    if batch.batch_size % samples:
        raise InputError(f"BatchConfig.batch_size = {batch.batch_size}: give a multiple of run.samples = {samples}")
    refuse_unused(batch, "packed")
    refuse_unused(loop, "evaluate_every")
    devices = make_mesh(mesh)
    refuse_folded(batch, devices)
    init_rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))

    # 1. Models and prompts.
    anchored = grpo.kl_coefficient > 0
    cast = load_cast(policy, reward, False, devices, init_rng, lora=lora, critic=False, reference=anchored)
    prompts = with_date(prompts, cast.policy, run_dir)
    cast.refuse_other_template(prompts.template)
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")
    tokenizer = cast.policy.tokenizer
    encoded, none = encode_prompts(prompts, tokenizer, batch.length)
    shape = {"batch_size": batch.batch_size // samples, "length": batch.length, "pad_id": data.padding_id(tokenizer)}
    batches = data.prompt_batches(encoded.items, samples=samples, seed=seed, **shape)

    # 2. State, and the four jitted functions.
    settings = GRPOSettings(
        steps=steps,
        samples=samples,
        sampling=sampling,
        grpo=grpo,
        optimizer=optimizer,
        microbatches=batch.microbatches,
        slots=slots,
        rollout_mesh=rollout_mesh,
    )
    state, functions = assemble_grpo(cast, settings, prompts.template, devices, train_rng)
    generate, score, prepare, update = functions
    home = placed(state.opt_state)
    sampled = (generate, batches, devices, train_rng, state.params, cast.frozen)
    rollouts = Rollouts(*sampled, one_step_off=one_step_off)

    # 3. The loop.
    spread = learn.RewardSpread()
    inputs = [*cast.inputs, *prompts.as_inputs()]
    with open_run(run_dir, stage="grpo", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(prompts, encoded, none, tokenizer)
        source = {"base": cast.policy.input, "generation": cast.policy.generation}
        card = {"subtree": rollouts.within("params/policy")} | source
        write_model_card(here.directory, cast.models.policy, tokenizer, prompts.template, **card)
        saved, host = here.restore(rollouts.packed(state), {"data": batches.get_state()})
        state = rollouts.unpacked(saved, keep=bool(here.resumed_step))
        batches.set_state(host["data"])
        for step in here.steps(here.resumed_step, steps):
            # 3.1 Sample.
            here.enter("rollout")
            state = asleep(state) if offload_optimizer else state
            completions = rollouts.take(step, state.params)
            replies = to_host(completions)
            rollout.stop_if_not_finite(replies, f"step {step}: run.policy")

            # 3.2 Score: log-probabilities, reward. The devices work while the hosts judge texts.
            here.enter("score")
            rows = row_lengths(replies)
            scored = score(state.params, cast.frozen, completions, fold=row_fold(batch, cast.models.policy, 1, *rows))
            rollouts.begin(step + 1, state.params)
            here.enter("reward")
            judged = texts(replies, encoded.records, tokenizer)
            here.enter("score")
            scored = jax.block_until_ready(scored)
            if judged.scores is not None:
                scored = scored.replace(scores=to_global(judged.scores, devices))
            if judged.scored is not None:
                scored = scored.replace(scored=to_global(judged.scored, devices))

            # 3.3 Advantages within each prompt's responses; is the sampler the scorer?
            here.enter("prepare")
            prepared, metrics = prepare(scored)
            measured = fetch(metrics)
            learn.stop_if_sampler_differs(step, measured.get("sampler_gap"), grpo, stale=rollouts.stale)
            learn.warn_if_kl_is_negative(step, measured.get("kl"), measured.get("kl_standard_error"))
            spread.warn(step, measured)

            # 3.4 Update; did it begin with the policy that was scored?
            here.enter("update")
            fold = row_fold(batch, cast.models.policy, grpo.minibatches * batch.microbatches, *rows)
            state = awake(state, home) if offload_optimizer else state
            state, updated = update(state, prepared, step_keys(train_rng, step)[1], cast.frozen, fold=fold)
            learn.stop_if_not_identity(step, fetch(updated)["identity/identity_gap"], grpo, stale=rollouts.stale)

            tokens = int(replies.mask.sum())
            timing = {"slot_use": tokens / int(replies.slot_steps.sum())}
            if not here.log(step, metrics | updated | judged.metrics, tokens=tokens, timing=timing, batch=prepared):
                state = rollouts.unpacked(here.rolled_back(rollouts.packed(state)), keep=False)
                continue
            here.save(step, rollouts.packed(state), {"data": batches.get_state()})


if __name__ == "__main__":
    launch(run)
