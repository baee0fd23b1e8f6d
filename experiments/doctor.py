"""What is wrong with a training configuration, before it costs days. Nothing is trained, nothing is written to its run_dir.

    python experiments/doctor.py --gin_file=configs/support_desk/ppo.gin

Takes any configuration of train_sft, train_reward or train_ppo, with the same flags. Prints a line a check: ok, note, or
WRONG with the remedy. Exit code 0 when nothing is wrong, else 3.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, learn, programs, rollout
from rlhf_jax.data import Comparison, Demonstration
from rlhf_jax.doctor import (
    Finding,
    arithmetic_check,
    disk_checks,
    gradient_check,
    judge,
    memory_check,
    probe_check,
    rollout_checks,
    template_check,
    text_checks,
    timed_steps,
    token_checks,
    vocabulary_check,
)
from rlhf_jax.io import locate, read_template
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.run import LoopConfig, bound_config, launch
from rlhf_jax.run.cast import assemble, load_cast
from rlhf_jax.run.configurables import BatchConfig, ModelSource, ScoreTexts
from rlhf_jax.run.models import load_model, with_adapters
from rlhf_jax.run.records import Records, encode_prompts, encode_records
from rlhf_jax.types import InputError, RunStopped


@gin.configurable
def run(
    run_dir: str,
    steps: int,
    seed: int,
    batch: BatchConfig,
    loop: LoopConfig,
    model: ModelSource | None = None,
    records: Records | None = None,
    optimizer: learn.OptimizerConfig | None = None,
    centring: float = 0.0,
    policy: ModelSource | None = None,
    prompts: Records | None = None,
    sampling: rollout.SamplingConfig | None = None,
    ppo: learn.PPOConfig | None = None,
    policy_optimizer: learn.OptimizerConfig | None = None,
    value_optimizer: learn.OptimizerConfig | None = None,
    mesh: MeshConfig = MeshConfig(),
    reward: ModelSource | None = None,
    reward_texts: ScoreTexts | None = None,
    reward_key: str = "gold",
    monitor: ScoreTexts | None = None,
    share_trunk: bool = False,
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
    rollout_mesh: MeshConfig | None = None,
    lora: LoraConfig | None = None,
) -> None:
    """The parameters of the three training programs, under their names."""
    bound_config()
    devices, rng = make_mesh(mesh), jax.random.key(seed, impl="threefry2x32")
    given: dict[str, Any] = {"steps": steps, "seed": seed, "batch": batch, "devices": devices, "rng": rng, "lora": lora}
    if ppo is not None:
        wanted = {"policy": policy, "prompts": prompts, "sampling": sampling}
        wanted |= {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
        texts: dict[str, Any] = {"reward_texts": reward_texts, "reward_key": reward_key, "monitor": monitor}
        texts |= {"slots": slots, "rollout_mesh": rollout_mesh}
        checks = ppo_checks(**given, **_all(wanted), **texts, ppo=ppo, reward=reward, share_trunk=share_trunk)
    else:
        wanted = {"model": model, "records": records, "optimizer": optimizer}
        checks = supervised_checks(**given, **_all(wanted), centring=centring)
    shown: list[Finding] = []
    state = None
    try:
        for found in checks:
            if not isinstance(found, Finding):
                state = found  # the last thing a stage's checks give: its state, for the disk
                continue
            shown.append(found)
            print(f"{found.verdict:5}  {found.check}: {found.words}", flush=True)
        for found in disk_checks(state, Path(run_dir).expanduser().absolute(), loop) if state is not None else ():
            shown.append(found)
            print(f"{found.verdict:5}  {found.check}: {found.words}", flush=True)
    except InputError as error:  # the program itself would refuse; what was seen before it stays on the screen
        shown.append(Finding("WRONG", "refused", str(error)))
        print(f"WRONG  refused: {error}", flush=True)
    wrong = [found.check for found in shown if found.verdict == "WRONG"]
    if wrong:
        raise RunStopped(f"doctor: {len(wrong)} of {len(shown)} checks: {', '.join(wrong)}")
    print(f"nothing wrong in {len(shown)} checks")


def _all(wanted: dict[str, Any]) -> dict[str, Any]:
    if missing := [name for name, value in wanted.items() if value is None]:
        raise InputError(
            f"run.{missing[0]}: has no value; doctor takes a configuration of train_sft, train_reward, train_ppo"
        )
    return wanted


def supervised_checks(steps, seed, batch, devices, rng, lora, model, records, optimizer, centring) -> Iterator[Any]:
    """Of SFT and, when the records are comparisons, of the reward model; the state last."""
    pairs = isinstance((*records.train, *records.heldout)[0], Comparison)
    loaded = with_adapters(load_model(model, "scalar" if pairs else "lm", devices, rng), lora, devices, rng)
    yield vocabulary_check(len(loaded.tokenizer), loaded.model.config.vocab_size)

    def encode(record):
        if pairs:
            return data.encode_comparison(record, loaded.tokenizer, records.template, max_length=batch.length)
        return data.encode_demonstration(
            record, loaded.tokenizer, records.template, max_length=batch.length, loss_on=records.loss_on
        )

    train, heldout = encode_records(records, Comparison if pairs else Demonstration, encode)
    documents = [side for item in train.items for side in (item.chosen, item.rejected)] if pairs else train.items
    yield from text_checks(
        documents, sum(train.dropped.values()), loaded.tokenizer, records.template, batch.length, pairs
    )
    yield judge("held-out records", not pairs or bool(heldout.items), str(len(heldout.items)), "they scale the reward")
    loaded.refuse_longer(max(len(document.tokens) for document in documents), "BatchConfig.length")
    shape = {
        "batch_size": batch.batch_size,
        "length": batch.length,
        "seed": seed,
        "pad_id": loaded.tokenizer.pad_token_id,
    }
    rows = data.pack(train.items, batch.length) if batch.packed else train.items
    batches = data.pair_batches(rows, **shape) if pairs else data.token_batches(rows, **shape)
    yield arithmetic_check(len(rows), batch.batch_size, steps)

    example = to_global(next(batches), devices)
    adam = learn.make_optimizer(optimizer, steps)
    network = loaded.model
    if pairs:
        loss = learn.make_reward_loss(lambda p, t: rollout.sequence_scores(network, p, t), centring=centring)
    else:
        loss = learn.make_sft_loss(lambda p, t: rollout.sequence_logprobs(network, p, t))
    if lora is None:
        yield gradient_check(loss, loaded.params, example, batch.microbatches, rng)
    shardings = tree_shardings(network.abstract(), network.logical_axes(), devices)
    state = born_sharded(lambda params: learn.initial_state(params, adam, rng), shardings, devices, loaded.params)
    settings = {"microbatches": batch.microbatches} | ({"centring": centring} if pairs else {})
    build = programs.reward_functions if pairs else programs.sft_functions
    step = build(network, adam, state, devices, **settings).train_step
    yield memory_check(state, ())
    held = [state]

    def one() -> Any:
        held[0], metrics = step(held[0], loaded.frozen, example)
        return metrics

    yield timed_steps(one, steps)
    finite = all(np.isfinite(float(mean.value())) for mean in one().values())
    yield judge("first steps", finite, "finite numbers", "a number is not finite: lower the learning rate")
    yield held[0]


def ppo_checks(
    steps, seed, batch, devices, rng, lora, policy, prompts, sampling, policy_optimizer, value_optimizer,
    reward_texts, reward_key, monitor, slots, rollout_mesh, ppo, reward, share_trunk,
) -> Iterator[Any]:  # fmt: skip
    """Of PPO: one iteration as train_ppo does it; the state last."""
    cast = load_cast(policy, reward, share_trunk, devices, rng, lora=lora)
    yield vocabulary_check(len(cast.policy.tokenizer), cast.models.policy.config.vocab_size)
    same = "policy, reference" + (", reward and value model" if cast.judge else " and value model")
    yield Finding("ok", "tokenizers", f"{same} have one vocabulary")
    if cast.judge is not None and cast.judge.input is not None:
        yield probe_check(locate(cast.judge.input).path, cast.judge.model, cast.judge.params)
    tokenizer, template = cast.policy.tokenizer, prompts.template
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")

    trained = None if cast.policy.input is None else read_template(locate(cast.policy.input).path)
    yield template_check(trained, template)
    encoded, _ = encode_prompts(prompts, tokenizer, batch.length)
    yield from token_checks(encoded.items, tokenizer)
    shape = {"batch_size": batch.batch_size, "length": batch.length, "seed": seed, "pad_id": tokenizer.pad_token_id}
    batches = data.prompt_batches(encoded.items, **shape)
    yield arithmetic_check(len(encoded.items), batch.batch_size, steps)

    settings = programs.PPOSettings(
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
    state, (generate, score, prepare, update) = assemble(cast, settings, template, devices, rng)
    yield memory_check(state, cast.frozen)

    example = to_global(next(batches), devices)
    scored = score(state.train.params, cast.frozen, generate(state.train.params, example, rng, cast.frozen))
    for name, scorer in (("reward_texts", reward_texts), ("monitor", monitor)):
        if scorer is not None:
            values = scorer(*data.responses(scored.completions, encoded.records, tokenizer))
            yield Finding("ok", name, ", ".join(f"{key} {np.mean(value):.3g}" for key, value in sorted(values.items())))
            if name == "reward_texts":
                yield judge("reward_key", reward_key in values, repr(reward_key), f"one of {', '.join(sorted(values))}")
                scored = scored.replace(scores=jnp.asarray(values.get(reward_key, values[min(values)]), jnp.float32))
    prepared, metrics = prepare(scored, state.kl_coefficient)
    yield from rollout_checks(metrics, ppo, sampling.max_new_tokens)
    if lora is None:
        yield gradient_check(
            programs.ppo_loss(cast.models, settings), state.train.params, prepared, batch.microbatches, rng
        )
    held = [state.train]

    def one() -> Any:
        generate(held[0].params, example, rng, cast.frozen)
        held[0], updated = update(held[0], prepared, rng, cast.frozen)
        return updated

    yield timed_steps(one, steps)
    yield state.replace(train=held[0])


if __name__ == "__main__":
    launch(run)
