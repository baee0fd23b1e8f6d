"""Sampled tokens back to texts, with the records they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.data.token_bytes import response_text
from rlhf_jax.types import Completions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def responses(
    completions: Completions, records: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], list[str], list[bool]]:
    """(rows, texts without special tokens, whether each ended by itself).

    A row is {"id", "prompt"}, the prompt as a data file holds it (`prompt_column`). Rows that only fill up a batch
    (prompt_id -1) are left out. records: those that prompt_id counts.
    """
    ids = np.asarray(completions.prompts.prompt_id)
    real = ids >= 0
    rows = [{"id": records[i].id, "prompt": prompt_column(records[i].prompt)} for i in ids[real]]
    tokens, mask = np.asarray(completions.tokens)[real], np.asarray(completions.mask)[real]
    texts = [response_text(row[keep], tokenizer) for row, keep in zip(tokens, mask, strict=True)]
    return rows, texts, np.asarray(completions.ended)[real].tolist()


def prompt_column(messages: Sequence[Message]) -> str | list[dict[str, str]]:
    """A prompt as the "prompt" column of a data file: the text of a single user message, else the list of messages.

    Reading the row back (`records.prompts`, `records.comparisons`) gives the same messages.
    """
    if [message.role for message in messages] == ["user"]:
        return messages[0].content
    return [{"role": message.role, "content": message.content} for message in messages]
