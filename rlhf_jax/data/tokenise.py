"""Texts to tokens, with what belongs to a text's beginning done once a text.

Tokenizers that come from SentencePiece put a space before a text (a normaliser "Prepend", a pre-tokenizer "Metaspace",
or add_prefix_space). A response continues the text of its prompt, so there the space would be one too many.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from rlhf_jax.data.quotes import Quotes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Continuing(NamedTuple):
    """A tokenizer without what it puts before a text. size: of its vocabulary, when this was made. added: its added tokens."""

    size: int
    tokenizer: Tokenizer
    added: dict[int, str]


_BEGINNING = ("normalizer", "pre_tokenizer")
"""Parts of a tokenizer.json that may put something before a text."""
_CONTINUING: weakref.WeakKeyDictionary[Any, _Continuing | None] = weakref.WeakKeyDictionary()
"""Of tokenizers; None of those that put nothing before a text."""


def tokenise(
    rendering: str, tokenizer: PreTrainedTokenizerBase, quotes: Quotes, *, after: int | None = None
) -> list[int]:
    """The ids of a rendering. after: the last token of the text that it continues. Raises UnusableRecord."""
    return tokenise_with_ends(rendering, tokenizer, quotes, after=after, wants_ends=False)[0]


def tokenise_with_ends(
    rendering: str,
    tokenizer: PreTrainedTokenizerBase,
    quotes: Quotes,
    *,
    after: int | None = None,
    wants_ends: bool = True,
) -> tuple[list[int], list[int]]:
    """``tokenise``, and where in the text each token ends, in characters ([] unless ``wants_ends``)."""
    ids: list[int] = []
    ends: list[int] = []
    begin = 0
    for segment in quotes.segments(rendering):
        last = ids[-1] if ids else after
        segment_ids, segment_ends = _encode(segment, tokenizer, last, wants_ends)
        ids += segment_ids
        ends += [begin + end for end in segment_ends]
        begin += len(segment)
    quotes.check(rendering, ids)
    return ids, ends


def learned_tokens(ends: Sequence[int], begin: int, end: int) -> list[int]:
    """The indices of the tokens that lie in characters ``begin`` to ``end`` with all their characters.

    ends: where each token ends. What a tokenizer leaves out of a token's offsets (a space before a word) is counted with
    the token after it.
    """
    starts = [0, *ends[:-1]]
    return [
        index for index, (first, last) in enumerate(zip(starts, ends, strict=True)) if begin <= first and last <= end
    ]


def has_prefix(described: Mapping[str, Any]) -> bool:
    """Whether the pipeline of a tokenizer.json puts a space before a text."""
    return any(_without_prefix(described.get(part)) != described.get(part) for part in _BEGINNING)


def _encode(
    text: str, tokenizer: PreTrainedTokenizerBase, last: int | None, wants_ends: bool
) -> tuple[list[int], list[int]]:
    """(ids, ends) of a text that follows the token ``last`` (None: nothing)."""
    if not text:
        return [], []
    continuing = None if last is None else _continuing(tokenizer)
    anchor = ""
    if continuing is not None and last is not None:
        # After an added token the tokenizer begins anew, in a way of its own: let it do so.
        anchor = continuing.added.get(last, "")
        if not anchor:
            encoding = continuing.tokenizer.encode(text, add_special_tokens=False)
            return encoding.ids, [end for _, end in encoding.offsets] if wants_ends else []
    result: Any = tokenizer(anchor + text, add_special_tokens=False, verbose=False, return_offsets_mapping=wants_ends)
    skip = 1 if anchor else 0
    ends = [end - len(anchor) for _, end in result["offset_mapping"]] if wants_ends else []
    return list(result["input_ids"])[skip:], ends[skip:]


def _continuing(tokenizer: PreTrainedTokenizerBase) -> _Continuing | None:
    """None when the tokenizer puts nothing before a text."""
    if tokenizer not in _CONTINUING or getattr(_CONTINUING[tokenizer], "size", len(tokenizer)) != len(tokenizer):
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        described = {} if backend is None else json.loads(backend.to_str())
        made = None
        if has_prefix(described):
            changed = described | {part: _without_prefix(described.get(part)) for part in _BEGINNING}
            added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
            made = _Continuing(len(tokenizer), Tokenizer.from_str(json.dumps(changed)), added)
        _CONTINUING[tokenizer] = made
    return _CONTINUING[tokenizer]


def _without_prefix(step: Any) -> Any:
    """A normaliser or pre-tokenizer, as tokenizer.json describes it, without what it puts before a text."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    for steps in ("normalizers", "pretokenizers"):
        if isinstance(step.get(steps), list):
            kept = [_without_prefix(part) for part in step[steps]]
            step = step | {steps: [part for part in kept if part is not None]}
    if step.get("type") == "Metaspace":
        step = step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step
