"""Tests of opening run directories: valid places, two starts at once, a kill during the start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_jax.config import BoundConfig
from rlhf_jax.errors import InputError
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.rundir import resume
from rlhf_jax.rundir.resume import check_run_place, lock, make_directory, names_in, remove_unused

BOUND = BoundConfig("run.steps = 1\n", "run.steps = 1\n")


def open_toy(run_dir: Path):
    return open_run(run_dir, stage="toy", bound=BOUND, seed=0, loop=LoopConfig(tensorboard=False))


@pytest.mark.parametrize(
    "names", [(), (".lock",), (".lock", "provenance.json.tmp"), ("provenance.json.tmp", "config.gin.tmp")]
)
def test_directory_of_a_killed_start_can_be_opened(names: tuple[str, ...], tmp_path: Path) -> None:
    """Regression: every later start failed with "not empty and not a run"."""
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).write_text('{"stage": ')
    with open_toy(tmp_path / "run") as run:
        assert run.resumed_step == 0
    assert not [name for name in names_in(tmp_path / "run") if name.endswith(".tmp")]


def test_a_full_disk_at_the_first_file_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises((OSError, InputError)), open_toy(tmp_path / "run"):
            pass
    with open_toy(tmp_path / "run"):
        pass


def test_the_second_of_two_first_starts_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both starts saw no directory; the one that made it holds the lock, the other removes nothing."""
    with open_toy(tmp_path / "run") as run:
        (run.directory / "checkpoints").rmdir()  # no sign of a step yet
        monkeypatch.setattr(Path, "exists", lambda path: False)  # the second start looked before the first made it
        with pytest.raises(InputError, match="in use by process"), open_toy(tmp_path / "run"):
            pass
        monkeypatch.undo()
        assert {".lock", "provenance.json", "config.gin"} <= names_in(tmp_path / "run")


def test_make_directory_returns_whether_it_made_it(tmp_path: Path) -> None:
    assert make_directory(tmp_path / "a" / "b") and not make_directory(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to("/not/mounted/x")
    with pytest.raises(InputError, match="link: cannot make it"):
        make_directory(tmp_path / "link")


def test_lock_in_a_removed_directory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One start opens the lock file, another removes the directory, and then the first locks a deleted file."""
    directory = tmp_path / "run"
    directory.mkdir()
    flock = resume.fcntl.flock

    def removed_meanwhile(file: int, operation: int) -> None:
        (directory / ".lock").unlink()
        (directory / ".lock").touch()  # a third start's
        flock(file, operation)

    monkeypatch.setattr(resume.fcntl, "flock", removed_meanwhile)
    with pytest.raises(InputError, match="another process has just removed it; give the command again"):
        lock(directory)
    monkeypatch.undo()
    with lock(directory):
        remove_unused(directory)
    with pytest.raises(InputError, match="another process has just removed it"):
        lock(directory)


def test_remove_unused_keeps_the_lock_of_another_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock file is removed last; another start may make a new one before the directory is removed."""
    (tmp_path / "run").mkdir()
    unlink = Path.unlink

    def unlink_and_recreate(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.name == ".lock":
            path.write_text("process 1 on elsewhere")

    with lock(tmp_path / "run"):
        monkeypatch.setattr(Path, "unlink", unlink_and_recreate)
        remove_unused(tmp_path / "run")
        monkeypatch.undo()
    assert names_in(tmp_path / "run") == {".lock"}


@pytest.mark.parametrize(
    "inside", ["checkpoints/12/inner", "checkpoints/99", "checkpoints", "tensorboard/x", "tokenizer"]
)
def test_run_inside_a_directory_of_another_run_is_refused(inside: str, tmp_path: Path) -> None:
    """Regression: retention of the outer run removed the inner one, and ``checkpoints/99`` counted as its newest step."""
    with open_toy(tmp_path / "outer"):
        pass
    message = r"outer/\w+, which belongs to .*outer; give another directory"
    with pytest.raises(InputError, match=message), open_toy(tmp_path / "outer" / inside):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "outer" / "checkpoints")
    with pytest.raises(InputError, match="outer/checkpoints, which belongs to"):
        check_run_place(tmp_path / "link" / "inner")
    assert list((tmp_path / "outer" / "checkpoints").iterdir()) == []


def test_other_places_are_allowed(tmp_path: Path) -> None:
    with open_toy(tmp_path / "outer"):
        pass
    check_run_place(tmp_path / "outer" / "evaluation")
    check_run_place(tmp_path / "checkpoints" / "run")  # no run's
    (tmp_path / "model.json").touch()
    (tmp_path / "pipeline.json").touch()
    for name in ("checkpoints", "compilation_cache"):
        with pytest.raises(InputError, match="which belongs to"):
            check_run_place(tmp_path / name / "run")
