"""What ends a response: the ONE definition for encoder, sampler, doctor, evaluation and export.

The encoder writes one token at the end of a response; a sampler stops at that one, at the tokenizer's EOS, and at what the
model's generation_config.json lists. The token that is written is the one that the chat template ends its turns with,
which is often another than EOS (Gemma's <end_of_turn>, Llama 3's <|eot_id|> with a base tokenizer): a response that ended
with both would teach a model to write a line after its turn.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.padding import padding_id
from rlhf_jax.data.rendering import render_conversation
from rlhf_jax.data.stop_strings import stop_table
from rlhf_jax.data.templates import Template
from rlhf_jax.errors import InputError
from rlhf_jax.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Seven."
_QUESTION = (Message("user", "How many days has a week?"), Message("assistant", _PROBE))
_PROBES = (_QUESTION, (Message("system", "Answer briefly."), *_QUESTION))
_probed: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""Of tokenizers: what their chat templates end a response with, by everything that it depends on."""


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


def response_ends(
    tokenizer: PreTrainedTokenizerBase, template: Template, generation: Mapping[str, Any] | None = None
) -> Ends:
    """Find what ends a response: the token that the encoder writes, the tokenizer's EOS, the ids of a generation config.

    generation: generation_config.json of the model (`io.read_generation`). Raises InputError, with the remedy, for
    templates and tokenizers that leave the end open: no EOS, a ``Template.stop_token`` that is not one token or not what
    the chat template writes, a chat template that ends its turns with a token that is not special.
    """
    written = _written(tokenizer, template)
    ids = (written, tokenizer.eos_token_id, *end_ids(generation or {}))
    text = str(tokenizer.convert_ids_to_tokens(written)) if template.stop_token is None else template.stop_token
    return Ends(tuple(dict.fromkeys(int(end) for end in ids if end is not None)), written, text)


def end_ids(generation: Mapping[str, Any], where: str = "generation_config.json") -> tuple[int, ...]:
    """List the ids of ``eos_token_id``, which is one id, a list of them, or absent. Raises InputError for anything else."""
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(end, bool) or not isinstance(end, int) or end < 0 for end in ids):
        raise InputError(f"{where}: eos_token_id = {value!r}: must be a token id or a list of them; correct the file")
    return tuple(ids)


def sampler_ends(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    stop_strings: Sequence[str],
    vocab_size: int,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the keyword arguments of `rollout.generate` that say how responses end: eos_ids, pad_id, stop_table."""
    table = stop_table(stop_strings, tokenizer, vocab_size) if stop_strings else None
    ids = response_ends(tokenizer, template, generation).ids
    return {"eos_ids": ids, "pad_id": padding_id(tokenizer), "stop_table": table}


def _written(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    """The id that the encoder writes at the end of a response."""
    chosen = None if template.stop_token is None else _stop_token(tokenizer, template.stop_token)
    if template.style == "chat" and tokenizer.chat_template:
        try:
            ends = _chat_ends(tokenizer, template)
        except InputError as error:
            if chosen is None:
                raise InputError(f"{error}; or name what ends a response as Template.stop_token") from None
            ends = ()
        if chosen is not None and ends and chosen not in ends:
            raise InputError(
                f"Template.stop_token = {template.stop_token!r}: the chat template ends a response with "
                f"{tokenizer.convert_ids_to_tokens(ends[0])!r}; name that, or leave stop_token out"
            )
        if chosen is None and ends:
            return ends[0]
    if chosen is not None:
        return chosen
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token; set Template.stop_token or tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _stop_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"Template.stop_token {text!r} is {len(ids)} tokens, not one; name a special token")
    return int(ids[0])


def _chat_ends(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, ...]:
    """The special tokens that the chat template writes after a response, in order. Remembered: every record asks."""
    known = _probed.setdefault(tokenizer, {})
    key = repr((template, tokenizer.chat_template, len(tokenizer), tokenizer.special_tokens_map))
    if key not in known:
        known[key] = _special_ids(tokenizer, _after_response(tokenizer, template))
    return known[key]


def _after_response(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """What the chat template writes after the response of a conversation. Raises InputError when it renders none."""
    template = dataclasses.replace(template, date=template.date or "2000-01-01")  # no date ends a response
    refusal: InputError | None = None
    for messages in _PROBES:
        try:
            text = render_conversation(messages, tokenizer, template)
        except InputError as error:
            refusal = refusal or error
            continue
        if _PROBE in text:
            return text.rpartition(_PROBE)[2]
    raise refusal or InputError("the chat template leaves out what the assistant says; use another template")


def _special_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The special tokens of ``text``. Raises InputError for one that has only added tokens that are not special: as the end
    of a response they would stay in every text that is made from tokens."""
    added = tokenizer.added_tokens_decoder
    ids = (
        [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] if text else []
    )
    special = tuple(
        token for token in ids if token in tokenizer.all_special_ids or (token in added and added[token].special)
    )
    if special:
        return special
    if ordinary := [added[token].content for token in ids if token in added and added[token].content.strip()]:
        raise InputError(
            f"the chat template ends a response with {ordinary[0]!r}, which is no special token, so that it would stay in the "
            'texts of responses: set "special": true for it in tokenizer.json'
        )
    return ()
