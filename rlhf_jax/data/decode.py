"""Sampled tokens back to texts, with the records they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.types import Completions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def responses(
    completions: Completions, records: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, str]], list[str], list[bool]]:
    """Prompt rows ("id", "prompt": its last message), texts without special tokens, whether each ended by itself.

    Rows that only fill up a batch (prompt_id -1) are left out. records: those that prompt_id counts.
    """
    ids = np.asarray(completions.prompts.prompt_id)
    real = ids >= 0
    rows = [{"id": records[i].id, "prompt": records[i].prompt[-1].content} for i in ids[real]]
    tokens, mask = np.asarray(completions.tokens)[real], np.asarray(completions.mask)[real]
    texts = [
        str(tokenizer.decode([int(token) for token in row[keep]], skip_special_tokens=True))
        for row, keep in zip(tokens, mask, strict=True)
    ]
    return rows, texts, np.asarray(completions.ended)[real].tolist()
