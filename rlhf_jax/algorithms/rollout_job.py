"""PPO or GRPO assembled: models, state, jitted functions, prompts and rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
from jax.sharding import Mesh

from rlhf_jax import learn
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.folds import row_fold
from rlhf_jax.algorithms.models import write_model_card, write_overview
from rlhf_jax.algorithms.prompts import PromptData
from rlhf_jax.algorithms.rehearsal import DataFacts, Gradient, Rehearsal, RolloutFacts
from rlhf_jax.algorithms.roles import Roles
from rlhf_jax.algorithms.rollout_fields import Limits, RolloutAlgorithm
from rlhf_jax.algorithms.rollouts import Rollouts, row_lengths, step_keys
from rlhf_jax.algorithms.sampling import Score, make_generate, make_score
from rlhf_jax.algorithms.saving import SavingRun
from rlhf_jax.algorithms.text_rewards import TextRewards, TextScores
from rlhf_jax.batches import PromptBatch
from rlhf_jax.data import EncodedSet
from rlhf_jax.data.record_sets import report_skipped
from rlhf_jax.errors import InputError
from rlhf_jax.models import Fold, Model
from rlhf_jax.parallel import Jitted, batch_sharding, jitted, replicated, shardings_of, to_global, to_host
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import Completions, LossFn, Mean, Params, Rng, TrainState

PHASES = ("rollout", "score", "reward", "prepare", "update")
"""The parts of an iteration that a deadline or a fault may name."""


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
class StateView:
    """Access to the parts of an algorithm's state.

    subtree: the path of the policy's parameters in a checkpoint. train: return the `TrainState` inside a state. with_train: return
    the state with another `TrainState`. extra: return the further arguments of ``prepare`` that the state holds.
    """

    subtree: str
    train: Callable[[Any], TrainState]
    with_train: Callable[[Any, TrainState], Any]
    extra: Callable[[Any], tuple[Any, ...]] = lambda state: ()


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The functions of an iteration that differ between algorithms, not jitted yet (`RolloutJob` has their jitted forms).

    loss: the loss of the update over whole parameters, which the doctor checks.
    """

    prepare: Callable[..., tuple[Any, dict[str, Mean]]]
    update: Callable[..., tuple[Any, dict[str, Any]]]
    loss: LossFn


@dataclasses.dataclass(frozen=True)
class RolloutJob:
    """PPO or GRPO assembled.

    prepare: (scored, scores of texts, which responses have one, *view.extra(state)) -> (batch of the update, metrics). data,
    source, texts: None in a plan.
    """

    name: str
    algorithm: RolloutAlgorithm
    limits: Limits
    mesh: Mesh
    roles: Roles
    state: Any
    view: StateView
    generate: Jitted[[Params, Params, PromptBatch, Rng], Completions]
    score: Score
    prepare: Jitted[..., tuple[Any, dict[str, Mean]]]
    update: Update
    loss: LossFn
    rng: Rng
    data: PromptData | None = None
    source: Rollouts | None = None
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
        """The parameters that are not trained."""
        return self.roles.frozen

    @property
    def encoded(self) -> EncodedSet[Any, Any]:
        """The encoded prompts."""
        assert self.data is not None
        return self.data.encoded

    @property
    def inputs(self) -> list[Input]:
        """The inputs of the run, for its provenance."""
        return [*self.roles.inputs, *([] if self.data is None else self.data.records.as_inputs())]

    @property
    def rollouts(self) -> Rollouts:
        """The source of the rollouts of a run."""
        assert self.source is not None
        return self.source

    def check(self, evaluate_every: int) -> None:
        """Check that the loop does not evaluate: there is no held-out objective. Raises InputError otherwise."""
        if evaluate_every:
            raise InputError(f"LoopConfig.evaluate_every = {evaluate_every!r}: has no effect here; remove it")

    def begin(self, directory: Path) -> str:
        """Report skipped prompts, write the files that make the run directory a model, and return a line about its parameters."""
        assert self.data is not None
        policy, records = self.roles.policy, self.data.records
        report_skipped(records, self.data.encoded, self.data.dropped, policy.tokenizer)
        place = self.rollouts.within(self.view.subtree)
        source: dict[str, Any] = {"base": policy.input, "generation": policy.generation}
        write_model_card(directory, self.models["policy"], policy.tokenizer, records.template, subtree=place, **source)
        return write_overview(directory, self.params(self.state), self.frozen)

    # ---- the steps of an iteration

    def offload(self, state: Any) -> Any:
        """Return ``state`` with the optimizer's state in host memory, where that is configured: it makes room for a rollout. The
        arrays on the devices are freed with ``state``."""
        return self._move(state, "pinned_host")

    def reload(self, state: Any) -> Any:
        """Return the state of `offload` with the optimizer's state back on the devices."""
        return self._move(state, None)

    def _move(self, state: Any, kind: str | None) -> Any:
        if not self.algorithm.offload_optimizer:
            return state
        shardings = shardings_of(self.view.train(self.state).opt_state)
        if kind is not None:
            shardings = jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)
        train = self.view.train(state)
        moved = dataclasses.replace(train, opt_state=jax.device_put(train.opt_state, shardings))
        return self.view.with_train(state, moved)

    def params(self, state: Any) -> Params:
        """Return the parameters that are trained."""
        return self.view.train(state).params

    def score_fold(self, responses: Completions) -> Fold | None:
        """Return how the scorer folds rows of these lengths. responses: numpy."""
        return row_fold(self.algorithm.batch, self.models["policy"], 1, *row_lengths(responses))

    def update_fold(self, responses: Completions) -> Fold | None:
        """Return how the update folds rows of these lengths. responses: numpy."""
        splits = self.limits.minibatches * self.algorithm.batch.microbatches
        return row_fold(self.algorithm.batch, self.models["policy"], splits, *row_lengths(responses))

    def judge(self, responses: Completions) -> TextScores:
        """Return the scores of the texts of these responses (numpy)."""
        assert self.texts is not None and self.data is not None
        return self.texts(responses, self.data.encoded.records, self.roles.policy.tokenizer)

    def place(self, scores: TextScores) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the scores of texts, and which responses have one, on the devices."""
        host: Any = (dict(scores.scores), scores.scored)
        arrays: tuple[dict[str, jax.Array], jax.Array] = to_global(host, self.mesh)
        return arrays

    def update_key(self, step: int) -> Rng:
        """Return the key that orders the minibatches of the update."""
        return step_keys(self.rng, step)[1]

    def cost(self, responses: Completions) -> dict[str, Any]:
        """Return the number of sampled tokens and the utilisation of the sampler's slots, for the timing of a step."""
        tokens = int(responses.mask.sum())
        assert responses.slot_steps is not None
        return {"tokens": tokens, "timing": {"slot_use": tokens / int(responses.slot_steps.sum())}}

    def check_numbers(self, step: int, values: Mapping[str, float | None]) -> None:
        """Check that sampler, scorer and update agree, before anything of the iteration is saved.

        Warns of a negative KL and of rewards without spread. Raises RunStopped when they contradict each other.
        """
        stale = self.rollouts.stale
        learn.stop_if_sampler_differs(step, values.get("sampler_gap"), self.limits, stale=stale)
        learn.stop_if_not_identity(step, values["identity/identity_gap"], self.limits, stale=stale)
        learn.warn_if_kl_is_negative(step, values.get("kl"), values.get("kl_standard_error"))
        self.spread.warn(step, values)

    # ---- checks before a run

    def data_facts(self) -> DataFacts:
        """Return the facts about the prompts that the doctor checks."""
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
            scored, *self.place(self.texts.chosen(columns, len(responses.ended))), *self.view.extra(state)
        )
        gradient: Gradient | None = None
        if self.models["policy"].lora is None:
            gradient = (self.loss, params, prepared, {}, self.algorithm.batch.microbatches)
        states = [state]

        def step() -> dict[str, Any]:
            self.generate(self.params(states[0]), self.frozen, example, rng)
            states[0], updated = self.update(states[0], self.frozen, prepared, rng, metrics)
            return updated

        facts = RolloutFacts(metrics, self.limits, self.algorithm.sampling.max_new_tokens)
        keys = {"reward_texts": self.texts.key} if "reward_texts" in columns else {}
        return Rehearsal(step, lambda: states[0], gradient, facts, columns, keys)

    # ---- saving

    def _host(self) -> dict[str, Any]:
        assert self.data is not None
        return {"data": self.data.batches.get_state()}

    def restore(self, run: SavingRun) -> Any:
        """Return the state of the run's newest checkpoint, the prompts at their position and the rollout that waits; the first
        state when there is none."""
        assert self.data is not None
        saved, host = run.restore(self.rollouts.packed(self.state), self._host())
        self.data.batches.set_state(host["data"])
        return self.rollouts.unpacked(saved, keep=bool(run.resumed_step))

    def save(self, run: SavingRun, step: int, state: Any) -> None:
        """Offer the state and the position of the prompts to the run, which saves when it is due."""
        run.save(step, self.rollouts.packed(state), self._host())

    def roll_back(self, run: SavingRun, state: Any) -> Any:
        """Return the newest checkpoint's state; the prompts since then are passed over."""
        return self.rollouts.unpacked(run.rolled_back(self.rollouts.packed(state)), keep=False)


def make_rollout_job(
    algorithm: RolloutAlgorithm,
    limits: Limits,
    setting: Setting,
    roles: Roles,
    state: Any,
    *,
    view: StateView,
    iteration: Iteration,
    ends: Mapping[str, Any],
    prompts: PromptData | None,
    texts: TextRewards | None,
) -> RolloutJob:
    """Return the job of an iteration's functions over a state.

    ends: the tokens and texts that end a response (`Roles.ends`). prompts, texts: None in a plan.
    """
    mesh, rng = setting.mesh, setting.train_rng
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    generate = make_generate(roles, algorithm, mesh, ends)
    source = None
    if prompts is not None:
        params = view.train(state).params
        source = Rollouts(
            generate, prompts.batches, mesh, rng, params, roles.frozen, one_step_off=algorithm.one_step_off
        )
    return RolloutJob(
        name=algorithm.name,
        algorithm=algorithm,
        limits=limits,
        mesh=mesh,
        roles=roles,
        state=state,
        view=view,
        generate=generate,
        score=make_score(roles, algorithm, limits, mesh),
        prepare=jitted(iteration.prepare, out=(rows, everywhere)),
        update=jitted(iteration.update, out=(shardings_of(state), everywhere), donate=(0,), static=("fold",)),
        loss=iteration.loss,
        rng=rng,
        data=prompts,
        source=source,
        texts=texts,
    )
