"""What is wrong with a training configuration, before it costs days. Nothing is trained, nothing is written to its run_dir.

    python experiments/doctor.py --gin_file=configs/support_desk/ppo.gin

Takes any configuration of train_sft, train_reward or train_ppo, with the same flags. Prints a line a check: ok, note, or
WRONG with the remedy. Exit code 0 when nothing is wrong, else 3.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, learn, programs, rollout
from rlhf_jax.data import Comparison, Demonstration
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.run import LoopConfig, bound_config, launch
from rlhf_jax.run.cast import assemble, load_cast
from rlhf_jax.run.checkpoint import Checkpoints, Retention
from rlhf_jax.run.configurables import BatchConfig, ModelSource, ScoreTexts
from rlhf_jax.run.models import Loaded, load_model, with_adapters
from rlhf_jax.run.records import Records, encode_prompts, encode_records
from rlhf_jax.saved import read_arrays, verify
from rlhf_jax.types import InputError, RunStopped, TokenBatch

GRADIENT_GAP = 1e-3
"""Largest relative difference of a gradient between microbatches and none, float32 sums in another order."""
PROBE_GAP = 1e-3
"""Largest difference of a reward model's stored probe score after reload, reward units."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """verdict: 'ok', 'note' or 'WRONG'. words: what was seen and, when wrong, what to do."""

    verdict: str
    check: str
    words: str


def judge(check: str, good: bool, words: str, remedy: str = "") -> Finding:
    """'ok', or 'WRONG' with the remedy."""
    return Finding("ok" if good else "WRONG", check, words if good else f"{words}: {remedy}")


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


# ---- text


def text_checks(
    documents: Sequence[Any], left_out: int, loaded: Loaded, template: Any, limit: int, pairs: bool
) -> Iterator[Finding]:
    """documents: `Encoded`, those that are learned from."""
    tokenizer = loaded.tokenizer
    targets = np.array([sum(document.loss_mask) for document in documents])
    lengths = np.array([len(document.tokens) for document in documents])
    share = targets.sum() / lengths.sum()
    words = f"{len(documents)} documents, {targets.sum()} of {lengths.sum()} tokens are targets ({share:.0%})"
    yield judge(
        "label masks", bool((targets > 0).all()), words, f"{(targets == 0).sum()} have no target; look at the template"
    )
    total = len(documents) + left_out
    words = f"{left_out} of {total} left out; longest kept {lengths.max()} of {limit} columns"
    if left_out <= total / 2:
        yield Finding("ok" if left_out <= total / 10 else "note", "lengths", words)
    else:
        yield judge("lengths", False, words, "most of the data is not learned from: raise BatchConfig.length")
    yield from token_checks([document.tokens for document in documents], tokenizer)
    ends = [document.tokens[-1] for document in documents if document.loss_mask[-1]]
    stops = np.mean([token in data.stop_ids(tokenizer, template) for token in ends]) if ends else 0.0
    words = f"{stops:.0%} of the documents end in a stop token that is a target"
    if pairs:  # a reply that was cut off has none, and the reward model must learn that
        yield Finding("ok" if stops else "note", "end of reply", words)
    else:
        yield judge(
            "end of reply", stops > 0.5, words, "a model that never learns to stop runs to the limit: see Template"
        )


def token_checks(sequences: Sequence[Sequence[int]], tokenizer: Any) -> Iterator[Finding]:
    """BOS, padding, unknown tokens."""
    bos, pad, eos = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos:
        counts = np.array([list(tokens).count(bos) for tokens in sequences])
        inside = bos in tokenizer.encode("x", add_special_tokens=False)
        words = f"{counts.min()} to {counts.max()} a sequence"
        yield judge(
            "BOS",
            counts.max() <= 1 or inside,
            words,
            "written twice: set Template.bos = 'never', or take it out of the text",
        )
    words = f"padding is token {pad}, the end is {eos}"
    same = "; the same token: masks come from lengths here, so the end stays a target" if pad == eos else ""
    yield Finding("note" if same else "ok", "pad and EOS", words + same)
    if (unknown := tokenizer.unk_token_id) is not None:
        flat = np.concatenate([np.asarray(tokens) for tokens in sequences])
        share = float((flat == unknown).mean())
        yield judge(
            "unknown tokens",
            share < 0.01,
            f"{share:.2%}",
            "the tokenizer does not know this text: take the model's own",
        )


def vocabulary_check(loaded: Loaded) -> Finding:
    """Every id of the tokenizer is a row of the embedding."""
    tokens, rows = len(loaded.tokenizer), loaded.model.config.vocab_size
    return judge(
        "vocabulary", tokens <= rows, f"{tokens} tokens, {rows} rows", "set ModelConfig.vocab_size to at least that"
    )


def arithmetic_check(examples: int, batch: BatchConfig, steps: int) -> Finding:
    """How often the data is seen."""
    epochs = steps * batch.batch_size / examples
    words = f"{examples} examples, {batch.batch_size} a step, {steps} steps: {epochs:.2f} epochs"
    return judge(
        "batches", examples >= batch.batch_size, words, "one batch holds an example twice: lower BatchConfig.batch_size"
    )


# ---- numbers


def gradient_check(loss: learn.LossFn, params: Any, example: Any, microbatches: int, rng: jax.Array) -> Finding:
    """Accumulated over microbatches the gradient must be the one of the whole batch."""
    parts = microbatches if microbatches > 1 else 2
    rows = jax.tree.leaves(example)[0].shape[0]
    if rows % parts:
        return Finding("note", "gradient accumulation", f"{rows} rows do not divide into {parts}; not compared")
    whole, other = (
        jax.jit(lambda p, b, n=n: learn.gradients(loss, p, {}, b, rng, n)[0])(params, example) for n in (1, parts)
    )
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True))
    words = f"{parts} microbatches against one: {gap / largest:.1e} of the largest gradient"
    return judge("gradient accumulation", gap <= GRADIENT_GAP * largest, words, "the loss is not a sum over rows")


def timed_steps(step: Callable[[], Any], steps: int) -> Finding:
    """Two steps, the first of which compiles."""
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        jax.block_until_ready(step())
        seconds.append(time.monotonic() - began)
    hours = steps * seconds[1] / 3600
    words = (
        f"{seconds[1]:.2f} s a step after {seconds[0] - seconds[1]:.1f} s of compiling; {steps} steps: {hours:.2f} h"
    )
    return Finding("ok", "time", words)


def memory_check(state: Any, extra: Any) -> Finding:
    """Bytes that stay on the fullest device, before any activation."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves((state, extra)):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    worst = max(held.values())
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    words = f"{worst / 1e9:.3f} GB of parameters and optimiser on the fullest of {len(held)} devices"
    if limit is None:
        return Finding("ok", "memory", f"{words}; activations come on top (experiments/plan.py says how much)")
    return judge(
        "memory", worst < 0.9 * limit, f"{words}, of {limit / 1e9:.1f} GB", "more devices, or a smaller param_dtype"
    )


def probe_check(run_dir: Path, loaded: Loaded) -> Finding:
    """A reward model must score its stored probe as it did when it was trained."""
    file = run_dir / "reward_normalisation.json"
    numbers = json.loads(file.read_text()) if file.is_file() else {}
    if "probe" not in numbers:
        return Finding("note", "reward model", f"{run_dir} keeps no probe (trained by an older version): not compared")
    probe = numbers["probe"]
    tokens = jnp.asarray(probe["tokens"], jnp.int32)[None]
    one = TokenBatch(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))
    score = float(rollout.sequence_scores(loaded.model, loaded.params, one)[0])
    words = f"stored probe {probe['score']:.6f}, now {score:.6f}"
    remedy = "the model loaded is not the one trained: its files were changed"
    return judge("reward model", abs(score - probe["score"]) <= PROBE_GAP, words, remedy)


def disk_checks(state: Any, run_dir: Path, loop: LoopConfig) -> Iterator[Finding]:
    """Writes one checkpoint beside the run directory, reads it again, removes it."""
    parent = next(path for path in run_dir.parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as scratch:
        began = time.monotonic()
        with Checkpoints(scratch, Retention(1)) as checkpoints:
            checkpoints.save(1, state, {})
        seconds, place = time.monotonic() - began, Path(scratch, "checkpoints", "1")
        size = sum(entry["bytes"] for entry in verify(place)["files"].values())
        stored = read_arrays(place)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.device_get(jax.tree.map(_plain, state))))
    same = sum(array.nbytes for array in stored.values()) == held
    yield judge(
        "checkpoint", same, f"{size / 1e6:.1f} MB written, verified and read in {seconds:.1f} s", "not what was saved"
    )
    needed, free = size * (loop.keep + loop.keep_best + 2), shutil.disk_usage(parent).free
    words = f"{free / 1e9:.1f} GB free, {needed / 1e9:.2f} GB for {loop.keep} + {loop.keep_best} steps and one more"
    yield judge("disk", needed < free, words, "lower LoopConfig.keep or take another run_dir")


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


# ---- the stages


def supervised_checks(steps, seed, batch, devices, rng, lora, model, records, optimizer, centring) -> Iterator[Any]:
    """Of SFT and, when the records are comparisons, of the reward model; the state last."""
    pairs = isinstance((*records.train, *records.heldout)[0], Comparison)
    loaded = with_adapters(load_model(model, "scalar" if pairs else "lm", devices, rng), lora, devices, rng)
    yield vocabulary_check(loaded)

    def encode(record):
        if pairs:
            return data.encode_comparison(record, loaded.tokenizer, records.template, max_length=batch.length)
        return data.encode_demonstration(
            record, loaded.tokenizer, records.template, max_length=batch.length, loss_on=records.loss_on
        )

    train, heldout = encode_records(records, Comparison if pairs else Demonstration, encode)
    documents = [side for item in train.items for side in (item.chosen, item.rejected)] if pairs else train.items
    yield from text_checks(documents, sum(train.dropped.values()), loaded, records.template, batch.length, pairs)
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
    yield arithmetic_check(len(rows), batch, steps)

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
    yield vocabulary_check(cast.policy)
    same = "policy, reference" + (", reward and value model" if cast.judge else " and value model")
    yield Finding("ok", "tokenizers", f"{same} have one vocabulary")
    if cast.judge is not None and cast.judge.input is not None:
        yield probe_check(Path(cast.judge.input).expanduser(), cast.judge)
    tokenizer, template = cast.policy.tokenizer, prompts.template
    cast.refuse_longer(batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens")

    encoded, _ = encode_prompts(prompts, tokenizer, batch.length)
    yield from token_checks(encoded.items, tokenizer)
    shape = {"batch_size": batch.batch_size, "length": batch.length, "seed": seed, "pad_id": tokenizer.pad_token_id}
    batches = data.prompt_batches(encoded.items, **shape)
    yield arithmetic_check(len(encoded.items), batch, steps)

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
    kl = float(metrics["kl"].value())
    if "sampler_gap" in metrics:  # else the run's own identity gap measures it
        gap = float(metrics["sampler_gap"].value())
        words = f"{gap:.1e} nats a token, limit {ppo.max_sampler_gap:g}"
        remedy = "the ratio would be wrong: same dtype, no top_k, top_p"
        yield judge("sampler and scorer", gap <= ppo.max_sampler_gap, words, remedy)
    yield judge(
        "reference",
        abs(kl) < 1e-2,
        f"KL {kl:.1e} nats before any update",
        "policy and reference must begin as one model",
    )
    spread = float(metrics["score_std"].value())
    yield judge(
        "reward spread", spread > 0, f"{spread:.3g} over the rollout", "every reply scores alike: nothing to learn from"
    )
    ended, length = (float(metrics[name].value()) for name in ("ended", "response_length"))
    words = f"{ended:.0%} end by themselves, mean length {length:.0f} of {sampling.max_new_tokens}"
    yield judge("replies", ended > 0, words, "raise SamplingConfig.max_new_tokens, or SFT did not learn to stop")

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
