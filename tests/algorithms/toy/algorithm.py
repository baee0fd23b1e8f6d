"""Fine-tuning with an anchor, assembled."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from rlhf_jax import data, learn
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.phases import Phase, token_batch_shape
from rlhf_jax.algorithms.supervised import (
    SupervisedData,
    SupervisedJob,
    first_state,
    load_trained,
    make_step,
    policy_logprobs,
    read_records,
    supervised_phases,
)
from rlhf_jax.batches import TokenBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold
from rlhf_jax.parallel import jitted, replicated
from rlhf_jax.types import LossFn, Mean, Params, Term


@dataclasses.dataclass(frozen=True)
class Anchored:
    """A description of anchored fine-tuning: the parameters of `train_anchored`."""

    model: ModelSource
    batch: BatchConfig
    optimizer: learn.OptimizerConfig
    anchor: learn.AnchorConfig
    records: RecordSource | Records | None = None

    name: ClassVar[str] = "anchored"
    run_only: ClassVar[tuple[str, ...]] = ("records",)
    phase_names: ClassVar[tuple[str, ...]] = ("train", "measure")

    def assemble(self, setting: Setting) -> SupervisedJob:
        """Return the model, its anchor, the state, the jitted functions and, for a run, the batches."""
        loaded = load_trained(setting, self.model, "lm", None)
        anchor = setting.build.load(
            self.model, "lm", setting.mesh, setting.rng
        ).params  # a real copy: the state is donated
        model, mesh = loaded.model, setting.mesh
        state, optimizer = first_state(setting, loaded, self.optimizer)

        def loss(fold: Fold | None) -> LossFn:
            return learn.make_anchor_loss(policy_logprobs(model.folded(fold)), self.anchor)

        def evaluate(params: Params, frozen: Params, batch: TokenBatch) -> dict[str, Term]:
            return loss(None)(params, frozen, batch, jax.random.key(0))[0]

        def measure(params: Params, frozen: Params) -> Mean:
            return learn.distance(params, frozen["anchor"])

        return SupervisedJob(
            name=self.name,
            mesh=mesh,
            models={"model": model},
            loaded={"model": loaded.without_params()},
            state=state,
            frozen={"anchor": anchor},
            train_step=make_step(loss, model, optimizer, state, mesh, self.batch.microbatches),
            evaluate=jitted(evaluate, out=replicated(mesh)),
            loss=loss(None),
            microbatches=self.batch.microbatches,
            data=self._data(setting, loaded) if setting.build.runs else None,
            functions={"measure": jitted(measure, out=replicated(mesh))},
            phase_names=self.phase_names,
            subtree="params",
        )

    def _data(self, setting: Setting, loaded: Any) -> SupervisedData:
        def encode(record: data.Demonstration, records: Records) -> data.Encoded | data.Skipped:
            return data.encode_demonstration(record, loaded.tokenizer, records.template, max_length=self.batch.length)

        records, train, heldout = read_records(setting, self.records, data.Demonstration, loaded, encode)
        pad = data.padding_id(loaded.tokenizer)
        shape = {"batch_size": self.batch.batch_size, "length": self.batch.length, "pad_id": pad}
        batches = data.token_batches(train.items, seed=setting.seed, **shape)
        return SupervisedData(records, train, heldout, train.items, batches, len(train.items), shape)

    def phases(self, job: SupervisedJob) -> list[Phase]:
        """Return training step, evaluation and measurement, for shapes."""
        rows = self.batch.batch_size
        example = token_batch_shape(job.mesh, rows, length=self.batch.length)
        phases = supervised_phases(job, example, rows, self.batch)
        resident = phases[0].resident
        measure = Phase("anchored measure", job.functions["measure"], (job.state.params, job.frozen), resident, 0)
        return [*phases, measure]
