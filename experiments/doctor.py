"""What is wrong with a training configuration, before it costs days. Nothing is trained, nothing is written to its run_dir.

    python experiments/doctor.py --gin_file=configs/support_desk/ppo.gin

Takes any configuration of train_sft, train_reward, train_dpo, train_ppo or train_grpo, with the same flags. One with
comparisons is a reward model's, unless it binds run.dpo. Prints a line a check: ok, note, or WRONG with the remedy. Exit
code 0 when nothing is wrong, else 3.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, learn, rollout
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.cast import assemble, assemble_grpo, load_cast
from rlhf_jax.algorithms.models import load_model, with_adapters
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.config import bound_config
from rlhf_jax.data import Comparison, Demonstration
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, encode_prompts, encode_records
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
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.io import largest_token, locate
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.rewards import CheckedReward, Reward, Scores


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
    dpo: learn.DPOConfig | None = None,
    policy: ModelSource | None = None,
    prompts: Records | None = None,
    sampling: rollout.SamplingConfig | None = None,
    ppo: learn.PPOConfig | None = None,
    policy_optimizer: learn.OptimizerConfig | None = None,
    value_optimizer: learn.OptimizerConfig | None = None,
    grpo: learn.GRPOConfig | None = None,
    samples: int = 1,
    mesh: MeshConfig = MeshConfig(),
    reward: ModelSource | None = None,
    reward_texts: Reward | None = None,
    reward_key: str = "gold",
    monitor: Reward | None = None,
    share_trunk: bool = False,
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
    rollout_mesh: MeshConfig | None = None,
    lora: LoraConfig | None = None,
    offload_optimizer: bool = False,
    one_step_off: bool = False,
) -> None:
    """The parameters of the five training programs, under their names."""
    del offload_optimizer, one_step_off  # the same programs; the latter on numbers of an older policy
    bound_config()
    devices, rng = make_mesh(mesh), jax.random.key(seed, impl="threefry2x32")
    given: dict[str, Any] = {"run_dir": run_dir, "steps": steps, "seed": seed, "batch": batch, "lora": lora}
    given |= {"devices": devices, "rng": rng}
    if ppo is not None or grpo is not None:
        if ppo is not None:
            adams = _all({"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer})
            own: dict[str, Any] = {**adams, "ppo": ppo, "share_trunk": share_trunk}
        else:
            own = {**_all({"optimizer": optimizer}), "grpo": grpo, "samples": samples}
        wanted = {"policy": policy, "prompts": prompts, "sampling": sampling}
        texts: dict[str, Any] = {"reward_texts": reward_texts, "reward_key": reward_key, "monitor": monitor}
        decoding = {"slots": slots, "rollout_mesh": rollout_mesh}
        checks = rollout_run_checks(**given, **_all(wanted), **texts, reward=reward, own=own | decoding)
    else:
        wanted = {"model": model, "records": records, "optimizer": optimizer}
        checks = supervised_checks(**given, **_all(wanted), centring=centring, dpo=dpo)
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
        raise InputError(f"run.{missing[0]}: has no value; doctor takes a configuration of a training program")
    return wanted


def supervised_checks(
    run_dir, steps, seed, batch, devices, rng, lora, model, records, optimizer, centring, dpo
) -> Iterator[Any]:
    """Of SFT and, when the records are comparisons, of the reward model or of DPO; the state last."""
    pairs = isinstance((*records.train, *records.heldout)[0], Comparison)
    loaded = with_adapters(
        load_model(model, "scalar" if pairs and dpo is None else "lm", devices, rng), lora, devices, rng
    )
    records = with_date(records, loaded, run_dir)
    yield vocabulary_check(largest_token(loaded.tokenizer)[0] + 1, loaded.model.config.vocab_size)

    def encode(record):
        if pairs:
            return data.encode_comparison(record, loaded.tokenizer, records.template, max_length=batch.length)
        return data.encode_demonstration(
            record, loaded.tokenizer, records.template, max_length=batch.length, loss_on=records.loss_on
        )

    train, heldout = encode_records(records, Comparison if pairs else Demonstration, encode)
    if dpo is not None:
        difference = loaded.template_difference(data.Form(records.template, loaded.tokenizer), responses=True)
        yield template_check("policy", loaded.template is not None, difference)
    documents = [side for item in train.items for side in (item.chosen, item.rejected)] if pairs else train.items
    yield from text_checks(
        documents, sum(train.dropped.values()), loaded.tokenizer, records.template, batch.length, pairs
    )
    scaled = "; the training pairs scale the reward" if pairs and dpo is None and not heldout.items else ""
    yield Finding("note" if scaled else "ok", "held-out records", f"{len(heldout.items)}{scaled}")
    loaded.refuse_longer(max(len(document.tokens) for document in documents), "BatchConfig.length")
    shape = {
        "batch_size": batch.batch_size,
        "length": batch.length,
        "seed": seed,
        "pad_id": data.padding_id(loaded.tokenizer),
    }
    rows = data.pack(train.items, batch.length) if batch.packed else train.items
    batches = data.pair_batches(rows, **shape) if pairs else data.token_batches(rows, **shape)
    yield arithmetic_check(len(rows), batch.batch_size, steps)

    example = to_global(next(batches), devices)
    adam = learn.make_optimizer(optimizer, steps, matrices=loaded.model.matrices())
    network, frozen, settings = loaded.model, loaded.frozen, {"microbatches": batch.microbatches}
    if dpo is not None:
        reference = load_model(model, "lm", devices, rng) if lora is None else loaded.base("lm")
        frozen = frozen | {"reference": reference.params}
        build = functools.partial(programs.dpo_functions, network, reference.model, dpo=dpo)
        loss = programs.dpo_loss(network, reference.model, dpo)
    elif pairs:
        build = functools.partial(programs.reward_functions, network, centring=centring)
        loss = programs.reward_loss(network, centring)
    else:
        build = functools.partial(programs.sft_functions, network)
        loss = programs.sft_loss(network)
    if lora is None:
        yield gradient_check(loss, loaded.params, example, batch.microbatches, rng, frozen)
    shardings = tree_shardings(network.abstract(), network.logical_axes(), devices)
    state = born_sharded(lambda params: learn.initial_state(params, adam, rng), shardings, devices, loaded.params)
    step = build(adam, state, devices, **settings).train_step
    yield memory_check(state, frozen)
    held = [state]

    def one() -> Any:
        held[0], metrics = step(held[0], frozen, example)
        return metrics

    yield timed_steps(one, steps)
    finite = all(np.isfinite(float(mean.value())) for mean in one().values())
    yield judge("first steps", finite, "finite numbers", "a number is not finite: lower the learning rate")
    yield held[0]


def rollout_run_checks(
    run_dir,
    steps,
    seed,
    batch,
    devices,
    rng,
    lora,
    policy,
    prompts,
    sampling,
    reward_texts,
    reward_key,
    monitor,
    reward,
    own,
) -> Iterator[Any]:
    """Of PPO and GRPO: one iteration as train_ppo or train_grpo does it; the state last. own: the rest of their settings."""
    given = {"reward_texts": reward_texts, "monitor": monitor}
    scorers = {name: CheckedReward(scorer, f"run.{name}") for name, scorer in given.items() if scorer is not None}
    make = programs.PPOSettings if "ppo" in own else programs.GRPOSettings
    settings = make(steps=steps, sampling=sampling, microbatches=batch.microbatches, **own)
    grouped = isinstance(settings, programs.GRPOSettings)
    limits, samples = (settings.grpo, settings.samples) if grouped else (settings.ppo, 1)
    needed = {"critic": False, "reference": limits.kl_coefficient > 0} if grouped else {}
    cast = load_cast(policy, reward, not grouped and settings.share_trunk, devices, rng, lora=lora, **needed)
    yield vocabulary_check(largest_token(cast.policy.tokenizer)[0] + 1, cast.models.policy.config.vocab_size)
    models = [field.name for field in dataclasses.fields(cast.models) if getattr(cast.models, field.name) is not None]
    yield Finding("ok", "tokenizers", f"one vocabulary: {', '.join(models)}")
    if cast.judge is not None and cast.judge.input is not None:
        yield probe_check(locate(cast.judge.input).path, cast.judge.model, cast.judge.params)
    prompts = with_date(prompts, cast.policy, run_dir)
    tokenizer, template = cast.policy.tokenizer, prompts.template
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")

    used = data.Form(template, tokenizer)
    for name, model in (("policy", cast.policy), ("reward model", cast.judge)):
        if model is not None:
            difference = model.template_difference(used, responses=model is cast.judge)
            yield template_check(name, model.template is not None, difference)
    encoded, _ = encode_prompts(prompts, tokenizer, batch.length)
    yield from token_checks(encoded.items, tokenizer)
    asked = batch.batch_size // samples
    shape = {"batch_size": asked, "length": batch.length, "seed": seed, "pad_id": data.padding_id(tokenizer)}
    batches = data.prompt_batches(encoded.items, samples=samples, **shape)
    yield arithmetic_check(len(encoded.items), asked, steps)

    if grouped:
        train, functions = assemble_grpo(cast, settings, template, devices, rng)
        whole, controller, loss = train, (), programs.grpo_loss(cast.models, settings)
    else:
        whole, functions = assemble(cast, settings, template, devices, rng)
        train, controller, loss = whole.train, (whole.kl_coefficient,), programs.ppo_loss(cast.models, settings)
    generate, score, prepare, update = functions
    yield memory_check(whole, cast.frozen)

    example = to_global(next(batches), devices)
    scored = score(train.params, cast.frozen, generate(train.params, example, rng, cast.frozen))
    for name, scorer in scorers.items():
        values = scorer(data.responses(scored.completions, encoded.records, tokenizer))
        failed = any(column.failed for column in values.values())
        told = ", ".join(_told(key, column) for key, column in sorted(values.items()))
        yield Finding("note" if failed else "ok", name, told)
        if name == "reward_texts":
            yield judge("reward_key", reward_key in values, repr(reward_key), f"one of {', '.join(sorted(values))}")
            column = values.get(reward_key, values[min(values)])
            scored = scored.replace(scores=jnp.asarray(column.values, jnp.float32))
            if column.failed:
                scored = scored.replace(scored=jnp.asarray(column.scored))
    prepared, metrics = prepare(scored, *controller)
    yield from rollout_checks(metrics, limits, sampling.max_new_tokens)
    if lora is None:
        yield gradient_check(loss, train.params, prepared, batch.microbatches, rng)
    held = [train]

    def one() -> Any:
        generate(held[0].params, example, rng, cast.frozen)
        held[0], updated = update(held[0], prepared, rng, cast.frozen)
        return updated

    yield timed_steps(one, steps)
    yield held[0] if grouped else whole.replace(train=held[0])


def _told(key: str, column: Scores) -> str:
    """'gold 0.5', and what kept responses from being scored."""
    mean = "no score" if column.mean is None else f"{column.mean:.3g}"
    return f"{key} {mean}" + (f" ({column.failed} failed: {column.reason})" if column.failed else "")


if __name__ == "__main__":
    launch(run)
