"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: a policy from comparisons, without a reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax

from rlhf_jax import data, learn
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.folds import row_fold
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.phases import Phase
from rlhf_jax.algorithms.reward import PairEvaluation, pair_batch_shape, pair_metrics
from rlhf_jax.algorithms.supervised import (
    SupervisedData,
    SupervisedJob,
    first_state,
    load_trained,
    make_step,
    pair_data,
    policy_logprobs,
    supervised_phases,
)
from rlhf_jax.batches import RankedBatch, TokenBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.errors import InputError, check_unused
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold, LoraConfig, Model, lora, sequence_logprobs
from rlhf_jax.parallel import jitted, replicated
from rlhf_jax.types import LossFn, Params


@dataclasses.dataclass(frozen=True)
class DPO:
    """A description of DPO: the parameters of `train_dpo`.

    model: the policy to start from; a frozen copy is the reference, with adapters their base. records: None in a plan.
    """

    model: ModelSource
    batch: BatchConfig
    optimizer: learn.OptimizerConfig
    records: RecordSource | Records | None = None
    dpo: learn.DPOConfig = dataclasses.field(default_factory=learn.DPOConfig)
    lora: LoraConfig | None = None

    name: ClassVar[str] = "dpo"
    run_only: ClassVar[tuple[str, ...]] = ("records",)
    phase_names: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_unused(self.batch, "packed")

    def assemble(self, setting: Setting) -> SupervisedJob:
        """Return policy and reference, the state, the jitted functions and, for a run, the batches."""
        if setting.build.runs and self.model.config is not None:
            raise InputError("ModelSource.config: DPO needs a trained policy: set ModelSource.path, a run of train_sft")
        policy = load_trained(setting, self.model, "lm", self.lora)
        load = setting.build.load
        reference = policy.base("lm") if self.lora else load(self.model, "lm", setting.mesh, setting.rng)
        encoded = self._data(setting, policy) if setting.build.runs else None
        if encoded is None:
            policy.check_max_length(self.batch.length, "BatchConfig.length")
        return self.wire(setting, policy, reference, encoded)

    def wire(
        self, setting: Setting, policy: Loaded, reference: Loaded, encoded: SupervisedData | None
    ) -> SupervisedJob:
        """Return state and jitted functions for models that are loaded."""
        model, mesh, batch = policy.model, setting.mesh, self.batch
        state, optimizer = first_state(setting, policy, self.optimizer)

        def loss(fold: Fold | None) -> LossFn:
            logprobs = policy_logprobs(model.folded(fold))
            return learn.make_dpo_loss(logprobs, _reference_logprobs(reference.model.folded(fold)), self.dpo)

        def evaluate(params: Params, frozen: Params, batch: RankedBatch) -> PairEvaluation:
            terms_of = learn.make_dpo_terms(policy_logprobs(model), _reference_logprobs(reference.model), self.dpo)
            terms, rewards, _ = terms_of(lora.whole(params, frozen), frozen, batch)
            return terms, learn.pair_halves(rewards)

        def fold(pairs: RankedBatch) -> Fold | None:
            columns = (data.pair_lengths(pairs), batch.length, data.pair_targets(pairs), batch.length - 1)
            return row_fold(batch, model, batch.microbatches, *columns)

        job = SupervisedJob(
            name=self.name,
            mesh=mesh,
            models={"policy": model, "reference": reference.model},
            loaded={"policy": policy.without_params()},
            state=state,
            frozen=policy.frozen | {"reference": reference.params},
            train_step=make_step(loss, model, optimizer, state, mesh, batch.microbatches),
            evaluate=jitted(evaluate, out=replicated(mesh)),
            loss=loss(None),
            microbatches=batch.microbatches,
            data=encoded,
            fold=fold,
        )
        return dataclasses.replace(job, heldout=lambda params: pair_metrics(job, params))

    def _data(self, setting: Setting, policy: Loaded) -> SupervisedData:
        encoded = pair_data(setting, self.records, policy, self.batch)
        policy.check_template(data.Form(encoded.records.template, policy.tokenizer), responses=True)
        if any(pair.margin for pair in (*encoded.train.items, *encoded.heldout.items)):
            raise InputError("Fields.margin: the losses of DPO have no margins; unset it (train_reward reads them)")
        return encoded

    def phases(self, job: SupervisedJob) -> list[Phase]:
        """Return the training step and the evaluation, for shapes."""
        return supervised_phases(job, pair_batch_shape(job, self.batch), 2 * self.batch.batch_size, self.batch)


def _reference_logprobs(reference: Model) -> Callable[[Params, TokenBatch], jax.Array]:
    def logprobs(frozen: Params, tokens: TokenBatch) -> jax.Array:
        return sequence_logprobs(reference, frozen["reference"], tokens)[0]

    return logprobs
