"""What PPO and GRPO share: sampling, scoring, the data of prompts, and the phases of an iteration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import data, learn, rollout
from rlhf_jax.algorithms import scoring
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.folds import refuse_folded, row_fold
from rlhf_jax.algorithms.models import write_model_card, write_overview
from rlhf_jax.algorithms.phases import Phase, Work, prompt_batch_shape, rng_shape, row_shape, shapes_of_rows
from rlhf_jax.algorithms.rehearsal import DataFacts, Gradient, Rehearsal, RolloutFacts
from rlhf_jax.algorithms.roles import Roles, parameters_by_role
from rlhf_jax.algorithms.rollout_copy import rollout_copy
from rlhf_jax.algorithms.rollouts import Rollouts, row_lengths, step_keys
from rlhf_jax.algorithms.saving import SavingRun
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.algorithms.text_rewards import TextRewards, TextScores
from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource, encode_prompts, open_records, tell_left_out
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model, lora
from rlhf_jax.parallel import (
    Jitted,
    MeshConfig,
    abstract_arrays,
    batch_sharding,
    jitted,
    remake_mesh,
    replicated,
    shardings_of,
    to_global,
    to_host,
)
from rlhf_jax.rollout import SamplingConfig, SlotConfig
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import Completions, LossFn, Mean, Params, Rng, Scored, TrainState

PHASES = ("rollout", "score", "reward", "prepare", "update")
"""The parts of an iteration that a deadline or a fault may name."""


class Limits(Protocol):
    """What is read of PPOConfig and GRPOConfig alike."""

    @property
    def epochs(self) -> int: ...
    @property
    def minibatches(self) -> int: ...
    @property
    def max_sampler_gap(self) -> float: ...
    @property
    def max_identity_gap(self) -> float: ...
    @property
    def old_logprobs(self) -> str: ...
    @property
    def importance(self) -> Any: ...


class RolloutAlgorithm(Protocol):
    """The fields of PPO and GRPO alike."""

    @property
    def batch(self) -> BatchConfig: ...
    @property
    def sampling(self) -> SamplingConfig: ...
    @property
    def slots(self) -> SlotConfig: ...
    @property
    def rollout_mesh(self) -> MeshConfig | None: ...
    @property
    def prompts(self) -> RecordSource | Records | None: ...
    @property
    def offload_optimizer(self) -> bool: ...
    @property
    def one_step_off(self) -> bool: ...


class Score(Protocol):
    """(params, frozen, completions, fold=) -> `Scored`. fold: static, how rows of different lengths are read."""

    def __call__(
        self, params: Params, frozen: Params, completions: Completions, fold: Fold | None = None
    ) -> Scored: ...
    def lower(self, params: Params, frozen: Params, completions: Completions, fold: Fold | None = None) -> Any: ...


class Update(Protocol):
    """(state, frozen, batch, rng, measured, fold=) -> (state, metrics), the state donated. measured: metrics of ``prepare``."""

    def __call__(
        self,
        state: Any,
        frozen: Params,
        batch: Any,
        rng: Rng,
        measured: Mapping[str, Mean],
        fold: Fold | None = None,
    ) -> tuple[Any, dict[str, Any]]: ...
    def lower(
        self,
        state: Any,
        frozen: Params,
        batch: Any,
        rng: Rng,
        measured: Mapping[str, Mean],
        fold: Fold | None = None,
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class PromptData:
    """Encoded prompts. encoded: in the order that prompt_id counts. examples: how many there are to draw from; rows: of a step."""

    records: Records
    encoded: data.EncodedSet[Any, Any]
    dropped: data.EncodedSet[Any, Any]
    batches: data.Batches[Any]
    examples: int
    rows: int


@dataclasses.dataclass(frozen=True)
class RolloutJob:
    """PPO or GRPO assembled.

    train_state: the `TrainState` inside a state; with_train: the state with another. extra: what ``prepare`` takes of a state.
    prepare: (scored, scores of texts, which responses have one, *extra) -> (batch of the update, metrics). data, rollouts, texts:
    None in a plan.
    """

    name: str
    subtree: str
    algorithm: RolloutAlgorithm
    limits: Limits
    mesh: Mesh
    roles: Roles
    state: Any
    train_state: Callable[[Any], TrainState]
    with_train: Callable[[Any, TrainState], Any]
    generate: Jitted[[Params, Params, PromptBatch, Rng], Completions]
    score: Score
    prepare: Jitted[..., tuple[Any, dict[str, Mean]]]
    update: Update
    loss: LossFn
    extra: Callable[[Any], tuple[Any, ...]]
    rng: Rng
    data: PromptData | None = None
    rollouts: Rollouts | None = None
    texts: TextRewards | None = None
    spread: learn.RewardSpread = dataclasses.field(default_factory=learn.RewardSpread)

    phase_names = PHASES
    templates_compared: ClassVar[Mapping[str, bool]] = {"policy": False, "reward": True}
    """Roles whose learned template must be that of the prompts; True: that of responses as well."""
    role_names: ClassVar[Mapping[str, str]] = {"reward": "reward model"}

    @property
    def models(self) -> Mapping[str, Model]:
        """By role; the first is the policy."""
        return self.roles.models

    @property
    def loaded(self) -> Mapping[str, Any]:
        """The models that were read from a source, by role."""
        return self.roles.loaded

    @property
    def frozen(self) -> Params:
        """Parameters that nothing trains."""
        return self.roles.frozen

    @property
    def inputs(self) -> list[Input]:
        """What the run reads, for its provenance."""
        return [*self.roles.inputs, *([] if self.data is None else self.data.records.as_inputs())]

    def check(self, evaluate_every: int) -> None:
        """Raises InputError for a loop that evaluates: there is no held-out objective."""
        if evaluate_every:
            raise InputError(f"LoopConfig.evaluate_every = {evaluate_every!r}: has no effect here; remove it")

    def begin(self, directory: Path) -> None:
        """Say what was left out of the prompts, and write what makes the run directory a model."""
        assert self.data is not None and self.rollouts is not None
        policy, records = self.roles.policy, self.data.records
        tell_left_out(records, self.data.encoded, self.data.dropped, policy.tokenizer)
        place = self.rollouts.within(self.subtree)
        source: dict[str, Any] = {"base": policy.input, "generation": policy.generation}
        write_model_card(directory, self.models["policy"], policy.tokenizer, records.template, subtree=place, **source)
        write_overview(directory, self.params(self.state), self.frozen)

    # ---- the steps of an iteration

    def offload(self, state: Any) -> Any:
        """Return ``state`` with its optimizer's part in the memory of the hosts, where that is configured: device memory for a
        rollout. What was on the devices is freed with ``state``."""
        return self._move(state, "pinned_host")

    def reload(self, state: Any) -> Any:
        """Return what `offload` gave with its optimizer's part back on the devices."""
        return self._move(state, None)

    def _move(self, state: Any, kind: str | None) -> Any:
        if not self.algorithm.offload_optimizer:
            return state
        home = shardings_of(self.train_state(self.state).opt_state)
        if kind is not None:
            home = jax.tree.map(lambda where: where.with_memory_kind(kind), home)
        train = self.train_state(state)
        moved = train.replace(opt_state=jax.device_put(train.opt_state, home))  # type: ignore[attr-defined]
        return self.with_train(state, moved)

    def params(self, state: Any) -> Params:
        """What is trained."""
        return self.train_state(state).params

    def score_fold(self, responses: Completions) -> Fold | None:
        """How the scorer reads rows of these lengths. responses: numpy."""
        return row_fold(self.algorithm.batch, self.models["policy"], 1, *row_lengths(responses))

    def update_fold(self, responses: Completions) -> Fold | None:
        """How the update reads rows of these lengths."""
        splits = self.limits.minibatches * self.algorithm.batch.microbatches
        return row_fold(self.algorithm.batch, self.models["policy"], splits, *row_lengths(responses))

    def judge(self, responses: Completions) -> TextScores:
        """Return what the hosts say of the texts of these responses (numpy)."""
        assert self.texts is not None and self.data is not None
        return self.texts(responses, self.data.encoded.records, self.roles.policy.tokenizer)

    def place(self, scores: TextScores) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the scores of texts, and which responses have one, on the devices."""
        placed: Any = to_global((dict(scores.scores), scores.scored), self.mesh)
        return placed  # type: ignore[no-any-return]

    def update_key(self, step: int) -> Rng:
        """The key that orders the update's minibatches."""
        return step_keys(self.rng, step)[1]

    def measured(self, metrics: Mapping[str, Mean]) -> dict[str, Mean]:
        """Return those metrics of ``prepare`` that the update reads."""
        return update_metrics(metrics)

    def cost(self, responses: Completions) -> dict[str, Any]:
        """Return the sampled tokens, and the share of the sampler's slots that was of use, for the timing of a step."""
        tokens = int(responses.mask.sum())
        assert responses.slot_steps is not None
        return {"tokens": tokens, "timing": {"slot_use": tokens / int(responses.slot_steps.sum())}}

    def check_numbers(self, step: int, values: Mapping[str, float | None]) -> None:
        """Raises RunStopped when sampler, scorer and update contradict each other, so that nothing of the iteration is saved; warns
        of a negative KL and of rewards without spread."""
        assert self.rollouts is not None
        stale = self.rollouts.stale
        learn.stop_if_sampler_differs(step, values.get("sampler_gap"), self.limits, stale=stale)
        learn.stop_if_not_identity(step, values["identity/identity_gap"], self.limits, stale=stale)
        learn.warn_if_kl_is_negative(step, values.get("kl"), values.get("kl_standard_error"))
        self.spread.warn(step, values)

    # ---- checks before a run

    def data_facts(self) -> DataFacts:
        """Return what is checked of the prompts."""
        assert self.data is not None
        shape, rows = self.data, self.data.rows
        return DataFacts(
            shape.records.template, shape.examples, rows, self.algorithm.batch.length, prompts=shape.encoded.items
        )

    def rehearse(self, seed: int) -> Rehearsal:
        """Try one iteration on the first prompts."""
        assert self.data is not None and self.texts is not None
        rng = jax.random.key(seed, impl="threefry2x32")
        example, state = to_global(next(self.data.batches), self.mesh), self.state
        params = self.params(state)
        completions = self.generate(params, self.frozen, example, rng)
        scored = self.score(params, self.frozen, completions)
        responses = to_host(completions)
        columns = self.texts.columns(responses, self.data.encoded.records, self.roles.policy.tokenizer)
        prepared, metrics = self.prepare(
            scored, *self.place(self.texts.chosen(columns, len(responses.ended))), *self.extra(state)
        )
        gradient: Gradient | None = None
        if self.models["policy"].lora is None:
            gradient = (self.loss, params, prepared, {}, self.algorithm.batch.microbatches)
        held, measured = [state], update_metrics(metrics)

        def step() -> dict[str, Any]:
            self.generate(self.params(held[0]), self.frozen, example, rng)
            held[0], updated = self.update(held[0], self.frozen, prepared, rng, measured)
            return updated

        facts = RolloutFacts(metrics, self.limits, self.algorithm.sampling.max_new_tokens)
        keys = {"reward_texts": self.texts.key} if "reward_texts" in columns else {}
        return Rehearsal(step, lambda: held[0], gradient, facts, columns, keys)

    # ---- saving

    def _host(self) -> dict[str, Any]:
        assert self.data is not None
        return {"data": self.data.batches.get_state()}

    def restore(self, run: SavingRun) -> Any:
        """Return the state of the run's newest checkpoint, the prompts at their position and the rollout that waits; the first
        state when there is none."""
        assert self.rollouts is not None and self.data is not None
        saved, host = run.restore(self.rollouts.packed(self.state), self._host())
        self.data.batches.set_state(host["data"])
        return self.rollouts.unpacked(saved, keep=bool(run.resumed_step))

    def save(self, run: SavingRun, step: int, state: Any) -> None:
        """Offer the state and the position of the prompts to the run, which saves when it is due."""
        assert self.rollouts is not None
        run.save(step, self.rollouts.packed(state), self._host())

    def roll_back(self, run: SavingRun, state: Any) -> Any:
        """Return the newest checkpoint's state; the prompts since then are passed over."""
        assert self.rollouts is not None
        return self.rollouts.unpacked(run.rolled_back(self.rollouts.packed(state)), keep=False)


def read_prompts(
    setting: Setting, algorithm: RolloutAlgorithm, roles: Roles, samples: int
) -> tuple[PromptData | None, data.Template]:
    """(prompts encoded and batched, ``samples`` rows of each; None for shapes, their template)."""
    batch, source = algorithm.batch, algorithm.prompts
    columns = batch.length + algorithm.sampling.max_new_tokens
    limit = "BatchConfig.length + SamplingConfig.max_new_tokens"
    if not setting.build.runs:
        roles.refuse_longer(columns, limit)
        return None, data.Template(style="raw") if source is None else source.template
    refuse_folded(batch, setting.mesh)
    assert source is not None and setting.run_dir is not None
    records = with_date(open_records(source), roles.policy, setting.run_dir)
    roles.refuse_other_template(records.template)
    roles.refuse_longer(columns, limit)
    tokenizer = roles.policy.tokenizer
    encoded, dropped = encode_prompts(records, tokenizer, batch.length)
    rollout.refuse_unshared(encoded.items, algorithm.slots)
    shape = {"batch_size": batch.batch_size // samples, "length": batch.length, "pad_id": data.padding_id(tokenizer)}
    batches = data.prompt_batches(encoded.items, samples=samples, seed=setting.seed, **shape)
    return PromptData(
        records, encoded, dropped, batches, len(encoded.items), batch.batch_size // samples
    ), records.template


def make_generate(
    roles: Roles, algorithm: RolloutAlgorithm, mesh: Mesh, ends: Mapping[str, Any]
) -> Jitted[[Params, Params, PromptBatch, Rng], Completions]:
    """Return the jitted sampler. ends: as `Roles.ends` gives it. With a rollout
    mesh it samples on the same devices in another shape (`rollout_copy`)."""
    rollout_mesh = None if algorithm.rollout_mesh is None else remake_mesh(algorithm.rollout_mesh, mesh)
    options = {"sampling": algorithm.sampling, "slots": algorithm.slots, **ends}

    def generate(params: Params, frozen: Params, prompts: PromptBatch, rng: Rng) -> Completions:
        sampler, policy = roles.models["policy"], lora.whole(params, frozen)["policy"]
        if rollout_mesh is not None:
            sampler, policy = rollout_copy(sampler, policy, rollout_mesh)
        return rollout.generate(sampler, policy, prompts, rng, **options)

    return jitted(generate, out=batch_sharding(mesh))


def make_score(roles: Roles, algorithm: RolloutAlgorithm, limits: Limits, mesh: Mesh) -> Score:
    """Return the jitted scorer of all models."""
    settings: dict[str, Any] = {
        "temperature": algorithm.sampling.temperature,
        "sampler_logprobs": limits.old_logprobs == "sampler",
    }

    def score(params: Params, frozen: Params, completions: Completions, fold: Fold | None = None) -> Scored:
        models = scoring.folded(roles.models, fold)
        return scoring.score(models, parameters_by_role(params, frozen), completions, **settings)

    return jitted(score, out=batch_sharding(mesh), static=("fold",))


def text_score_shapes(mesh: Mesh, rows: int, names: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """Return the shapes of what `RolloutJob.place` gives."""
    return {name: row_shape(mesh, np.float32, rows) for name in names}, row_shape(mesh, np.bool_, rows)


def rollout_phases(job: RolloutJob, score_names: Sequence[str]) -> list[Phase]:
    """Return the four phases of an iteration. score_names: of the scores of texts."""
    algorithm, mesh, limits = job.algorithm, job.mesh, job.limits
    extra = job.extra(job.state)
    batch, sampling, frozen = algorithm.batch, algorithm.sampling, job.frozen
    rows, prompt, new = batch.batch_size, batch.length, sampling.max_new_tokens
    train = job.train_state(job.state)
    params, rng, prompts = train.params, rng_shape(), prompt_batch_shape(mesh, rows, prompt)
    completions: Completions = shapes_of_rows(mesh, job.generate, params, frozen, prompts, rng)
    scored: Scored = shapes_of_rows(mesh, job.score, params, frozen, completions)
    texts = text_score_shapes(mesh, rows, score_names)
    prepare = (scored, *texts, *extra)
    prepared = shapes_of_rows(mesh, lambda *arguments: job.prepare(*arguments)[0], *prepare)
    measured = measured_shapes(job, prepare)

    resident: dict[str, Any] = {
        "parameters": params,
        "optimizer": (train.opt_state, train.step, train.rng, *extra),
        "frozen models": frozen,
    }
    if algorithm.one_step_off:
        # Arrays of its own, beside those that a phase reads: memory is counted by identity.
        resident["other rollout"] = jax.tree.map(copy.copy, completions)
    still = {kind: tree for kind, tree in resident.items() if not (algorithm.offload_optimizer and kind == "optimizer")}
    while_sampling = still | {"other rollout": scored} if algorithm.one_step_off else still
    length = prompt + new
    sampler_mesh = None if algorithm.rollout_mesh is None else remake_mesh(algorithm.rollout_mesh, mesh)
    decode = Work("policy", "decode", rows, prompt, new, slots=algorithm.slots.slots, mesh=sampler_mesh)
    read = {"reward": length}
    forward = [Work(role, "forward", rows, length, read.get(role, new)) for role in scoring.ROLES if role in job.models]
    parts: dict[str, Any] = {"parts": limits.minibatches * batch.microbatches, "summed": batch.microbatches > 1}
    trained = [Work(role, "train", rows, length, new, **parts) for role in job.roles.trainable]
    update = (job.state, frozen, prepared, rng, measured)
    tokens = rows * length
    return [
        Phase("generate", job.generate, (params, frozen, prompts, rng), while_sampling, tokens, (decode,)),
        Phase("score", job.score, (params, frozen, completions), still, tokens, tuple(forward)),
        Phase("prepare", job.prepare, prepare, still, tokens),
        Phase("update", job.update, update, resident, tokens, tuple(trained), passes=limits.epochs, looped=True),
    ]


def measured_shapes(job: RolloutJob, arguments: tuple[Any, ...]) -> dict[str, Mean]:
    """Return the shapes of the metrics that the update reads, on all devices."""
    metrics = update_metrics(jax.eval_shape(job.prepare, *arguments)[1])
    placed: dict[str, Mean] = abstract_arrays(metrics, jax.tree.map(lambda _: replicated(job.mesh), metrics))
    return placed


def update_metrics(metrics: Mapping[str, Mean]) -> dict[str, Mean]:
    """Return those metrics of ``prepare`` that the update reads: the KL, for its controller."""
    return {name: metrics[name] for name in ("kl",) if name in metrics}
