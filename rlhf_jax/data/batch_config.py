"""How rows are batched."""

from __future__ import annotations

import dataclasses

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """batch_size: rows (RM: pairs; PPO: prompts). length: columns of a row (PPO: of a prompt). microbatches: splits of an
    optimiser step. packed: several documents in a row. folded: training reads rows of different lengths two by two, and
    predicts no token that does not count, where that saves columns (docs/performance.md); each shape is a program of its own."""

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
