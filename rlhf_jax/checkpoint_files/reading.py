"""The step of a run that is read: chosen once for all readers of a program, and not removed while it is read.

A run may go on training while another program reads it. What that program loads, scores and records must then be one step,
and the run's retention must leave that step alone: a reader holds a shared lock on its manifest, and who removes steps takes
that lock first (`unread`). On a file system without locks a step may vanish while it is read; that is an error, not damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rlhf_jax.checkpoint_files.manifest import find_step, latest_step
from rlhf_jax.storage.names import MANIFEST


@dataclass
class _Scope:
    """An open `one_choice`. steps: the directory of the step of each run, by the run's real path. held: their locks."""

    agree: Callable[[int], int]
    steps: dict[str, Path] = field(default_factory=dict)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_scopes: list[_Scope] = []


@contextlib.contextmanager
def one_choice(agree: Callable[[int], int] = lambda step: step) -> Iterator[None]:
    """Inside, every reader of a run gets the step that was its newest for the first of them.

    agree: gives every process of the program the first process's number.
    """
    scope = _Scope(agree)
    _scopes.append(scope)
    try:
        with scope.held:
            yield
    finally:
        _scopes.remove(scope)


@contextlib.contextmanager
def reading_step(run_dir: str | Path, step: int | None = None) -> Iterator[Path]:
    """Give the directory of a step to read, the newest when None (inside `one_choice` the one chosen there). No retention of
    this machine removes it meanwhile. Raises InputError when there is no such step."""
    if step is not None or not _scopes:
        with contextlib.ExitStack() as held:
            yield _chosen(run_dir, step, held)
        return
    scope, run = _scopes[-1], os.path.realpath(run_dir)
    if run not in scope.steps:
        with contextlib.ExitStack() as held:
            place = _chosen(run_dir, None, held)
            agreed_step = scope.agree(int(place.name))
            scope.steps[run] = place if place.name == str(agreed_step) else _chosen(run_dir, agreed_step, held)
            scope.held.push(held.pop_all())
    yield scope.steps[run]


def _chosen(run_dir: str | Path, step: int | None, held: contextlib.ExitStack) -> Path:
    """The directory of a step, locked for reading; when retention was faster, that of the newest step there is now."""
    while True:
        place = find_step(run_dir, step)
        try:
            manifest = held.enter_context((place / MANIFEST).open("rb"))
        except OSError:
            if os.path.lexists(place):
                return place  # it has no manifest that can be opened: its reader says what is wrong
            continue
        if _lock(manifest, fcntl.LOCK_SH) and _is_at(manifest, place / MANIFEST):
            return place
        manifest.close()


@contextlib.contextmanager
def unread(place: Path) -> Iterator[bool]:
    """Say whether no reader holds a step; while this lasts no other begins to read it."""
    with contextlib.ExitStack() as stack:
        try:
            manifest = stack.enter_context((place / MANIFEST).open("rb"))
        except OSError:  # nobody can read it
            yield True
            return
        yield _lock(manifest, fcntl.LOCK_EX)


def _lock(file: IO[bytes], how: int) -> bool:
    """Lock a file without waiting; return whether nobody else's lock is in the way. Where files cannot be locked nobody's is."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is the one that bears the name ``path`` now."""
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def newest_to_read(run_dir: str | Path) -> int | None:
    """Return the step that a reader without a wish of its own gets, None for a run that has saved none."""
    if latest_step(run_dir) is None:
        return None
    with reading_step(run_dir) as place:
        return int(place.name)
