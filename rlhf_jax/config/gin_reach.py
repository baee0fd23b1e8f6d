"""Bindings of a gin configuration that a run reads. gin is not imported and nothing is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.config.gin_errors import Binding, Name, flatten


class Reachable(NamedTuple):
    """The bindings, and names of macros, that are reachable from ``run``."""

    bindings: list[Binding]
    macros: set[str]


def find_reachable(
    bindings: Sequence[Binding], macros: Mapping[str, Sequence[Any]], full: Callable[[str], str]
) -> Reachable:
    """Return what is reachable from ``run`` through the references in ``bindings`` and in the values of ``macros``.

    full(selector): the complete selector of a partial one. A scope inherits from its prefixes.
    """
    reachable = Reachable([], set())
    visited: set[tuple[str, str]] = set()
    queue = [("", full("run"))]

    def follow(value: Any) -> None:
        for leaf in flatten(value):
            if not isinstance(leaf, Name):
                continue
            name = leaf.text[1:]
            if leaf.text[0] == "@":
                scope, _, selector = name.removesuffix("()").rpartition("/")
                queue.append((scope, full(selector)))
            elif name in macros and name not in reachable.macros:
                reachable.macros.add(name)
                follow(list(macros[name]))

    while queue:
        place = queue.pop()
        if place in visited:
            continue
        visited.add(place)
        scope, selector = place
        for b in bindings:
            if full(b.selector) == selector and (not b.scope or f"{scope}/".startswith(b.scope + "/")):
                reachable.bindings.append(b)
                follow(b.value)
    return reachable
