"""Batches that the data pipeline hands to the devices, as numpy arrays or as arrays of jax.

This module does not import jax: `types` registers the classes as pytrees. Letters in shapes: ``B`` rows of a batch, ``P`` prompt
columns (left-padded), ``T`` response columns (right-padded), ``S`` columns of a whole sequence, ``K`` rows of a group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32


@dataclass(frozen=True)
class _Batch:
    """A frozen dataclass with a method to replace fields."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other fields."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class TokenBatch(_Batch):
    """Token sequences for training and scoring.

    tokens: int32 [B, S].
    positions: int32 [B, S], position of the token inside its own document (restarts at 0 in packed rows).
    segment_ids: int32 [B, S], 0 = padding, 1.. = document number inside the row; attention stays inside a segment.
    loss_mask: bool [B, S], True where the token AT this column is a target (predicted from the column before).
    """

    tokens: Int32[Array, "B S"]
    positions: Int32[Array, "B S"]
    segment_ids: Int32[Array, "B S"]
    loss_mask: Bool[Array, "B S"]


@dataclass(frozen=True)
class RankedBatch(_Batch):
    """Groups of K responses to the same prompt, ranked. Every array has the group first: microbatches are cut over B, never
    through a group. A pair is K = 2: k = 0 was preferred to k = 1.

    rows: arrays of shape [B, K, S].
    mask: bool [B, K], False for rows that only fill up a group or a batch.
    label: float32 [B, K], rank, rating or probability, higher is better, equal labels are ties; of a pair 1 and 0.
    margin: float32 [B], by how much the best response is better (0 when unknown).
    weight: float32 [B], what the group counts in the loss.
    """

    rows: TokenBatch
    mask: Bool[Array, "B K"]
    label: Float[Array, "B K"]
    margin: Float[Array, "B"]  # noqa: F821  (jaxtyping axis name)
    weight: Float[Array, "B"]  # noqa: F821

    @classmethod
    def of_pairs(cls, chosen: TokenBatch, rejected: TokenBatch, margin: Any = None) -> Self:
        """Join two host batches (numpy): row i of ``chosen`` was preferred to row i of ``rejected``. margin: [B], None = 0.

        Rows of padding alone have mask False and label 0; a pair with such a row has weight 0.
        """
        fields = [field.name for field in dataclasses.fields(TokenBatch)]
        sides: Any = {name: np.stack([getattr(chosen, name), getattr(rejected, name)], axis=1) for name in fields}
        rows: Any = TokenBatch(**sides)
        mask: Any = (rows.segment_ids > 0).any(axis=2)
        label: Any = np.where(mask, np.array([1, 0], np.float32), np.float32(0))
        numbers: Any = np.zeros(len(mask), np.float32) if margin is None else np.asarray(margin, np.float32)
        weight: Any = mask.all(axis=1).astype(np.float32)
        return cls(rows, mask, label, numbers, weight)


@dataclass(frozen=True)
class PromptBatch(_Batch):
    """Left-padded prompts.

    tokens: int32 [B, P]. mask: bool [B, P], True on real tokens.
    prompt_id: int32 [B], the prompt's index in its data set. sample_id: int32 [B], 0.. for samples of one prompt.
    seed: int32 [B], at least 0 and below ``SEEDS``: what a prompt's random bits come from instead of prompt_id, or None.
    """

    tokens: Int32[Array, "B P"]
    mask: Bool[Array, "B P"]
    prompt_id: Int32[Array, "B"]  # noqa: F821
    sample_id: Int32[Array, "B"]  # noqa: F821
    seed: Int32[Array, "B"] | None = None  # noqa: F821

    SEEDS: ClassVar[int] = 2**30

    @property
    def noise_id(self) -> Int32[Array, "B"]:  # noqa: F821
        """The number of a prompt that decides its random bits: a seed is none of the prompt_ids, which are below ``SEEDS`` too."""
        return self.prompt_id if self.seed is None else self.SEEDS + self.seed
