"""Whether what a gin file binds has the type that the parameter's annotation asks for. gin itself never looks.

Pure: bindings as `config.scan` read them and annotations go in, one line comes out; gin is not imported. It runs before
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
"""The annotation of what ``@X()`` gives: the class X, or the return annotation of the function X."""

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text in quotes", type(None): "None"}
LARGEST_SEED = 2**32 - 1
"""No whole number of a configuration is larger: a seed has 32 bits, other numbers 31 (`types.require_whole`)."""
_LISTS = (list, tuple, collections.abc.Sequence)


def wrong_type(binding: Binding, macros: Mapping[str, Any], hint: Any, returns: Returns) -> str | None:
    """'place: OptimizerConfig.learning_rate = 'big': must be a number', None when the value fits its annotation.

    macros: {name: value}, values may name other macros. hint: the annotation of the parameter.
    """
    value = _expand(binding.value, macros)
    half = _holds_half_a_pair(value)
    if _fits(value, hint, returns) and not half:
        return None
    name = "/".join(filter(None, (binding.scope, f"{binding.selector}.{binding.argument}")))
    via = "" if value == binding.value else f" (= {binding.value})"
    forgotten = isinstance(value, Name) and value.text.startswith("@") and not value.text.endswith("()")
    remedy = f"; write {value.text}()" if forgotten and _fits(Name(f"{value}()"), hint, returns) else ""
    wanted = "a text of whole characters" if half else _beyond_reach(value) or _words(hint)
    return f"{binding.place}: {name} = {value!r}{via}: must be {wanted}{remedy}"


def _expand(value: Any, macros: Mapping[str, Any]) -> Any:
    if isinstance(value, Name) and value.text.startswith("%"):
        return _expand(macros[value.text[1:]], macros) if value.text[1:] in macros else value
    if isinstance(value, list | tuple):
        return type(value)(_expand(item, macros) for item in value)
    if isinstance(value, dict):
        return {_expand(key, macros): _expand(item, macros) for key, item in value.items()}
    return value


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(origin, arguments) with ``X | Y`` and ``Union[X, Y]`` made one."""
    origin = typing.get_origin(hint)
    return (typing.Union if origin is types.UnionType else origin), typing.get_args(hint)


def _fits(value: Any, hint: Any, returns: Returns) -> bool:
    origin, arguments = _parts(hint)
    if hint is Any or isinstance(hint, typing.TypeVar) or (isinstance(value, Name) and value.text.startswith("%")):
        return True  # a macro that gin defines itself, a constant of the code: not known here
    if origin is typing.Union:
        return any(_fits(value, each, returns) for each in arguments)
    if isinstance(value, Name):
        called = value.text.endswith("()")
        return _gives(returns(value), hint) if called else origin is collections.abc.Callable
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not _beyond_reach(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and not _beyond_reach(value)
    if origin in _LISTS or hint in _LISTS:
        return _items_fit(value, origin, arguments, returns)
    plain = origin or hint
    return isinstance(value, plain) if isinstance(plain, type) else True


def _beyond_reach(value: Any) -> str:
    """What a number must be for the precision in which it is used; '' when it is so, or no number. Of lists the first wrong."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_beyond_reach, value)), "")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_SEED:
        return f"at most {LARGEST_SEED} in size, which 32 bits can hold"
    if isinstance(value, float) and not math.isnan(value) and not fits_float32(value):
        return f"0, or between {SMALLEST_NUMBER:.2g} and {LARGEST_NUMBER:.2g} in size, which float32 can hold"
    return ""


def _holds_half_a_pair(value: Any) -> bool:
    """Whether a text, at any depth, holds half of a surrogate pair: no file, path or token can hold it."""
    if isinstance(value, dict):
        return _holds_half_a_pair([*value.keys(), *value.values()])
    if isinstance(value, list | tuple):
        return any(map(_holds_half_a_pair, value))
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _items_fit(value: Any, origin: Any, arguments: tuple[Any, ...], returns: Returns) -> bool:
    """gin writes lists and tuples alike; either stands for either."""
    if not isinstance(value, list | tuple):
        return False
    if origin is tuple and Ellipsis not in arguments:
        pairs = zip(value, arguments, strict=False)
        return len(value) == len(arguments) and all(_fits(item, each, returns) for item, each in pairs)
    return not arguments or all(_fits(item, arguments[0], returns) for item in value)


def _gives(given: Any, hint: Any) -> bool:
    """Whether something annotated ``given`` may stand where ``hint`` is asked for; what cannot be compared may."""
    given_origin, given_arguments = _parts(given)
    origin = _parts(hint)[0]
    if given is Any or hint is Any:
        return True
    if given_origin is typing.Union:
        return any(_gives(each, hint) for each in given_arguments)
    one, other = given_origin or given, origin or hint
    if isinstance(one, type) and isinstance(other, type):
        return issubclass(one, other) or (one is int and other is float)
    return False


def _words(hint: Any) -> str:
    origin, arguments = _parts(hint)
    if hint is None:
        return "None"
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is typing.Union:
        return " or ".join(map(_words, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"({', '.join(map(_words, arguments))})"
    if origin in _LISTS:
        return f"a list of: {_words(arguments[0])}" if arguments else "a list"
    if origin is collections.abc.Callable:
        return "a reference that gives a function, '@...()'"
    return f"a reference that gives {getattr(hint, '__name__', hint)}, '@...()'"


def settled(scanned: Sequence[Binding], full: Callable[[str], str | None]) -> tuple[list[Binding], dict[str, Any]]:
    """(the bindings that count, macros): of several bindings of one parameter the last wins, as in gin.

    full: the complete selector of a partial one, None when unknown.
    """
    last = {(b.scope, full(b.selector) or b.selector, b.argument): b for b in scanned}
    macros = {"/".join(filter(None, (b.scope, b.selector))): b.value for b in last.values() if not b.argument}
    return [b for b in last.values() if b.argument], macros
