"""What a family of checkpoints is, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.models.config import ModelConfig

Fields = Mapping[str, Any]
"""A config.json."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a name table.

    theirs: tensor name; ``{layer}`` and ``{expert}`` stand for numbers. ours: path of the parameter; with ``{layer}`` in
    ``theirs`` it begins with "layers" and its layers are stacked along a leading axis, with ``{expert}`` its experts
    along the next. layout: their axes -> our axes in the letters of `dimensions`, ``(h k) d -> d h k``: their rows are h
    blocks of k, ours is [d, h, k]. Their axis may hold more than this parameter, which is then the ``part``-th:
    ``(h k)|(g k)|(g k) d`` one after the other, ``(h 3 k) d`` interleaved. zero_when_absent: a checkpoint may lack it,
    which means zeros. layers: which are stacked in ``ours`` (None in the table itself and for what has no layers).
    """

    theirs: str
    ours: str
    layout: str
    part: int = 0
    zero_when_absent: bool = False
    layers: range | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fields that are not mapped one to one. names: those it reads. read: (config.json, what is mapped so far, file for
    messages) -> `ModelConfig` fields. write: the inverse."""

    names: frozenset[str]
    read: Callable[[Fields, Fields, str], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one kind are read and written.

    model_type: of config.json. language_model, scorer: the architectures with head "lm" and "scalar". fields: config.json
    field -> `ModelConfig` field, or several. defaults: what transformers assumes when a field is absent (None: derived
    from others). implied: `ModelConfig` fields that are the same in the whole family. rules: what is not one to one.
    fixed: fields that change the computation -> the values the decoder computes, the first one when absent. ignored:
    fields without effect on the logits, besides those of every family. weights: the name table, all options and heads
    together. prefix: of the trunk's tensors; checkpoints of the bare trunk lack it. even_heads: transformers wants
    hidden_size to be a multiple of the heads.
    """

    model_type: str
    language_model: str
    scorer: str
    fields: Mapping[str, str | tuple[str, ...]]
    defaults: Mapping[str, Any]
    weights: tuple[Weight, ...]
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    prefix: str = "model."
    even_heads: bool = False
