"""Which bindings of a gin configuration a run reads. Pure: gin is not imported, nothing is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.config.gin_errors import Binding, Name, flatten


class Read(NamedTuple):
    """What is reached from ``run``: bindings, and names of macros."""

    bindings: list[Binding]
    macros: set[str]


def reached(bindings: Sequence[Binding], macros: Mapping[str, Sequence[Any]], full: Callable[[str], str]) -> Read:
    """What is reached from ``run`` through the references in ``bindings`` and in the values of ``macros``.

    full: the complete selector of a partial one. A scope inherits from its prefixes.
    """
    read = Read([], set())
    seen: set[tuple[str, str]] = set()
    waiting = [("", full("run"))]

    def follow(value: Any) -> None:
        for leaf in flatten(value):
            if not isinstance(leaf, Name):
                continue
            name = leaf.text[1:]
            if leaf.text[0] == "@":
                scope, _, selector = name.removesuffix("()").rpartition("/")
                waiting.append((scope, full(selector)))
            elif name in macros and name not in read.macros:
                read.macros.add(name)
                follow(list(macros[name]))

    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        scope, selector = place
        for b in bindings:
            if full(b.selector) == selector and (not b.scope or f"{scope}/".startswith(b.scope + "/")):
                read.bindings.append(b)
                follow(b.value)
    return read
