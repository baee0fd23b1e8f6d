"""The shape of batches."""

from __future__ import annotations

import dataclasses

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shape of a batch.

    batch_size: number of rows (pairs for reward models and DPO, prompts for PPO and GRPO).
    length: number of columns of a row in tokens (of a prompt for PPO and GRPO).
    microbatches: number of parts into which an optimizer step splits the batch to save memory.
    packed: whether several documents share a row.
    folded: whether training reads rows of different lengths two by two and predicts only tokens that count, where that
    saves columns (docs/performance.md); every shape is compiled.
    """

    batch_size: int
    length: int
    microbatches: int = 1
    packed: bool = False
    folded: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "microbatches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"BatchConfig.{name} = {value!r}: give a whole number >= 1")
        if self.batch_size % self.microbatches:
            raise InputError(
                f"BatchConfig.batch_size = {self.batch_size} does not divide into microbatches = {self.microbatches}"
            )
        if not isinstance(self.folded, bool):
            raise InputError(f"BatchConfig.folded = {self.folded!r}: give True or False")
