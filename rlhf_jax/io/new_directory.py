"""`new_directory`: a directory that is complete or absent, whatever ends the program meanwhile."""

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
    """Make a directory to write to that becomes ``path`` when everything went well, and goes away otherwise.

    What a killed program left behind is removed first: the directory has one name, and the program that writes it holds a
    lock on it. Modes of files and directories follow the umask, and everything is on the disk before it is renamed.
    Raises InputError when ``path`` exists or another program is writing it.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: already exists; give another directory or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.partial"
    lock = _locked(temporary, path)
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


def _locked(temporary: Path, path: Path) -> int:
    """An open, locked, empty directory; the kernel gives the lock back when its holder ends, however it ends."""
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
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return descriptor


def _settle(directory: Path) -> None:
    """Give everything the permissions that open() and mkdir() give (safetensors makes its files private), and flush it."""
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
