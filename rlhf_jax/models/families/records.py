"""Records that describe a family of checkpoints: `Weight`, `Rule`, `Family`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.models.config import ModelConfig

Fields = Mapping[str, Any]
"""A config.json."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A row of a table of tensor names.

    tensor: name in the checkpoint; ``{layer}`` and ``{expert}`` are replaced by numbers.
    parameter: path in the parameter tree; with ``{layer}`` in ``tensor`` it begins with "layers" and its layers are
    stacked along a leading axis, with ``{expert}`` its experts along the next.
    layout: axes of the tensor -> axes of the parameter, in the letters of `dimensions`. ``(h k) d -> d h k``: the
    tensor's rows are h blocks of k, the parameter is [d, h, k]. An axis of the tensor may hold several parameters, of
    which this is the ``part``-th: ``(h k)|(g k)|(g k) d`` concatenated, ``(h 3 k) d`` interleaved.
    zero_when_absent: a checkpoint may lack the tensor, which means zeros. layers: the layers stacked in ``parameter``
    (None in the table itself and for parameters outside the layers).
    """

    tensor: str
    parameter: str
    layout: str
    part: int = 0
    zero_when_absent: bool = False
    layers: range | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fields that are not mapped one to one.

    names: the fields it reads. read: (config.json, `ModelConfig` fields so far, file for messages) -> `ModelConfig`
    fields. write: the inverse.
    """

    names: frozenset[str]
    read: Callable[[Fields, Fields, str], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """The mapping between one kind of checkpoint and `ModelConfig`.

    model_type: of config.json. language_model, scorer: the architectures with head "lm" and "scalar".
    fields: config.json field -> `ModelConfig` field, or several. defaults: the values that transformers assumes for
    absent fields (None: derived from others). implied: `ModelConfig` fields that are the same in the whole family.
    rules: fields that are not mapped one to one.
    fixed: fields that change the computation -> the supported values, first the default. ignored: fields without effect
    on the logits, in addition to those of every family.
    weights: the table of tensor names, for all options and heads. prefix: of the trunk's tensors; checkpoints of the
    bare trunk lack it. even_heads: transformers requires hidden_size to be a multiple of the heads.
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
