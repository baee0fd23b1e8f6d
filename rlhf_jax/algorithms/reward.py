"""A reward model from comparisons (Bradley-Terry)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, learn, ops
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.folds import row_fold
from rlhf_jax.algorithms.heldout import heldout_metrics, heldout_scores
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.phases import Phase, row_shape, token_batch_shape
from rlhf_jax.algorithms.supervised import (
    Metrics,
    SupervisedData,
    SupervisedJob,
    first_state,
    load_trained,
    make_step,
    pair_data,
    supervised_phases,
)
from rlhf_jax.batches import RankedBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.errors import InputError, RunStopped, check_unused
from rlhf_jax.io import normalisation_problem
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold, LoraConfig, lora, sequence_scores
from rlhf_jax.parallel import jitted, replicated
from rlhf_jax.storage.files import json_text
from rlhf_jax.storage.names import NORMALISATION
from rlhf_jax.types import LossFn, Params, Term

PairEvaluation = tuple[dict[str, Term], tuple[jax.Array, jax.Array]]
"""(terms of the loss, (rewards of the chosen responses, of the rejected ones), float32 [B] each)."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A description of a pairwise reward model: the parameters of `train_reward`.

    centring: weight of (chosen + rejected)^2. records: None in a plan.
    """

    model: ModelSource
    batch: BatchConfig
    optimizer: learn.OptimizerConfig
    records: RecordSource | Records | None = None
    centring: float = 0.0
    lora: LoraConfig | None = None

    name: ClassVar[str] = "reward"
    run_only: ClassVar[tuple[str, ...]] = ("records",)
    phase_names: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_unused(self.batch, "packed")
        if not self.centring >= 0:
            raise InputError(f"run.centring = {self.centring!r}: give a number >= 0")

    def assemble(self, setting: Setting) -> SupervisedJob:
        """Return the model, its state, the jitted functions and, for a run, the batches."""
        loaded = load_trained(setting, self.model, "scalar", self.lora)
        encoded = pair_data(setting, self.records, loaded, self.batch) if setting.build.runs else None
        if encoded is None:
            loaded.check_max_length(self.batch.length, "BatchConfig.length")
        return self.wire(setting, loaded, encoded)

    def wire(self, setting: Setting, loaded: Loaded, encoded: SupervisedData | None) -> SupervisedJob:
        """Return state and jitted functions for a model that is loaded."""
        model, mesh, batch = loaded.model, setting.mesh, self.batch
        state, optimizer = first_state(setting, loaded, self.optimizer)
        scores_of = functools.partial(sequence_scores, model)

        def loss(fold: Fold | None) -> LossFn:
            return learn.make_reward_loss(
                functools.partial(sequence_scores, model.folded(fold)), centring=self.centring
            )

        def evaluate(params: Params, frozen: Params, batch: RankedBatch) -> PairEvaluation:
            scores = learn.pair_scores(scores_of, lora.whole(params, frozen), batch)
            return learn.reward_terms(*scores, batch, self.centring), scores

        def fold(pairs: RankedBatch) -> Fold | None:
            return row_fold(batch, model, batch.microbatches, data.pair_lengths(pairs), batch.length)

        job = SupervisedJob(
            name=self.name,
            mesh=mesh,
            models={"model": model},
            loaded={"model": loaded.without_params()},
            state=state,
            frozen=loaded.frozen,
            train_step=make_step(loss, model, optimizer, state, mesh, batch.microbatches),
            evaluate=jitted(evaluate, out=replicated(mesh)),
            loss=loss(None),
            microbatches=batch.microbatches,
            data=encoded,
            fold=fold,
            note_without_heldout="; the training pairs scale the reward",
        )
        return dataclasses.replace(job, heldout=lambda params: pair_metrics(job, params))

    def phases(self, job: SupervisedJob) -> list[Phase]:
        """Return the training step and the evaluation, for shapes."""
        return supervised_phases(job, pair_batch_shape(job, self.batch), 2 * self.batch.batch_size, self.batch)


def pair_metrics(job: SupervisedJob, params: Params) -> Metrics:
    """Return accuracy and loss on the held-out comparisons."""
    assert job.data is not None
    items, shape = job.data.heldout.items, job.data.shape
    return heldout_metrics(*heldout_scores(job.evaluate, params, job.frozen, items, job.mesh, **shape))


def pair_batch_shape(job: SupervisedJob, batch: BatchConfig) -> RankedBatch:
    """Return the shapes of what `data.pair_batches` makes."""
    mesh, groups = job.mesh, batch.batch_size
    rows = token_batch_shape(mesh, groups, 2, length=batch.length)
    labels, numbers = row_shape(mesh, jnp.float32, groups, 2), row_shape(mesh, jnp.float32, groups)
    return RankedBatch(rows, row_shape(mesh, jnp.bool_, groups, 2), labels, numbers, numbers)


def scaling_scores(job: SupervisedJob, params: Params) -> tuple[np.ndarray, dict[str, Term]]:
    """Return (rewards [2, N] of the pairs that scale the reward, the terms of the loss on them).

    The pairs are the held-out ones, or the training pairs without a held-out split.
    """
    assert job.data is not None
    return heldout_scores(job.evaluate, params, job.frozen, _scaling_pairs(job), job.mesh, **job.data.shape)


def _scaling_pairs(job: SupervisedJob) -> Sequence[data.EncodedPair]:
    assert job.data is not None
    pairs: Sequence[data.EncodedPair] = job.data.heldout.items or job.data.train.items
    return pairs


def normalisation(job: SupervisedJob, rewards: np.ndarray) -> str:
    """Return the content of reward_normalisation.json: the gain and bias that give ``rewards`` [2, N] mean 0 and deviation 1, and a
    pair with its score to check a loaded model by. Raises RunStopped when the rewards tell no responses apart."""
    pairs = _scaling_pairs(job)
    gain, bias = ops.normalising_gain_bias(float(rewards.mean()), float(rewards.std()))
    if wrong := normalisation_problem(float(gain), float(bias)):
        raise RunStopped(
            f"{NORMALISATION}: {wrong}: held-out rewards have mean {rewards.mean():.3g}, deviation {rewards.std():.3g}: "
            "the model tells no responses apart; train longer, or hold out other comparisons"
        )
    probe = {"tokens": pairs[0].chosen.tokens, "score": float(gain * rewards[0, 0] + bias)}
    return json_text({"gain": float(gain), "bias": float(bias), "pairs": len(pairs), "probe": probe})
