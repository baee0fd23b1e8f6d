"""A new directory is complete or absent, even when its writer is killed, and has ordinary permissions."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.io.new_directory import new_directory


def modes(directory: Path) -> dict[str, int]:
    files = {str(path.relative_to(directory)): stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
    return files | {".": stat.S_IMODE(directory.stat().st_mode)}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask_in_nested_directories_too(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with new_directory(tmp_path / "parents" / "out") as directory:
            (directory / "nested" / "deep").mkdir(parents=True, mode=0o700)
            for file in (directory / "a", directory / "nested" / "deep" / "b"):
                file.touch(mode=0o600)
    finally:
        os.umask(before)
    file, folder = 0o666 & ~umask, 0o777 & ~umask
    assert modes(tmp_path / "parents" / "out") == {
        ".": folder, "a": file, "nested": folder, "nested/deep": folder, "nested/deep/b": file,
    }  # fmt: skip


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as directory:
        (directory / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def _die(out: Path) -> None:
    with new_directory(out) as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "half").touch()
        (directory / "link").symlink_to("/")
        os.kill(os.getpid(), signal.SIGKILL)


def test_files_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path / "out",))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert [entry.name for entry in tmp_path.iterdir()] == [".out.partial"]
    with new_directory(tmp_path / "out") as directory:
        assert list(directory.iterdir()) == []
        (directory / "whole").touch()
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["out", "out/whole"]


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as directory:
        (directory / "first").touch()
        with pytest.raises(InputError, match="another program is writing it"), new_directory(tmp_path / "out"):
            pass
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["first"]
    for name in ("out", "dangling"):
        if name == "dangling":
            (tmp_path / name).symlink_to(tmp_path / "nothing")
        with pytest.raises(InputError, match="already exists"), new_directory(tmp_path / name):
            pass
