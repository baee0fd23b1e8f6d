"""Encoding of records to tokens: the ONLY place where the boundary between prompt and response is decided.

Prompt and response are tokenised separately and their ids concatenated. Tokenised together they may merge across the
boundary: with a merge "ab", "xa" + "bc" is [x, ab, c] jointly and [x, a | b, c] separately, and a sampler, which continues
the ids of "xa", can only ever produce the second (huggingface/trl issue 2054). Masks come from lengths, never from
comparing ids with the padding id, so that pad == eos keeps the end token in the loss (huggingface/trl issue 3200).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from rlhf_jax.data.records import HasId, Unusable
from rlhf_jax.data.row_problems import UnusableRecord
from rlhf_jax.data.templates import Template
from rlhf_jax.data.turn_tokens import LossOn, PromptTokens, Writing, prompt_tokens, response_tokens
from rlhf_jax.errors import InputError
from rlhf_jax.records import Comparison, Demonstration, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overflow = Literal["drop", "keep_end", "drop_oldest"]
"""The treatment of a prompt that is too long. "drop": the record is skipped and counted. "keep_end": tokens are removed
from the left (a leading BOS stays). "drop_oldest": whole turns are removed, oldest first; a system message and the last
user turn stay, or the record is skipped. Responses are never cut: the record of one that does not fit, which would lose
its end token, is skipped and counted."""
_RecordT = TypeVar("_RecordT", bound=HasId)
_ItemT = TypeVar("_ItemT")


@dataclass(frozen=True)
class Encoded:
    """An encoded document.

    tokens: ids without padding.
    loss_mask: True where the token at this place is a target; never at the first token.
    prompt_length: number of tokens before the last response.
    prompt_cut: number of prompt tokens that ``Overflow`` removed.
    id: id of the record.
    """

    tokens: list[int]
    loss_mask: list[bool]
    prompt_length: int
    prompt_cut: int = 0
    id: str = ""


class EncodedPair(NamedTuple):
    """An encoded comparison; both sides begin with the same ``prompt_length`` tokens. margin: in units of reward."""

    chosen: Encoded
    rejected: Encoded
    margin: float


@dataclass(frozen=True)
class Skipped:
    """A skipped record. reason: the reason to count it under."""

    reason: str


@dataclass(frozen=True)
class EncodedSet(Generic[_RecordT, _ItemT]):
    """Encoded items and their records: ``items[i]`` comes from ``records[i]``. dropped: number of skipped records by reason."""

    items: list[_ItemT]
    records: list[_RecordT]
    dropped: Counter[str]


def encode_all(
    records: Iterable[_RecordT], encode: Callable[[_RecordT], _ItemT | Skipped], *, unusable: Unusable = "error"
) -> EncodedSet[_RecordT, _ItemT]:
    """Encode every record and count the skipped ones. Raises InputError when none is left.

    unusable: "drop" skips and counts a record that cannot be encoded (`UnusableRecord`: a template refuses it); "error"
    raises InputError with its id.

    encode_all(records, lambda record: encode_demonstration(record, tokenizer, template, max_length=512))
    """
    result: EncodedSet[_RecordT, _ItemT] = EncodedSet([], [], Counter())
    first = ""
    for record in records:
        try:
            item = encode(record)
        except UnusableRecord as error:
            message = f"record {record.id}: {error}"
            if unusable == "error":
                raise InputError(f"{message}, or drop such records with unusable='drop'") from None
            item, first = Skipped(error.reason), first or message
        if isinstance(item, Skipped):
            result.dropped[item.reason] += 1
        else:
            result.items.append(item)
            result.records.append(record)
    if not result.items:
        why = ", ".join(f"{reason} ({count})" for reason, count in result.dropped.items()) or "the data set is empty"
        remedy = f"the first: {first}" if first else "raise the length limit or give other data"
        raise InputError(f"no example left to learn from: {why}; {remedy}")
    return result


def encode_demonstration(
    record: Demonstration,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    loss_on: LossOn = "response",
    overflow: Overflow = "drop",
) -> Encoded | Skipped:
    """Encode prompt, response and end token (no end token after a response that was cut off) in at most ``max_length`` tokens.

    loss_on: targets of the loss: "response" is the last response, "assistant" every assistant turn, "all" every token. The
    end token of a target turn is a target; a document's first token, which nothing predicts, is not. Raises InputError.
    """
    if loss_on not in ("response", "assistant", "all"):
        raise InputError(f"loss_on = {loss_on!r}: must be 'response', 'assistant' or 'all'")
    _check_length(max_length)
    if loss_on == "response" and not record.learned:
        return Skipped("the response has weight 0")
    writing = Writing(tokenizer, template, record.tools)

    def tokenise(messages: Sequence[Message]) -> PromptTokens:
        return prompt_tokens(messages, writing, loss_on)

    whole = tokenise(record.prompt)
    message = Message("assistant", record.response, record.keys)
    response = response_tokens(record.prompt, message, record.ended, writing, whole.last)
    if isinstance(response, str):
        return Skipped(response)
    prompt = _fit(record.prompt, whole, tokenise, max_length - len(response), overflow, tokenizer.bos_token_id)
    if isinstance(prompt, Skipped):
        return prompt
    ids, mask, cut = prompt
    loss_mask = mask + [record.learned] * len(response)
    loss_mask[0] = False
    if not any(loss_mask):
        return Skipped("no turn of it is learned")
    return Encoded(ids + response, loss_mask, len(ids), cut, record.id)


def encode_comparison(
    record: Comparison,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    overflow: Overflow = "drop",
) -> EncodedPair | Skipped:
    """Encode both responses after the SAME prompt tokens; the longer response decides how much of a long prompt stays.

    Raises InputError.
    """
    _check_length(max_length)
    writing = Writing(tokenizer, template, record.tools)

    def tokenise(messages: Sequence[Message]) -> PromptTokens:
        return prompt_tokens(messages, writing, "response")

    whole = tokenise(record.prompt)
    responses = []
    for text, keys, ended in (
        (record.chosen, record.chosen_keys, record.chosen_ended),
        (record.rejected, record.rejected_keys, record.rejected_ended),
    ):
        response = response_tokens(record.prompt, Message("assistant", text, keys), ended, writing, whole.last)
        if isinstance(response, str):
            return Skipped(response)
        responses.append(response)
    if responses[0] == responses[1]:
        return Skipped("chosen equals rejected")
    room = max_length - max(map(len, responses))
    prompt = _fit(record.prompt, whole, tokenise, room, overflow, tokenizer.bos_token_id)
    if isinstance(prompt, Skipped):
        return prompt
    ids, mask, cut = prompt
    sides = []
    for response in responses:
        loss_mask = mask + [True] * len(response)
        loss_mask[0] = False
        sides.append(Encoded(ids + response, loss_mask, len(ids), cut, record.id))
    return EncodedPair(sides[0], sides[1], record.margin)


def encode_prompt(
    record: Prompt | Demonstration | Comparison,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_prompt_length: int,
    overflow: Overflow = "drop",
) -> list[int] | Skipped:
    """Encode a prompt to sample responses to, exactly as the prompt part of ``encode_demonstration``. Raises InputError."""
    if max_prompt_length < 1:
        raise InputError(f"max_prompt_length = {max_prompt_length}: must be at least 1")
    writing = Writing(tokenizer, template, record.tools)

    def tokenise(messages: Sequence[Message]) -> PromptTokens:
        return prompt_tokens(messages, writing, "response")

    whole = tokenise(record.prompt)
    prompt = _fit(record.prompt, whole, tokenise, max_prompt_length, overflow, tokenizer.bos_token_id)
    if isinstance(prompt, Skipped):
        return prompt
    return prompt[0] or Skipped("prompt is empty")


def truncate_by_lines(
    format_text: Callable[[str], str], text: str, limit: int, encode: Callable[[str], Sequence[int]]
) -> str:
    """Truncate ``text`` from its end until ``encode(format_text(text))`` has at most ``limit`` tokens.

    The TL;DR loop of Stiennon et al. 2020 (openai/summarize-from-feedback @ summarize_from_feedback/tasks.py): while
    too long, cut at the last line end, or drop one character where no line end is left. Raises InputError when
    nothing is left.
    """
    shortened = text
    while len(encode(format_text(shortened))) > limit:
        shortened = shortened[: shortened.rindex("\n")] if "\n" in shortened else shortened[:-1]
        if not shortened:
            raise InputError(f"text {text[:30]!r} does not fit in {limit} tokens with its format; raise the limit")
    return shortened


def report(encoded: Iterable[Encoded], dropped: Mapping[str, int] | None = None) -> dict[str, float]:
    """Return numbers to print before training: examples, tokens, length percentiles, loss share, cut prompts, drops by reason.

    Raises InputError when there is no example.
    """
    documents = list(encoded)
    if not documents:
        raise InputError("no encoded example to report on; look at what was dropped")
    lengths = np.array([len(document.tokens) for document in documents])
    counted = sum(sum(document.loss_mask) for document in documents)
    numbers = {"examples": float(len(documents)), "tokens": float(lengths.sum()), "length/mean": float(lengths.mean())}
    for percentile in (50, 90, 99, 100):
        # "higher" gives a length that occurs: the value can be used as a limit that keeps this share.
        numbers[f"length/p{percentile}"] = float(np.percentile(lengths, percentile, method="higher"))
    numbers["loss_fraction"] = counted / float(lengths.sum())
    numbers["prompts_cut"] = float(sum(document.prompt_cut > 0 for document in documents))
    return numbers | {f"dropped/{reason}": float(count) for reason, count in (dropped or {}).items()}


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise InputError(f"max_length = {max_length}: must be at least 2, a response's token and its end token")


def _fit(
    messages: Sequence[Message],
    tokens: PromptTokens,
    tokenise: Callable[[Sequence[Message]], PromptTokens],
    room: int,
    overflow: Overflow,
    bos: int | None,
) -> tuple[list[int], list[bool], int] | Skipped:
    """Cut a prompt to at most ``room`` tokens and return (ids, mask, number of removed tokens).

    A prompt that has tokens keeps at least one.
    tokens: tokens of all messages.
    tokenise: returns the tokens of fewer messages.
    """
    if overflow not in ("drop", "keep_end", "drop_oldest"):
        raise InputError(f"overflow = {overflow!r}: must be 'drop', 'keep_end' or 'drop_oldest'")
    ids, mask, _ = tokens
    whole = len(ids)
    if room < min(whole, 1):
        return Skipped("response too long")
    if overflow == "keep_end" and whole > room:
        keep = [0] if ids[0] == bos and room > 1 else []
        keep += range(whole - room + len(keep), whole)
        ids, mask = [ids[i] for i in keep], [mask[i] for i in keep]
    while overflow == "drop_oldest" and len(ids) > room:
        shorter = _drop_oldest_turn(messages)
        if shorter is None:
            break
        messages = shorter
        ids, mask, _ = tokenise(messages)
    return Skipped("prompt too long") if len(ids) > room else (ids, mask, whole - len(ids))


def _drop_oldest_turn(messages: Sequence[Message]) -> list[Message] | None:
    """Drop the oldest user turn and its response: system, u1, a1, u2 -> system, u2. Returns None for a single user turn."""
    head = [message for message in messages[:1] if message.role == "system"]
    turns = messages[len(head) :]
    later = [index for index, message in enumerate(turns) if index > 0 and message.role == "user"]
    return [*head, *turns[later[0] :]] if later else None
