"""The token that fills the columns of a row which hold no text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows: the tokenizer's padding token; where it has none, its EOS or else 0. Masks come from lengths,
    so that no number depends on it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return int(next((index for index in ids if index is not None), 0))
