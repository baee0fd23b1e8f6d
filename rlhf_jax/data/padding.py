"""The padding token of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that pads rows: the tokenizer's padding token, or else its EOS, or else 0.

    Masks come from lengths, so that no result depends on it.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return int(next((index for index in ids if index is not None), 0))
