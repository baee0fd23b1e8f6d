"""Compilation cache of later starts, and the report of how long a start took.

Compiling a large program for a TPU takes minutes. Programs that took a second or more are stored in `default_directory`, or in
JAX_COMPILATION_CACHE_DIR. With --compilation_cache=DIR (a local directory or gs://...) every program is stored there, so
that a later start of the same run on the same devices compiles nothing; --compilation_cache=off disables the cache.
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

_REQUEST_EVENT = "/jax/compilation_cache/compile_requests_use_cache"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"
OFF = "off"
MOST_BYTES = 4 * 2**30
"""Size limit of the default directory; beyond it the least recently used programs are removed."""


def default_directory() -> Path:
    """Return $XDG_CACHE_HOME/rlhf_jax/compiled, usually ~/.cache/rlhf_jax/compiled."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax" / "compiled"


class ColdStart:
    """A counter of programs since its construction. programs: compiled or read from the cache; hits: read from the cache."""

    def __init__(self) -> None:
        self.programs = self.hits = 0
        self._began = time.monotonic()
        monitoring.register_event_listener(self._listen)

    def _listen(self, event: str, **_: Any) -> None:
        self.programs += event == _REQUEST_EVENT
        self.hits += event == _HIT_EVENT

    def report(self) -> None:
        """Print one line on stderr of the first process: call it after the first step."""
        if jax.process_index() == 0:
            seconds = time.monotonic() - self._began
            compiled = self.programs - self.hits
            cached = jax.config.values["jax_compilation_cache_dir"] is not None
            counts = f"{compiled} programs compiled, {self.hits} from the cache" if cached else "no compilation cache"
            print(f"first step done {seconds:.1f} s after the start ({counts})", file=sys.stderr)


_counters: list[ColdStart] = []


def watch(cache: str | None) -> None:
    """Configure the compilation cache and start counting; call it once per process.

    cache: the directory or URL of compiled programs; `OFF`; None: as JAX is configured, else `default_directory` (no cache
    when that cannot be written).
    Raises InputError for a URL whose library is missing.
    """
    if cache == OFF:
        jax.config.update("jax_compilation_cache_dir", None)
    elif cache is not None:
        if is_remote(cache):
            open_store(cache)  # JAX would only warn, and compile everything again
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    elif jax.config.values["jax_compilation_cache_dir"] is None:
        _use_default()
    _counters.append(ColdStart())


def make_private_cache(directory: Path) -> None:
    """Make a directory for compiled programs that no other user can write to, since programs in it are run.

    Raises InputError when it exists and belongs to another user, or others may write to it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise InputError(f"{directory}: cannot make it ({error.strerror}); remove what is there") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        problem = "belongs to another user" if status.st_uid != os.geteuid() else "others may write into it"
        raise InputError(
            f"{directory}: {problem}, and compiled programs in it are run: remove it, or chmod 700 when you trust its content"
        )


def cache_environment(directory: Path) -> dict[str, str]:
    """Return the environment of child processes that share a cache below ``directory``, unless this process names another.

    Raises InputError as `make_private_cache` does.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        make_private_cache(directory / "compilation_cache")
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    } | os.environ


def _use_default() -> None:
    try:
        make_private_cache(default_directory())
    except InputError as error:
        print(f"warning: no compilation cache: {error}", file=sys.stderr)
        return
    if os.access(default_directory(), os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(default_directory()))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def report_first_step() -> None:
    """Print the report of this process once; do nothing when the program was not launched with `launch`."""
    if _counters:
        _counters.pop().report()
