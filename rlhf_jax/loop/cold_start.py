"""How long a start takes, and a cache that makes the second one short.

A TPU compiles a large program for minutes. Programs that took a second or more are kept in `default_directory`, or where
JAX_COMPILATION_CACHE_DIR says; with --compilation_cache=DIR (a local directory or gs://...) every program is kept there, so
that a later start of the same run on the same devices compiles nothing; with --compilation_cache=off none is.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

from rlhf_jax.errors import InputError
from rlhf_jax.storage.remote import is_remote, open_store

_ASKED = "/jax/compilation_cache/compile_requests_use_cache"
_FOUND = "/jax/compilation_cache/cache_hits"
OFF = "off"
MOST_BYTES = 4 * 2**30
"""Of the default directory; beyond it what was used longest ago goes."""


def default_directory() -> Path:
    """$XDG_CACHE_HOME/rlhf_jax/compiled, usually ~/.cache/rlhf_jax/compiled."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax" / "compiled"


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
    """Begin to count; once a process. cache: where compiled programs are kept, `OFF`, or None: as JAX is configured, else in
    `default_directory` (no cache when that cannot be written). Raises InputError for a URL whose library is missing."""
    if cache == OFF:
        jax.config.update("jax_compilation_cache_dir", None)
    elif cache is not None:
        if is_remote(cache):
            open_store(cache)  # JAX would only warn, and compile everything again
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        _use_default()
    _watched.append(ColdStart())


def own_cache(directory: Path) -> None:
    """Make a directory for compiled programs that no other user can write into: a program found under a key is run.

    Raises InputError when it is there already and belongs to somebody else, or others may write into it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise InputError(f"{directory}: cannot make it ({error.strerror}); remove what is there") from error
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        whose = "belongs to another user" if found.st_uid != os.geteuid() else "others may write into it"
        raise InputError(
            f"{directory}: {whose}, and compiled programs in it are run: remove it, or chmod 700 when you trust its content"
        )


def cache_environment(directory: Path) -> dict[str, str]:
    """Returns the environment of children that share a cache below ``directory``; that of this process when it names one.

    Raises InputError as `own_cache` does.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        own_cache(directory / "compilation_cache")
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    } | os.environ


def _use_default() -> None:
    try:
        own_cache(default_directory())
    except InputError as error:
        print(f"warning: no compilation cache: {error}", file=sys.stderr)
        return
    if os.access(default_directory(), os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(default_directory()))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def report_first_step() -> None:
    """`ColdStart.tell` of this process; nothing when it was not launched, or has told already."""
    if _watched:
        _watched.pop().tell()
