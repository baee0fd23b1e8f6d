"""The configuration of a model to train from: `ModelSource`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.models import DTYPES, ModelConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The source of a model: ``path``, or ``config`` with ``tokenizer``.

    path: a run directory, a Hugging Face directory, a .gguf file, the URL of one of them (gs://...), or a hub id (name/model,
    name/model@revision).
    config: the architecture of a new model, initialized from the seed.
    tokenizer: of a new model.
    param_dtype: as in ModelConfig; None = as saved, float32 for Hugging Face and GGUF checkpoints.
    compute_dtype, remat, logits_chunk, attention: as in ModelConfig; None = as saved.
    max_length: longest sequence in tokens, at most that of the checkpoint; None = as saved.
    pad_token: a token of the vocabulary to pad with, saved with the tokenizer; needed only for exports of reward models.
    other_template: use a model that was trained with another conversation template than that of the data.

    The fields after ``tokenizer`` need path.
    """

    path: str | None = None
    config: ModelConfig | None = None
    tokenizer: Any = None
    param_dtype: str | None = None
    compute_dtype: str | None = None
    remat: bool | Literal["cheap"] | None = None
    logits_chunk: int | None = None
    attention: str | None = None
    max_length: int | None = None
    pad_token: str | None = None
    other_template: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.other_template, bool):
            raise InputError(f"ModelSource.other_template = {self.other_template!r}: give True or False")
        if (self.path is None) == (self.config is None):
            raise InputError("ModelSource: give either path (an existing model) or config (a new one)")
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) not in (None, *DTYPES):
                raise InputError(f"ModelSource.{name} = {getattr(self, name)!r}: one of {', '.join(DTYPES)}")
        if self.config is None:
            return
        if self.tokenizer is None:
            raise InputError("ModelSource.tokenizer: a new model needs one, for instance @desk_tokenizer()")
        for name in ("param_dtype", "compute_dtype", "remat", "logits_chunk", "attention", "max_length", "pad_token"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"ModelSource.{name}: goes with path; a new model has it from its config and tokenizer"
                )
