"""Translation of gin's multi-line errors into one line with the place and the remedy. gin is not imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.config.renamed import renamed_key
from rlhf_jax.messages import one_line

_GIN_PLACE = re.compile(r'\n  In (?:file "(?P<file>[^"]+)",|bindings string) line (?P<line>\d+)\n\s*(?P<content>.*)')
_GIN_CALL = re.compile(
    r"\n  In call to configurable '(?P<name>[^']+)' \(.*?\)(?: in scope '(?P<scope>[^']*)')?(?=\n|$)"
)


@dataclass(frozen=True)
class Name:
    """A gin reference (``@a/B()``) or macro (``%c``) that has only been read, not looked up."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Binding:
    """One statement ``scope/selector.argument = value``; a macro has argument ''. place: file:line or the flag."""

    scope: str
    selector: str
    argument: str
    value: Any
    place: str
    included: bool


def _closest(name: str, valid_names: Iterable[str]) -> str:
    """Return '; did you mean X? known: ...', the end of an error message about an unknown name."""
    names = sorted(valid_names)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{guess} known: {', '.join(names)}"


def explain_parse(
    text: str, scanned: Sequence[Binding], configurables: Sequence[str], parameters: Callable[[str], Iterable[str]]
) -> str:
    """Return the one-line message of an error that gin raised while parsing: 'place: problem; known names'.

    configurables: the names of all. parameters(name): the parameters of one.
    """
    located = _GIN_PLACE.search(text)
    place = ""
    if located:
        place = (
            f"{located['file']}:{located['line']}: " if located["file"] else f"--gin_bindings={located['content']!r}: "
        )
    if match := re.match(r"No configurable matching (?:reference )?'@?([^'()]+)", text):
        return f"{place}unknown configurable {match[1]!r}{_closest(match[1], configurables)}"
    if match := re.match(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text):
        hint = renamed_key(match[1], match[2]) or _closest(match[2], parameters(match[1]))
        return f"{place}unknown parameter {match[2]!r} of {match[1]}{hint}"
    if match := re.match(r"No bindings specified for '([^']+?)(?:/gin\.macro)?' in config string", text):
        user = next((b for b in scanned if Name(f"%{match[1]}") in flatten(b.value)), None)
        prefix = f"{user.place}: " if user else ""
        return f"{prefix}unknown macro %{match[1]}: define it ({match[1]} = ...) before the run"
    return place + one_line(text[: located.start()] if located else text)


def flatten(value: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, list | tuple) else [value]


def explain_run(error: BaseException, scanned: Sequence[Binding], building: bool) -> str:
    """Return the one-line message of an error raised under ``run``.

    building: the error came before the first line of ``run``, while gin built its arguments, so a binding caused it.
    """
    text = str(error)
    call = _GIN_CALL.search(text)
    message = one_line(re.split(r"\n  (?:In call to configurable|No values supplied by Gin)", text)[0])
    message = re.sub(r"^\[Errno -?\d+\] ", "", message)
    if not building or call is None:
        return message
    name = "/".join(filter(None, [call["scope"] or "", call["name"]]))
    if match := re.search(r"No values supplied by Gin or caller for arguments: \[(.*?)\]", text):
        missing = match[1].replace("'", "").split(", ")
        return f"{name}.{missing[0]} has no value; bind it: --gin_bindings='{name}.{missing[0]} = ...'" + (
            f" (and also {', '.join(missing[1:])})" if missing[1:] else ""
        )
    words = set(re.findall(r"\w+", message))
    culprits = [b for b in scanned if b.argument in words and selectors_match(b.selector, call["name"])]
    culprits = [b for b in culprits if not b.scope or f"{call['scope']}/".startswith(b.scope + "/")]
    prefix = f"{culprits[-1].place}: " if culprits else ""
    if call["name"] not in message:
        return f"{prefix}{name}: {message}"
    return prefix + (message if name in message else message.replace(call["name"], name, 1))


def selectors_match(first: str, second: str) -> bool:
    """Return whether two partial selectors can name the same configurable: 'run.LoopConfig' and 'LoopConfig'."""
    return first == second or first.endswith("." + second) or second.endswith("." + first)
