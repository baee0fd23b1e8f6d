"""What ends a response: the ONE definition for encoder, sampler, doctor, evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.stop_strings import stop_table
from rlhf_jax.data.templates import Template
from rlhf_jax.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ends:
    """What ends a response.

    ids: every token id a sampler stops at; the first is ``written``.
    written: the id that the encoder writes at the end of a response.
    text: that token's text.
    """

    ids: tuple[int, ...]
    written: int
    text: str


def response_ends(tokenizer: PreTrainedTokenizerBase, template: Template) -> Ends:
    """Find what ends a response: the token that the encoder writes and, where it is another, the tokenizer's EOS.

    Raises InputError for a tokenizer without EOS, or a ``Template.stop_token`` that is not one token.
    """
    written, text = _written(tokenizer, template)
    ids = tuple(dict.fromkeys(int(end) for end in (written, tokenizer.eos_token_id) if end is not None))
    return Ends(ids, written, text)


def sampler_ends(
    tokenizer: PreTrainedTokenizerBase, template: Template, stop_strings: Sequence[str], vocab_size: int
) -> dict[str, Any]:
    """Make the keyword arguments of `rollout.generate` that say how responses end: eos_ids, pad_id, stop_table."""
    table = stop_table(stop_strings, tokenizer, vocab_size) if stop_strings else None
    ids = response_ends(tokenizer, template).ids
    return {"eos_ids": ids, "pad_id": tokenizer.pad_token_id, "stop_table": table}


def _written(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, str]:
    """(id, text) of the token that the encoder writes at the end of a response."""
    if template.stop_token is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token; set Template.stop_token or tokenizer.eos_token"
            )
        return int(tokenizer.eos_token_id), str(tokenizer.eos_token)
    ids = tokenizer(template.stop_token, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"Template.stop_token {template.stop_token!r} is {len(ids)} tokens, not one; name a special token"
        )
    return int(ids[0]), template.stop_token
