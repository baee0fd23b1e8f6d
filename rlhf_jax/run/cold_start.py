"""How long a start takes, and a cache that makes the second one short.

A TPU compiles a large program for minutes. With --compilation_cache=DIR (a local directory or gs://...) every program is
kept there, and a later start of the same run on the same devices compiles nothing.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
from jax import monitoring

_ASKED = "/jax/compilation_cache/compile_requests_use_cache"
_FOUND = "/jax/compilation_cache/cache_hits"


class ColdStart:
    """Counts from the moment it is made. programs: compiled so far or found; found: those from the cache."""

    def __init__(self) -> None:
        self.programs = self.found = 0
        self._began = time.monotonic()
        monitoring.register_event_listener(self._listen)

    def _listen(self, event: str, **_: Any) -> None:
        self.programs += event == _ASKED
        self.found += event == _FOUND

    def tell(self) -> None:
        """One line on stderr of the first process: call it behind the first step."""
        if jax.process_index() == 0:
            seconds = time.monotonic() - self._began
            compiled = self.programs - self.found
            cached = jax.config.jax_compilation_cache_dir is not None  # type: ignore[attr-defined]
            told = f"{compiled} programs compiled, {self.found} from the cache" if cached else "no compilation cache"
            print(f"first step done {seconds:.1f} s after the start ({told})", file=sys.stderr)


_watched: list[ColdStart] = []


def watch(cache: str | None) -> None:
    """Begin to count; once a process. cache: where compiled programs are kept (None: as JAX is configured)."""
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _watched.append(ColdStart())


def tell_first_step() -> None:
    """`ColdStart.tell` of this process; nothing when it was not launched, or has told already."""
    if _watched:
        _watched.pop().tell()
