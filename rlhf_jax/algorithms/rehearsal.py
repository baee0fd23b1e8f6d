"""A rehearsal: one step of an algorithm, run for the checks of the doctor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data import Encoded, Template
from rlhf_jax.rewards import Scores
from rlhf_jax.types import LossFn, Mean, Params


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """Facts about encoded data that the doctor checks.

    documents: token sequences to train on; None for an algorithm that samples, whose tokens are in prompts. left_out: records that
    were
    too long. length: columns of a row. heldout: number of held-out records, None where there is no held-out split; note: its
    consequence. examples, examples_a_step: rows in all and of a step.
    """

    template: Template
    examples: int
    examples_a_step: int
    length: int
    documents: Sequence[Encoded] | None = None
    prompts: Sequence[Sequence[int]] = ()
    left_out: int = 0
    pairs: bool = False
    heldout: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RolloutFacts:
    """Facts about one rollout that the doctor checks. limits: PPOConfig or GRPOConfig."""

    metrics: Mapping[str, Mean]
    limits: Any
    max_new_tokens: int


Gradient = tuple[LossFn, Params, Any, Params, int]
"""(loss, trained parameters, batch, frozen parameters, microbatches) of a gradient that must not depend on the microbatches."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """One step of an algorithm and what it measured.

    step: run one more optimizer step and return its metrics. state: return the current state. text_scores: scores of text rewards
    by
    parameter of the run; keys: the score among them that is trained on. gradient: None with adapters, whose base is frozen.
    """

    step: Callable[[], Mapping[str, Any]]
    state: Callable[[], Any]
    gradient: Gradient | None
    rollout: RolloutFacts | None = None
    text_scores: Mapping[str, Mapping[str, Scores]] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
