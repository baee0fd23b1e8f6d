"""`jitted`: `jax.jit` that keeps a function's signature for the type checker and fixes the shardings of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R", covariant=True)


class Jitted(Protocol[_P, _R]):
    """A jitted function: it is called like the function itself, and lowered for the arguments of one call."""

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the compiled function."""
        ...

    def lower(self, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Return the lowered program for these arguments, arrays or shapes with shardings."""
        ...


def jitted(
    function: Callable[_P, _R], *, out: Any, donate: tuple[int, ...] = (), static: tuple[str, ...] = ()
) -> Jitted[_P, _R]:
    """Return ``function`` under `jax.jit`.

    out: the sharding of every output. Left to the compiler, a state could come back with other shardings: nothing would be donated,
    and the second step would compile again. donate: places of arguments whose buffers the outputs take over. static: names of
    arguments that the program depends on.
    """
    compiled = jax.jit(function, out_shardings=out, donate_argnums=donate, static_argnames=static)
    return cast(Jitted[_P, _R], compiled)


def shardings_of(tree: Any) -> Any:
    """Return the sharding of every leaf of a tree of arrays or of shapes with shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
