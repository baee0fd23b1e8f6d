"""The end tokens of a response: the ONE definition for encoder, sampler, doctor, evaluation and export.

The encoder writes one token at the end of a response; a sampler stops at that token, at the tokenizer's EOS, and at the ids
of the model's generation_config.json. The encoder's token is the one with which the chat template ends turns, often not
EOS (Gemma's <end_of_turn>, Llama 3's <|eot_id|> with a base tokenizer): a response that ended with both would teach a
model to write a line after its turn.
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
_CHAT_ENDS: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""The cache, for each tokenizer, of the tokens with which its chat template ends a response, by the settings."""


@dataclass(frozen=True)
class Ends:
    """The end tokens of a response.

    ids: every token id at which a sampler stops; the first is ``stop_id``.
    stop_id: the id that the encoder writes at the end of a response.
    text: the text of that token.
    """

    ids: tuple[int, ...]
    stop_id: int
    text: str


def response_ends(
    tokenizer: PreTrainedTokenizerBase, template: Template, generation: Mapping[str, Any] | None = None
) -> Ends:
    """Find the end tokens of a response: the encoder's token, the tokenizer's EOS, the ids of a generation config.

    generation: generation_config.json of the model (`io.read_generation`). Raises InputError for templates and tokenizers
    that do not define the end: no EOS, a ``Template.stop_token`` that is not one token or not what
    the chat template writes, a chat template that ends its turns with a token that is not special.
    """
    stop_id = _stop_id(tokenizer, template)
    ids = (stop_id, tokenizer.eos_token_id, *end_ids(generation or {}))
    text = str(tokenizer.convert_ids_to_tokens(stop_id)) if template.stop_token is None else template.stop_token
    return Ends(tuple(dict.fromkeys(int(end) for end in ids if end is not None)), stop_id, text)


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
    """Make the keyword arguments of `rollout.generate` about the end of responses: eos_ids, pad_id, stop_table."""
    table = stop_table(stop_strings, tokenizer, vocab_size) if stop_strings else None
    ids = response_ends(tokenizer, template, generation).ids
    return {"eos_ids": ids, "pad_id": padding_id(tokenizer), "stop_table": table}


def _stop_id(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    """Return the id that the encoder writes at the end of a response. Raises InputError."""
    chosen = None if template.stop_token is None else _single_token(tokenizer, template.stop_token)
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


def _single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"Template.stop_token {text!r} is {len(ids)} tokens, not one; name a special token")
    return int(ids[0])


def _chat_ends(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, ...]:
    """Return the special tokens that the chat template writes after a response, in order; cached, as every record needs them."""
    cache = _CHAT_ENDS.setdefault(tokenizer, {})
    key = repr((template, tokenizer.chat_template, len(tokenizer), tokenizer.special_tokens_map))
    if key not in cache:
        cache[key] = _special_ids(tokenizer, _after_response(tokenizer, template))
    return cache[key]


def _after_response(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """Return the text that the chat template writes after a response. Raises InputError when it renders none."""
    # Any date serves: a date is never the end of a response.
    template = dataclasses.replace(template, date=template.date or "2000-01-01")
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
    """Return the special tokens of ``text``.

    Raises InputError when its added tokens are not special: they would remain in every decoded response.
    """
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
