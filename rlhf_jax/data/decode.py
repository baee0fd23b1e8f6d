"""Decoding of sampled tokens to responses, with the prompts that they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.token_bytes import response_text
from rlhf_jax.records import Message, Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sampled(Protocol):
    """The fields of `batches.Completions` that texts are decoded from."""

    @property
    def prompts(self) -> PromptBatch: ...
    @property
    def tokens(self) -> Any: ...
    @property
    def mask(self) -> Any: ...
    @property
    def ended(self) -> Any: ...


def responses(completions: Sampled, records: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Response]:
    """Decode the responses to texts without special tokens, with their prompts.

    Rows that only fill up a batch (prompt_id -1) are skipped.
    records: the prompts that prompt_id indexes.
    """
    ids = np.asarray(completions.prompts.prompt_id)
    real = ids >= 0
    tokens, mask = np.asarray(completions.tokens)[real], np.asarray(completions.mask)[real]
    texts = [response_text(row[keep], tokenizer) for row, keep in zip(tokens, mask, strict=True)]
    answered, ended = [records[index] for index in ids[real]], np.asarray(completions.ended)[real].tolist()
    return [
        Response(record.prompt, text, end, record.extra, record.id)
        for record, text, end in zip(answered, texts, ended, strict=True)
    ]


def prompt_column(messages: Sequence[Message]) -> str | list[dict[str, Any]]:
    """Return a prompt as the "prompt" column of a data file: the text of a single user message, else a list of messages.

    Reading the row back (`records.prompts`, `records.comparisons`) gives the same messages.
    """
    if [(message.role, message.keys, message.learned) for message in messages] == [("user", {}, True)]:
        return messages[0].content
    return [
        {"role": message.role, "content": message.content}
        | dict(message.keys)
        | ({} if message.learned else {"weight": 0})
        for message in messages
    ]
