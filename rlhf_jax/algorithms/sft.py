"""Supervised fine-tuning: cross-entropy of the target tokens of demonstrations."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from rlhf_jax import data, learn
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.heldout import heldout_terms, loss_metrics
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.phases import Phase, token_batch_shape
from rlhf_jax.algorithms.supervised import (
    Metrics,
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
from rlhf_jax.errors import check_unused
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold, LoraConfig, lora
from rlhf_jax.parallel import jitted, replicated
from rlhf_jax.types import LossFn, Params, Term


@dataclasses.dataclass(frozen=True)
class SFT:
    """A description of supervised fine-tuning: the parameters of `train_sft`. records: None in a plan."""

    model: ModelSource
    batch: BatchConfig
    optimizer: learn.OptimizerConfig
    records: RecordSource | Records | None = None
    lora: LoraConfig | None = None

    name: ClassVar[str] = "sft"
    run_only: ClassVar[tuple[str, ...]] = ("records",)
    phase_names: ClassVar[tuple[str, ...]] = ("train",)
    """Fields that a run needs and a plan does not."""

    def __post_init__(self) -> None:
        check_unused(self.batch, "folded")

    def assemble(self, setting: Setting) -> SupervisedJob:
        """Return the model, its state, the jitted functions and, for a run, the batches."""
        loaded = load_trained(setting, self.model, "lm", self.lora)
        encoded = self._data(setting, loaded) if setting.build.runs else None
        if encoded is None:
            loaded.check_max_length(self.batch.length, "BatchConfig.length")
        return self.wire(setting, loaded, encoded)

    def wire(self, setting: Setting, loaded: Loaded, encoded: SupervisedData | None) -> SupervisedJob:
        """Return state and jitted functions for a model that is loaded."""
        model, mesh = loaded.model, setting.mesh
        state, optimizer = first_state(setting, loaded, self.optimizer)

        def loss(fold: Fold | None) -> LossFn:
            return learn.make_sft_loss(policy_logprobs(model.folded(fold)))

        def evaluate(params: Params, frozen: Params, batch: TokenBatch) -> dict[str, Term]:
            # The loss draws nothing.
            return loss(None)(lora.whole(params, frozen), {}, batch, jax.random.key(0))[0]

        job = SupervisedJob(
            name=self.name,
            mesh=mesh,
            models={"model": model},
            loaded={"model": loaded.without_params()},
            state=state,
            frozen=loaded.frozen,
            train_step=make_step(loss, model, optimizer, state, mesh, self.batch.microbatches),
            evaluate=jitted(evaluate, out=replicated(mesh)),
            loss=loss(None),
            microbatches=self.batch.microbatches,
            data=encoded,
        )
        return dataclasses.replace(job, heldout=lambda params: self._heldout(job, params))

    def _data(self, setting: Setting, loaded: Loaded) -> SupervisedData:
        batch, pad = self.batch, data.padding_id(loaded.tokenizer)

        def encode(record: data.Demonstration, records: Records) -> data.Encoded | data.Skipped:
            settings: dict[str, Any] = {"max_length": batch.length, "loss_on": records.loss_on}
            return data.encode_demonstration(record, loaded.tokenizer, records.template, **settings)

        records, train, heldout = read_records(setting, self.records, data.Demonstration, loaded, encode)
        longest = max((len(item.tokens) for item in (*train.items, *heldout.items)), default=0)
        loaded.check_max_length(longest, "BatchConfig.length")
        rows = data.pack(train.items, batch.length) if batch.packed else train.items
        shape = {"batch_size": batch.batch_size, "length": batch.length, "pad_id": pad}
        batches = data.token_batches(rows, seed=setting.seed, **shape)
        return SupervisedData(records, train, heldout, train.items, batches, len(rows), shape)

    def _heldout(self, job: SupervisedJob, params: Params) -> Metrics:
        assert job.data is not None
        items, shape = job.data.heldout.items, job.data.shape
        rows = data.pack(items, self.batch.length) if self.batch.packed else items
        batches = data.evaluation_batches(rows, **shape)
        return loss_metrics(heldout_terms(job.evaluate, params, job.frozen, batches, job.mesh))

    def phases(self, job: SupervisedJob) -> list[Phase]:
        """Return the training step and the evaluation, for shapes."""
        rows = self.batch.batch_size
        example = token_batch_shape(job.mesh, rows, length=self.batch.length)
        return supervised_phases(job, example, rows, self.batch)
