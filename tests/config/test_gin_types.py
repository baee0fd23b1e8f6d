"""Tests of the type checks of bound values, without gin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from rlhf_jax.config.gin_errors import Binding, Name
from rlhf_jax.config.gin_types import effective_bindings, wrong_type


class Optimizer:
    pass


class Adam(Optimizer):
    pass


Scores = Callable[[str], float]
RETURNS: dict[str, Any] = {
    "@Adam()": Adam,
    "@a/Adam()": Adam,
    "@count()": int,
    "@scores()": Scores,
    "@maybe()": Adam | None,
    "@untyped()": Any,
    "@Adam": Adam,
}


def message(value: Any, hint: Any, macros: dict[str, Any] | None = None) -> str | None:
    binding = Binding("a", "X", "p", value, "x.gin:3", False)
    return wrong_type(binding, macros or {}, hint, lambda name: RETURNS[name.text])


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (3, float),
        (0.5, float),
        (True, bool),
        (2**32 - 1, int),
        (1.2e-38, float),
        (float("inf"), float),
        (0.0, float),
        ("a", str),
        (None, float | None),
        (0.5, float | None),
        ("k1", Literal["k1", "k2"]),
        ([("a", "b")], list[tuple[str, str]]),
        ((("a", "b"),), list[tuple[str, str]]),
        ([1, 2, 3], tuple[int, ...]),
        ([], Sequence[int]),
        ({"a": 1}, dict[str, int]),
        (Name("@Adam()"), Adam),
        (Name("@a/Adam()"), Optimizer),
        (Name("@Adam()"), Optimizer | None),
        (Name("@count()"), float),
        (Name("@scores()"), Scores),
        (Name("@maybe()"), Adam),
        (Name("@untyped()"), int),
        (Name("@Adam"), Callable[[], Adam]),
        ([Name("@Adam()"), Name("@Adam()")], Sequence[Optimizer]),
        (Name("%gin.REQUIRED"), int),
        ("anything", Any),
    ],
)
def test_values_that_fit(value: Any, hint: Any) -> None:
    assert message(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("20", int, "'20': must be a whole number"),
        (2.0, int, "2.0: must be a whole number"),
        (True, int, "True: must be a whole number"),
        (True, float, "True: must be a number"),
        (1, bool, "1: must be True or False"),
        (3, str, "3: must be a text in quotes"),
        (None, int, "None: must be a whole number"),
        ("x", float | None, "'x': must be a number or None"),
        ("k4", Literal["k1", "k2"], "'k4': must be one of 'k1', 'k2'"),
        (1, Literal[True], "1: must be one of True"),
        ("ab", list[str], "'ab': must be a list of: a text in quotes"),
        ([1, "b"], list[int], "[1, 'b']: must be a list of: a whole number"),
        ([("a",)], list[tuple[str, str]], "[('a',)]: must be a list of: (a text in quotes, a text in quotes)"),
        (Name("@scores()"), Adam, "@scores(): must be a reference that gives Adam, '@...()'"),
        (Name("@Adam()"), Scores, "@Adam(): must be a reference that gives a function, '@...()'"),
        (Name("@Adam()"), int, "@Adam(): must be a whole number"),
        (Name("@count()"), str, "@count(): must be a text in quotes"),
        (Name("@Adam"), Optimizer, "@Adam: must be a reference that gives Optimizer, '@...()'; write @Adam()"),
        (3, Optimizer, "3: must be a reference that gives Optimizer, '@...()'"),
        # Out of range: float32 would turn them into 0 or infinity, 32 bits into another number.
        (1e-300, float, "1e-300: must be 0, or between 1.2e-38 and 3.4e+38 in size, which float32 can hold"),
        (-1e39, float | None, "-1e+39: must be 0, or between 1.2e-38 and 3.4e+38 in size, which float32 can hold"),
        (2**32, int, "4294967296: must be at most 4294967295 in size, which 32 bits can hold"),
        ("a\ud800", str, "'a\\ud800': must be a text of whole characters"),
        (["\udc00"], list[str], "['\\udc00']: must be a text of whole characters"),
        ({"a": ["\ud800"]}, dict[str, Any], "{'a': ['\\ud800']}: must be a text of whole characters"),
        ([1, 2**40], list[int], "[1, 1099511627776]: must be at most 4294967295 in size, which 32 bits can hold"),
    ],
)
def test_values_that_do_not_fit(value: Any, hint: Any, words: str) -> None:
    assert message(value, hint) == f"x.gin:3: a/X.p = {words}"


def test_macros_are_expanded_and_named() -> None:
    macros = {"LR": Name("%BASE"), "BASE": "1e-3"}
    assert message(Name("%LR"), str, macros) is None
    assert message(Name("%LR"), float, macros) == "x.gin:3: a/X.p = '1e-3' (= %LR): must be a number"
    assert message([Name("%LR")], list[float], macros) == (
        "x.gin:3: a/X.p = ['1e-3'] (= [%LR]): must be a list of: a number"
    )


def test_only_the_last_binding_counts() -> None:
    def bind(selector: str, argument: str, value: Any, scope: str = "") -> Binding:
        return Binding(scope, selector, argument, value, "x.gin:1", False)

    scanned = [bind("m.X", "p", "bad"), bind("M", "", 1), bind("X", "p", 2), bind("M", "", 3), bind("X", "p", 4, "a")]
    bindings, macros = effective_bindings(scanned, {"X": "m.X", "m.X": "m.X"}.get)
    assert [(b.scope, b.value) for b in bindings] == [("", 2), ("a", 4)]
    assert macros == {"M": 3}
