"""Encoding of quoted special tokens as text: "<|im_end|>" in a message is not the end of a turn.

A quote is put between two marks before a template renders it, and passes through the template unchanged. In the rendering,
a special token between marks is a quote, and any other was expected by the template. A quote is cut after its first
character, and the two parts are tokenised separately, so that neither is the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_jax.data.row_problems import UnusableRecord

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Marks: code points that Unicode reserves for internal use of programs and that no text contains."""
_CUT = "\ufdd2"
_MARKS = re.compile(f"[{OPEN}{CLOSE}{_CUT}]")


@dataclass(frozen=True)
class Quotes:
    """Texts that must not become special tokens.

    in_turns: matches the tokens that delimit turns, which a response must not produce.
    in_texts: matches also the other added tokens that the template writes, which no other message may produce.
    counted: matches those of in_texts that a tokenizer makes from no other text.
    ids: the ids of the tokens that ``counted`` matches.
    """

    in_turns: re.Pattern[str]
    in_texts: re.Pattern[str]
    counted: re.Pattern[str]
    ids: frozenset[int]

    def mark(self, value: Any, *, is_response: bool) -> Any:
        """Put marks around the quotes in a text, or in the texts inside a JSON value. Raises UnusableRecord."""
        if isinstance(value, str):
            if _MARKS.search(value):
                raise UnusableRecord("a text holds U+FDD0, U+FDD1 or U+FDD2", "remove what is no character")
            return (self.in_turns if is_response else self.in_texts).sub(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self.mark(item, is_response=is_response) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, is_response=is_response) for item in value]
        return value

    def segments(self, rendering: str) -> list[str]:
        """Split a rendering into the parts that are tokenised separately; joined they are its text."""
        if not _MARKS.search(rendering):
            return [rendering]
        quote = re.compile(f"{OPEN}(?:({self.in_texts.pattern})){CLOSE}")
        cut = quote.sub(lambda match: match[1][0] + _CUT + match[1][1:], rendering)
        return [part for part in _MARKS.split(cut) if part]

    def check(self, rendering: str, ids: list[int]) -> None:
        """Raise UnusableRecord when the tokens of a rendering include more special ones than the template wrote."""
        if not _MARKS.search(rendering):
            return
        without = re.sub(f"{OPEN}(?:{self.in_texts.pattern}){CLOSE}", _CUT, rendering)
        expected = sum(len(self.counted.findall(part)) for part in _MARKS.split(without))
        if sum(map(self.ids.__contains__, ids)) != expected:
            raise UnusableRecord(
                "a text quotes a special token that the tokenizer cannot write as text", "rewrite the quote"
            )


def remove_marks(rendering: str) -> str:
    """Remove the marks from a rendering."""
    return _MARKS.sub("", rendering)


def pattern_of(tokens: list[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any of ``tokens``, the longest first; it matches nothing when there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
