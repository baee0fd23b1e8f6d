"""Type checks of bound values against the annotations of their parameters, which gin does not make.

The input is the bindings of `config.scan` and annotations, the output one line; gin is not imported. The checks run before
anything is built, so a number in quotes is an error at its place instead of a traceback from inside a step.
"""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.config.gin_errors import Binding, Name
from rlhf_jax.errors import LARGEST_NUMBER, SMALLEST_NUMBER, fits_float32

Returns = Callable[[Name], Any]
"""The type that ``@X()`` returns: the class X, or the return annotation of the function X."""

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text in quotes", type(None): "None"}
LARGEST_SEED = 2**32 - 1
"""No whole number of a configuration is larger: a seed has 32 bits, other numbers 31 (`types.require_whole`)."""
_LISTS = (list, tuple, collections.abc.Sequence)


def wrong_type(binding: Binding, macros: Mapping[str, Any], hint: Any, returns: Returns) -> str | None:
    """Return 'place: OptimizerConfig.learning_rate = 'big': must be a number', or None when the value fits its annotation.

    macros: {name: value}, values may name other macros. hint: the annotation of the parameter.
    """
    value = _expand(binding.value, macros)
    unpaired = _has_unpaired_surrogate(value)
    if _fits(value, hint, returns) and not unpaired:
        return None
    name = "/".join(filter(None, (binding.scope, f"{binding.selector}.{binding.argument}")))
    via = "" if value == binding.value else f" (= {binding.value})"
    forgotten = isinstance(value, Name) and value.text.startswith("@") and not value.text.endswith("()")
    remedy = f"; write {value.text}()" if forgotten and _fits(Name(f"{value}()"), hint, returns) else ""
    expected = "a text of whole characters" if unpaired else _violated_range(value) or _describe(hint)
    return f"{binding.place}: {name} = {value!r}{via}: must be {expected}{remedy}"


def _expand(value: Any, macros: Mapping[str, Any]) -> Any:
    if isinstance(value, Name) and value.text.startswith("%"):
        return _expand(macros[value.text[1:]], macros) if value.text[1:] in macros else value
    if isinstance(value, list | tuple):
        return type(value)(_expand(item, macros) for item in value)
    if isinstance(value, dict):
        return {_expand(key, macros): _expand(item, macros) for key, item in value.items()}
    return value


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return (origin, arguments) of an annotation; ``X | Y`` counts as ``Union[X, Y]``."""
    origin = typing.get_origin(hint)
    return (typing.Union if origin is types.UnionType else origin), typing.get_args(hint)


def _fits(value: Any, hint: Any, returns: Returns) -> bool:
    origin, arguments = _parts(hint)
    if hint is Any or isinstance(hint, typing.TypeVar) or (isinstance(value, Name) and value.text.startswith("%")):
        return True  # a macro of gin itself or a constant: its value is unknown
    if origin is typing.Union:
        return any(_fits(value, argument, returns) for argument in arguments)
    if isinstance(value, Name):
        called = value.text.endswith("()")
        return _is_compatible(returns(value), hint) if called else origin is collections.abc.Callable
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not _violated_range(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and not _violated_range(value)
    if origin in _LISTS or hint in _LISTS:
        return _items_fit(value, origin, arguments, returns)
    plain = origin or hint
    return isinstance(value, plain) if isinstance(plain, type) else True


def _violated_range(value: Any) -> str:
    """Return the range that a number is outside of (32 bits, float32); '' when it fits or is no number.

    Of a list: that of the first number outside its range.
    """
    if isinstance(value, list | tuple):
        return next(filter(None, map(_violated_range, value)), "")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_SEED:
        return f"at most {LARGEST_SEED} in size, which 32 bits can hold"
    if isinstance(value, float) and not math.isnan(value) and not fits_float32(value):
        return f"0, or between {SMALLEST_NUMBER:.2g} and {LARGEST_NUMBER:.2g} in size, which float32 can hold"
    return ""


def _has_unpaired_surrogate(value: Any) -> bool:
    """Return whether a text, at any depth, contains an unpaired surrogate, which no file, path or token can contain."""
    if isinstance(value, dict):
        return _has_unpaired_surrogate([*value.keys(), *value.values()])
    if isinstance(value, list | tuple):
        return any(map(_has_unpaired_surrogate, value))
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _items_fit(value: Any, origin: Any, arguments: tuple[Any, ...], returns: Returns) -> bool:
    """Return whether the items of a list or tuple fit; either may stand for the other, since gin writes both alike."""
    if not isinstance(value, list | tuple):
        return False
    if origin is tuple and Ellipsis not in arguments:
        pairs = zip(value, arguments, strict=False)
        return len(value) == len(arguments) and all(_fits(item, argument, returns) for item, argument in pairs)
    return not arguments or all(_fits(item, arguments[0], returns) for item in value)


def _is_compatible(returned: Any, hint: Any) -> bool:
    """Return whether a value of type ``returned`` may be bound where ``hint`` is expected; False only when both are classes."""
    returned_origin, returned_arguments = _parts(returned)
    origin = _parts(hint)[0]
    if returned is Any or hint is Any:
        return True
    if returned_origin is typing.Union:
        return any(_is_compatible(argument, hint) for argument in returned_arguments)
    actual, expected = returned_origin or returned, origin or hint
    if isinstance(actual, type) and isinstance(expected, type):
        return issubclass(actual, expected) or (actual is int and expected is float)
    return False


def _describe(hint: Any) -> str:
    origin, arguments = _parts(hint)
    if hint is None:
        return "None"
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is typing.Union:
        return " or ".join(map(_describe, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"({', '.join(map(_describe, arguments))})"
    if origin in _LISTS:
        return f"a list of: {_describe(arguments[0])}" if arguments else "a list"
    if origin is collections.abc.Callable:
        return "a reference that gives a function, '@...()'"
    return f"a reference that gives {getattr(hint, '__name__', hint)}, '@...()'"


def effective_bindings(
    scanned: Sequence[Binding], full: Callable[[str], str | None]
) -> tuple[list[Binding], dict[str, Any]]:
    """Return (effective bindings, macros): of several bindings of one parameter the last wins, as in gin.

    full(selector): the complete selector of a partial one, None when unknown.
    """
    last = {(b.scope, full(b.selector) or b.selector, b.argument): b for b in scanned}
    macros = {"/".join(filter(None, (b.scope, b.selector))): b.value for b in last.values() if not b.argument}
    return [b for b in last.values() if b.argument], macros
