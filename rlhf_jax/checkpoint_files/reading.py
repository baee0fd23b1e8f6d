"""Selection of the step to read: the same for all readers of a program, and not removed while it is read.

A run may continue to train while another program reads it. All that this program loads, scores and records must come from one
step, and the run's retention must not remove that step. A reader therefore holds a shared lock on its manifest, and a
program that removes steps takes that lock first (`unread`). On a file system without locks a step may vanish while it is
read; that is an error, not damage.

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
    """An open `one_choice`.

    steps: the directory of the step of each run, by the run's real path. locks: on their manifests.

    """

    agree: Callable[[int], int]
    steps: dict[str, Path] = field(default_factory=dict)
    locks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_scopes: list[_Scope] = []


@contextlib.contextmanager
def one_choice(agree: Callable[[int], int] = lambda step: step) -> Iterator[None]:
    """Give every reader of a run, inside this context, the step that was the newest for the first reader.

    agree: returns the first process's step on every process of the program.

    """
    scope = _Scope(agree)
    _scopes.append(scope)
    try:
        with scope.locks:
            yield
    finally:
        _scopes.remove(scope)


@contextlib.contextmanager
def reading_step(run_dir: str | Path, step: int | None = None) -> Iterator[Path]:
    """Yield the directory of a step to read, the newest when None (inside `one_choice` the step chosen there).

    Retention on this machine does not remove it meanwhile. Raises InputError when there is no such step.

    """
    if step is not None or not _scopes:
        with contextlib.ExitStack() as locks:
            yield _lock_step(run_dir, step, locks)
        return
    scope, run = _scopes[-1], os.path.realpath(run_dir)
    if run not in scope.steps:
        with contextlib.ExitStack() as locks:
            place = _lock_step(run_dir, None, locks)
            agreed_step = scope.agree(int(place.name))
            scope.steps[run] = place if place.name == str(agreed_step) else _lock_step(run_dir, agreed_step, locks)
            scope.locks.push(locks.pop_all())
    yield scope.steps[run]


def _lock_step(run_dir: str | Path, step: int | None, locks: contextlib.ExitStack) -> Path:
    """Lock the directory of a step for reading and return it; if retention has just removed it, the newest step."""
    while True:
        place = find_step(run_dir, step)
        try:
            manifest = locks.enter_context((place / MANIFEST).open("rb"))
        except OSError:
            if os.path.lexists(place):
                return place  # it has no manifest that can be opened: its reader says what is wrong
            continue
        if _lock(manifest, fcntl.LOCK_SH) and _is_at(manifest, place / MANIFEST):
            return place
        manifest.close()


@contextlib.contextmanager
def unread(place: Path) -> Iterator[bool]:
    """Yield whether no reader has locked a step; inside this context no other reader can lock it."""
    with contextlib.ExitStack() as stack:
        try:
            manifest = stack.enter_context((place / MANIFEST).open("rb"))
        except OSError:  # nobody can read it
            yield True
            return
        yield _lock(manifest, fcntl.LOCK_EX)


def _lock(file: IO[bytes], how: int) -> bool:
    """Lock a file without waiting and return False when another process has it locked. Without file locks, return True."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether ``path`` is still the name of an open file."""
    try:
        path_status = path.stat()
    except OSError:
        return False
    file_status = os.fstat(file.fileno())
    return (path_status.st_dev, path_status.st_ino) == (file_status.st_dev, file_status.st_ino)


def newest_to_read(run_dir: str | Path) -> int | None:
    """Return the step that readers get by default, None for a run that has saved none."""
    if latest_step(run_dir) is None:
        return None
    with reading_step(run_dir) as place:
        return int(place.name)
