"""Atomic creation of a directory: `new_directory` leaves it complete or absent, even when the program is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.errors import InputError


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to ``path`` on success and removed on failure.

    Files that a killed program left are removed first: the temporary directory has a fixed name and is locked by the program
    that writes it. Modes of files and directories follow the umask, and all data is flushed to disk before the rename.
    Raises InputError when ``path`` exists or another program is writing it.

    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: already exists; give another directory or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.partial"
    lock = _lock_directory(temporary, path)
    try:
        yield temporary
        _settle(temporary)
        temporary.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock_directory(temporary: Path, path: Path) -> int:
    """Open, lock and empty the temporary directory and return its descriptor. The lock ends with the process."""
    while True:
        with contextlib.suppress(FileExistsError):
            temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"{path}: another program is writing it; wait for that, or give another directory"
            ) from None
        if not os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
            os.close(descriptor)  # its holder finished between the two calls
            continue
        for entry in temporary.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return descriptor


def _settle(directory: Path) -> None:
    """Set the permissions that open() and mkdir() give (safetensors makes its files private), and flush everything to disk."""
    umask = os.umask(0)
    os.umask(umask)
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            (Path(parent) / name).chmod(0o666 & ~umask)
            _flush(Path(parent) / name)
        Path(parent).chmod(0o777 & ~umask)
        _flush(Path(parent))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
