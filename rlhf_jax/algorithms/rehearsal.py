"""One step of an algorithm tried out, for the checks before a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data import Encoded, Template
from rlhf_jax.rewards import Scores
from rlhf_jax.types import LossFn, Mean, Params


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What is checked of encoded data. documents: token sequences that are learned from, None where prompts are only sampled
    to: prompts holds their tokens. left_out: records that were too long. length: columns of a row. heldout: how many records are
    held out, None where there is no such side; note: what that means. examples, examples_a_step: rows in all, and of a step."""

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
    """What is checked of one rollout. limits: PPOConfig or GRPOConfig."""

    metrics: Mapping[str, Mean]
    limits: Any
    max_new_tokens: int


Gradient = tuple[LossFn, Params, Any, Params, int]
"""(loss, trained parameters, batch, frozen parameters, microbatches) of a gradient that must not depend on the microbatches."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """step: run one more optimizer step and return its metrics. state: the state now. text_scores: what rewards of texts said, by
    the parameter of the run; keys: the score among them that counts. gradient: None where adapters train (their base is frozen)."""

    step: Callable[[], Mapping[str, Any]]
    state: Callable[[], Any]
    gradient: Gradient | None
    rollout: RolloutFacts | None = None
    text_scores: Mapping[str, Mapping[str, Scores]] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
