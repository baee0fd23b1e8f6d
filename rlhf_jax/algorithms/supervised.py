"""The parts that SFT, reward models and DPO share: a training step over batches of records, and its held-out evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import optax
from jax.sharding import Mesh

from rlhf_jax import data, learn
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.folds import check_fold
from rlhf_jax.algorithms.models import Loaded, with_adapters, write_model_card, write_overview
from rlhf_jax.algorithms.phases import Phase, Work
from rlhf_jax.algorithms.rehearsal import DataFacts, Rehearsal
from rlhf_jax.algorithms.saving import SavingRun
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.batches import TokenBatch
from rlhf_jax.data import Batches, EncodedSet
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource, encode_records, open_records, report_skipped
from rlhf_jax.errors import InputError
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold, Head, LoraConfig, Model, lora, sequence_logprobs, sequence_logprobs_and_router_loss
from rlhf_jax.parallel import Jitted, jitted, replicated, shardings_of, to_global, tree_shardings
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import LossFn, Mean, Params, PrepareFn, Rng, TrainState

Metrics = Mapping[str, float | None]


class TrainStep(Protocol):
    """(state, frozen, batch, fold=) -> (state, metrics), the state donated. fold: static, how rows of different lengths are read
    (`models.folding`)."""

    def __call__(
        self, state: TrainState, frozen: Params, batch: Any, fold: Fold | None = None
    ) -> tuple[TrainState, dict[str, Mean]]: ...
    def lower(self, state: TrainState, frozen: Params, batch: Any, fold: Fold | None = None) -> Any: ...


@dataclasses.dataclass(frozen=True)
class SupervisedData:
    """Encoded records. documents: token sequences that are learned from, both sides of pairs. examples: rows to learn from.

    shape: batch_size, length and pad_id of evaluation batches.
    """

    records: Records
    train: data.EncodedSet[Any, Any]
    heldout: data.EncodedSet[Any, Any]
    documents: Sequence[data.Encoded]
    batches: data.Batches[Any]
    examples: int
    shape: Mapping[str, int]


def no_heldout(params: Params) -> Metrics:
    """Raise NotImplementedError: the default of an algorithm without held-out metrics."""
    raise NotImplementedError("this algorithm measures nothing on held-out records: give its job a function `heldout`")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A stage of the training step over its whole batch, before microbatches are cut (`learn.make_train_step`).

    function: (fold) -> the stage, over whole parameters without dropout. work: all that models do in it, () where it reads none;
    frozen models that the work names are read by this stage alone.

    Every array of the batch that it returns has rows first: a number of the whole batch is repeated for every row.
    """

    function: Callable[[Fold | None], PrepareFn]
    work: tuple[Work, ...]


@dataclasses.dataclass(frozen=True)
class SupervisedJob:
    """A supervised algorithm assembled. models, loaded: by role; the first is trained. frozen: {"base": ...} with adapters, of DPO
    also {"reference": ...}. loss: over whole parameters. heldout: (params) -> metrics of the held-out records. fold: (host batch)
    -> how its rows are read. data: None in a plan."""

    name: str
    mesh: Mesh
    models: Mapping[str, Model]
    loaded: Mapping[str, Loaded]
    state: TrainState
    frozen: Params
    train_step: TrainStep
    evaluate: Jitted[[Params, Params, Any], Any]
    loss: LossFn
    microbatches: int
    data: SupervisedData | None = None
    heldout: Callable[[Params], Metrics] = no_heldout
    fold: Callable[[Any], Fold | None] = lambda batch: None
    preparation: Preparation | None = None
    """What the training step does before its loss, the same that `make_step` was given."""

    functions: Mapping[str, Jitted[..., Any]] = dataclasses.field(default_factory=dict)
    """Further jitted functions of the algorithm, by name."""
    phase_names: tuple[str, ...] = ("train",)
    """The parts of a step that a deadline or a fault may name."""
    subtree: str = "params"
    """Where a checkpoint keeps the parameters of the model."""
    note_without_heldout: str = ""
    """The consequence of a run without a held-out split, for the doctor."""

    templates_compared: ClassVar[Mapping[str, bool]] = {"policy": True}
    """Roles whose learned template must be the data's; True: that of responses as well."""
    role_names: ClassVar[Mapping[str, str]] = {}

    @property
    def inputs(self) -> list[Input]:
        """The inputs of the run, for its provenance."""
        model = next(iter(self.loaded.values()))
        return [*model.as_inputs("model"), *([] if self.data is None else self.data.records.as_inputs())]

    @property
    def encoded(self) -> EncodedSet[Any, Any]:
        """The encoded training records."""
        assert self.data is not None
        return self.data.train

    @property
    def batches(self) -> Batches[Any]:
        """The training batches, numpy."""
        assert self.data is not None
        return self.data.batches

    def check(self, evaluate_every: int) -> None:
        """Check that a loop that evaluates has held-out records. Raises InputError otherwise."""
        if evaluate_every and self.data is not None and not self.data.heldout.items:
            raise InputError("LoopConfig.evaluate_every: there are no held-out records; set it to 0, or hold some out")

    def begin(self, directory: Path) -> str:
        """Report skipped records, write the files that make the run directory a model, and return a line about its parameters."""
        assert self.data is not None
        model = next(iter(self.loaded.values()))
        records = self.data.records
        report_skipped(records, self.data.train, self.data.heldout, model.tokenizer)
        source: dict[str, Any] = {"base": model.input, "generation": model.generation}
        write_model_card(directory, model.model, model.tokenizer, records.template, self.subtree, **source)
        return write_overview(directory, self.state.params, self.frozen)

    def place(self, batch: Any) -> Any:
        """Return a host batch on the devices."""
        return to_global(batch, self.mesh)

    def restore(self, run: SavingRun) -> TrainState:
        """Return the state of the run's newest checkpoint, the data at its position; the first state when there is none."""
        state: TrainState
        state, host = run.restore(self.state, {"data": self.batches.get_state()})
        self.batches.set_state(host["data"])
        return state

    def save(self, run: SavingRun, step: int, state: TrainState) -> None:
        """Offer the state and the position of the data to the run, which saves when it is due."""
        run.save(step, state, {"data": self.batches.get_state()})

    def roll_back(self, run: SavingRun, state: TrainState) -> TrainState:
        """Return the newest checkpoint's state; the batches since then are passed over."""
        restored: TrainState = run.rolled_back(state)
        return restored

    def data_facts(self) -> DataFacts:
        """Return what is checked of the data."""
        assert self.data is not None
        encoded = self.data
        return DataFacts(
            template=encoded.records.template,
            examples=encoded.examples,
            examples_a_step=encoded.shape["batch_size"],
            length=encoded.shape["length"],
            documents=encoded.documents,
            left_out=sum(encoded.train.dropped.values()),
            pairs=len(encoded.documents) != len(encoded.train.items),
            heldout=len(encoded.heldout.items),
            note="" if encoded.heldout.items else self.note_without_heldout,
        )

    def rehearse(self, seed: int) -> Rehearsal:
        """Try one step on the first batch."""
        example, states = self.place(next(self.batches)), [self.state]
        trained = next(iter(self.models.values()))
        gradient = None
        if trained.lora is None:
            prepared = self._prepared(example, jax.random.key(seed, impl="threefry2x32"))
            gradient = (self.loss, self.state.params, prepared, self.frozen, self.microbatches)

        def step() -> dict[str, Mean]:
            states[0], metrics = self.train_step(states[0], self.frozen, example)
            return metrics

        return Rehearsal(step, lambda: states[0], gradient)

    def _prepared(self, batch: Any, rng: Rng) -> Any:
        """Return a batch as the loss gets it."""
        if self.preparation is None:
            return batch
        return jax.jit(_on_whole(self.preparation.function(None)))(self.state.params, self.frozen, batch, rng)[0]


def load_trained(setting: Setting, source: ModelSource, head: Head, adapters: LoraConfig | None) -> Loaded:
    """Return the model that is trained, with adapters where they are configured."""
    loaded = setting.build.load(source, head, setting.mesh, setting.rng)
    return with_adapters(loaded, adapters, setting.mesh, setting.rng)


def read_records(
    setting: Setting,
    source: RecordSource | Records | None,
    kind: type,
    loaded: Loaded,
    encode: Callable[[Any, Records], Any],
) -> tuple[Records, data.EncodedSet[Any, Any], data.EncodedSet[Any, Any]]:
    """Return (records with the date that their template writes, encoded training split, encoded held-out split)."""
    assert setting.run_dir is not None and source is not None
    records = with_date(open_records(source), loaded, setting.run_dir)
    train, heldout = encode_records(records, kind, lambda record: encode(record, records))
    return records, train, heldout


def pair_data(
    setting: Setting, source: RecordSource | Records | None, loaded: Loaded, batch: BatchConfig
) -> SupervisedData:
    """Return comparisons encoded and batched."""
    check_fold(batch, setting.mesh)

    def encode(record: data.Comparison, records: Records) -> data.EncodedPair | data.Skipped:
        return data.encode_comparison(record, loaded.tokenizer, records.template, max_length=batch.length)

    records, train, heldout = read_records(setting, source, data.Comparison, loaded, encode)
    loaded.check_max_length(batch.length, "BatchConfig.length")
    shape = {"batch_size": batch.batch_size, "length": batch.length, "pad_id": data.padding_id(loaded.tokenizer)}
    batches = data.pair_batches(train.items, seed=setting.seed, **shape)
    documents = [side for item in train.items for side in (item.chosen, item.rejected)]
    return SupervisedData(records, train, heldout, documents, batches, len(train.items), shape)


def policy_logprobs(model: Model) -> Callable[[Params, TokenBatch], tuple[jax.Array, ...]]:
    """Return the function (parameters, tokens) -> (log-probabilities, entropy) that a supervised loss calls on the trained model.

    When the router_coefficient of the model is above 0, the function also returns the loss of the routers.
    """
    read = sequence_logprobs_and_router_loss if model.config.router_coefficient > 0 else sequence_logprobs
    return lambda params, tokens: read(model, params, tokens)


def first_state(
    setting: Setting, loaded: Loaded, optimizer: learn.OptimizerConfig
) -> tuple[TrainState, optax.GradientTransformation]:
    """Return (the state at step 0, its optimizer)."""
    model = loaded.model
    adam = learn.make_optimizer(optimizer, setting.steps, matrices=model.matrices())
    shardings = tree_shardings(model.abstract(), model.logical_axes(), setting.mesh)

    def begin(params: Params) -> TrainState:
        return learn.initial_state(params, adam, setting.train_rng)

    return setting.build.init(begin, shardings, setting.mesh, loaded.params), adam


def make_step(
    loss: Callable[[Fold | None], LossFn],
    model: Model,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    microbatches: int,
    preparation: Preparation | None = None,
) -> TrainStep:
    """Return the jitted training step. loss: over whole parameters, with rows read so (None: as they come)."""

    def train_step(
        state: TrainState, frozen: Params, batch: Any, fold: Fold | None = None
    ) -> tuple[TrainState, dict[str, Mean]]:
        adapted = lora.on_adapters(loss(fold), model.lora)
        prepare = None if preparation is None else _on_whole(preparation.function(fold))
        step = learn.make_train_step(adapted, optimizer, microbatches=microbatches, prepare=prepare)
        return step(state, frozen, batch)

    return jitted(train_step, out=(shardings_of(state), replicated(mesh)), donate=(0,), static=("fold",))


def _on_whole(prepare: PrepareFn) -> PrepareFn:
    """Return a stage over whole parameters as one over what is trained."""
    return lambda trained, frozen, batch, rng: prepare(lora.whole(trained, frozen), frozen, batch, rng)


def supervised_phases(job: SupervisedJob, example: Any, sequences: int, batch: BatchConfig) -> list[Phase]:
    """Return the training step and the evaluation as phases, each with the preparation where there is one. example: the shapes of
    a batch; sequences: how many it holds."""
    resident: dict[str, Any] = {
        "parameters": job.state.params,
        "optimizer": (job.state.opt_state, job.state.step, job.state.rng),
    }
    if job.frozen:
        resident["frozen models"] = job.frozen
    trained, *frozen_roles = job.models
    length, tokens = batch.length, sequences * batch.length
    ahead = () if job.preparation is None else job.preparation.work
    prepared_roles = {work.role for work in ahead}
    beside = [Work(role, "forward", sequences, length, length) for role in frozen_roles if role not in prepared_roles]
    cut = [dataclasses.replace(work, parts=batch.microbatches) for work in beside]
    parts: dict[str, Any] = {"parts": batch.microbatches, "summed": batch.microbatches > 1}
    train = Work(trained, "train", sequences, length, length, **parts)
    forward = Work(trained, "forward", sequences, length, length)
    step, evaluation = (job.state, job.frozen, example), (job.state.params, job.frozen, example)
    return [
        Phase(f"{job.name} step", job.train_step, step, resident, tokens, (train, *cut, *ahead)),
        Phase(f"{job.name} evaluate", job.evaluate, evaluation, resident, tokens, (forward, *beside, *ahead)),
    ]
