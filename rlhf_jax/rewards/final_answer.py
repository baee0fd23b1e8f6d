"""A verifier of numeric answers (GSM8K, MATH-like): it compares the final answer of a response with the reference answer.

The final answer stands after the last ``####``, on the same line, or in the last ``\\boxed{...}``, whichever comes later.
Numbers are compared exactly, as fractions: 72, 72.0, $72, 7.2e1 and 144/2 are one number; 1,000 is a thousand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.records import Response

MARKER = "####"
_BOXED = "\\boxed{"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_SIGN = "([-\u2212]?)"  # hyphen and minus
_NUMBER = re.compile(
    rf"{_SIGN}\s*(?:\$\s*)?{_SIGN}({_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE]([+-]?\d{{1,3}}))?(?:\s*/\s*({_DIGITS}))?"
)
_MOST_DIGITS = 1000  # endless repetition is no answer, and Python parses no number of more than 4300 digits
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class FinalAnswer:
    """A `Reward` that compares the final answer with the reference answer.

    column: the column of the prompts (one of ``Fields.extra``) with the reference answer: a number, or a text that ends with
    one (``... #### 72``).

    The scores are ``correct``, 1 when the final answer of the response equals the reference, else 0; and ``answered``, 1 when
    the response has a final answer. Raises InputError for a prompt without a reference answer.
    """

    column: str = "answer"

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise InputError(f"final_answer.column = {self.column!r}: give the name of a column")

    def __call__(self, responses: Sequence[Response]) -> dict[str, list[float]]:
        answers = [final_answer(response.text) for response in responses]
        references = [self._reference(response) for response in responses]
        correct = [float(answer == number) for answer, number in zip(answers, references, strict=True)]
        return {"correct": correct, "answered": [float(answer is not None) for answer in answers]}

    def _reference(self, response: Response) -> Fraction:
        place = f"final_answer.column = {self.column!r}: prompt {response.id!r}"
        if self.column not in response.extra:
            raise InputError(f"{place} has no such column; set Fields.extra = ({self.column!r},)")
        value = response.extra[self.column]
        number = reference_number(value)
        if number is None:
            raise InputError(
                f"{place} has {_short(value)} there; give a number, or a text that ends with '{MARKER} 72'"
            )
        return number


def final_answer(text: str) -> Fraction | None:
    """Return the number after the last marker of a response; None when there is no marker, or no number after it."""
    marked, boxed = text.rfind(MARKER), text.rfind(_BOXED)
    if marked < 0 and boxed < 0:
        return None
    if boxed > marked:
        return first_number(_inside_braces(text[boxed + len(_BOXED) :]))
    return first_number(text[marked + len(MARKER) :].lstrip().split("\n", 1)[0])


def reference_number(value: Any) -> Fraction | None:
    """Return the number of a reference: a number, a text that is a number, or a text with a marker; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Fraction(value if isinstance(value, int) else str(value)) if abs(value) < float("inf") else None
    if not isinstance(value, str):
        return None
    if MARKER in value or _BOXED in value:
        return final_answer(value)
    match = _NUMBER.fullmatch(value.strip())
    return None if match is None else first_number(value)


def first_number(text: str) -> Fraction | None:
    """Return the first number of a text; None when there is none, or when it has more than a thousand digits.

    Example: "about $1,000.50 in all" gives 2001/2.
    """
    match = _NUMBER.search(_FRACTION.sub(r"\1/\2", text))
    if match is None or len(match[0]) > _MOST_DIGITS:
        return None
    sign, inner, digits, exponent, divisor = match.groups()
    number = Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)
    if divisor is not None:
        denominator = int(divisor.replace(",", ""))
        if denominator == 0:
            return None
        number /= denominator
    return -number if bool(sign) != bool(inner) else number


def _inside_braces(text: str) -> str:
    """Return ``text`` up to the brace that closes the one opened before it; all of it when no brace closes."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
