"""Tokenisation of texts, with the special treatment of a text's beginning applied once per text.

Tokenizers that come from SentencePiece put a space before a text (a normaliser "Prepend", a pre-tokenizer "Metaspace",
or add_prefix_space). A response continues the text of its prompt, which must not get such a space.
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


class _Continuation(NamedTuple):
    """A tokenizer for texts that continue others, which puts nothing before a text.

    size: size of the vocabulary when the continuation was made.
    added: the added tokens by id.
    """

    size: int
    tokenizer: Tokenizer
    added: dict[int, str]


_BEGINNING = ("normalizer", "pre_tokenizer")
"""Parts of a tokenizer.json that may put something before a text."""
_CONTINUATIONS: weakref.WeakKeyDictionary[Any, _Continuation | None] = weakref.WeakKeyDictionary()
"""The cache by tokenizer; None for tokenizers that put nothing before a text."""


def tokenise(
    rendering: str, tokenizer: PreTrainedTokenizerBase, quotes: Quotes, *, after: int | None = None
) -> list[int]:
    """Tokenise a rendering. after: the last token of the text that it continues. Raises UnusableRecord."""
    return tokenise_with_ends(rendering, tokenizer, quotes, after=after, wants_ends=False)[0]


def tokenise_with_ends(
    rendering: str,
    tokenizer: PreTrainedTokenizerBase,
    quotes: Quotes,
    *,
    after: int | None = None,
    wants_ends: bool = True,
) -> tuple[list[int], list[int]]:
    """Tokenise a rendering; return ids and the end of each token in characters ([] unless ``wants_ends``).

    Raises UnusableRecord.
    """
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


def tokens_within(ends: Sequence[int], begin: int, end: int) -> list[int]:
    """Return the indices of the tokens that lie entirely between the characters ``begin`` and ``end``.

    ends: where each token ends, in characters. A token starts where the one before it ends, so that characters that the tokenizer
    assigns to no token (a space before a word) count to the next token.
    """
    starts = [0, *ends[:-1]]
    return [
        index for index, (first, last) in enumerate(zip(starts, ends, strict=True)) if begin <= first and last <= end
    ]


def has_prefix(description: Mapping[str, Any]) -> bool:
    """Return whether the pipeline of a tokenizer.json puts a space before a text."""
    return any(_remove_prefix(description.get(part)) != description.get(part) for part in _BEGINNING)


def _encode(
    text: str, tokenizer: PreTrainedTokenizerBase, last: int | None, wants_ends: bool
) -> tuple[list[int], list[int]]:
    """Encode a text after the token ``last`` (None: at the beginning); return (ids, ends)."""
    if not text:
        return [], []
    continuing = None if last is None else _continuation_of(tokenizer)
    anchor = ""
    if continuing is not None and last is not None:
        # After an added token the tokenizer restarts in its own way, so the added token is encoded with the text.
        anchor = continuing.added.get(last, "")
        if not anchor:
            encoding = continuing.tokenizer.encode(text, add_special_tokens=False)
            return encoding.ids, [end for _, end in encoding.offsets] if wants_ends else []
    result: Any = tokenizer(anchor + text, add_special_tokens=False, verbose=False, return_offsets_mapping=wants_ends)
    skip = 1 if anchor else 0
    ends = [end - len(anchor) for _, end in result["offset_mapping"]] if wants_ends else []
    return list(result["input_ids"])[skip:], ends[skip:]


def _continuation_of(tokenizer: PreTrainedTokenizerBase) -> _Continuation | None:
    """Return the tokenizer for continuing texts; None when the tokenizer puts nothing before a text."""
    if tokenizer not in _CONTINUATIONS or getattr(_CONTINUATIONS[tokenizer], "size", len(tokenizer)) != len(tokenizer):
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        description = {} if backend is None else json.loads(backend.to_str())
        continuation = None
        if has_prefix(description):
            changed = description | {part: _remove_prefix(description.get(part)) for part in _BEGINNING}
            added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
            continuation = _Continuation(len(tokenizer), Tokenizer.from_str(json.dumps(changed)), added)
        _CONTINUATIONS[tokenizer] = continuation
    return _CONTINUATIONS[tokenizer]


def _remove_prefix(step: Any) -> Any:
    """Remove the prefix from a normaliser or pre-tokenizer of tokenizer.json."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    for steps in ("normalizers", "pretokenizers"):
        if isinstance(step.get(steps), list):
            remaining = [_remove_prefix(part) for part in step[steps]]
            step = step | {steps: [part for part in remaining if part is not None]}
    if step.get("type") == "Metaspace":
        step = step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step
