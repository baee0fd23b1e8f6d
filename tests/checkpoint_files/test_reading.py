"""Reading of a run while it is trained: all readers get one step, and retention does not remove it."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from rlhf_jax.checkpoint_files import reading
from rlhf_jax.checkpoint_files.manifest import read_arrays, saved_steps, verify
from rlhf_jax.checkpoint_files.reading import newest_to_read, one_choice, reading_step, unread
from rlhf_jax.errors import InputError
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.rundir.provenance import describe, write_provenance
from rlhf_jax.storage.inputs import Input


def save(run_dir: Path, *steps: int, keep: int = 9) -> None:
    with Checkpoints(run_dir, Retention(keep)) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"w": jnp.full(2, float(step))}, {})


@pytest.fixture(scope="module")
def steps_6_and_8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained")
    save(run_dir, 6, 8)
    write_provenance(run_dir, stage="toy", seed=0, inputs=[], resumed_step=0)
    return run_dir


@pytest.fixture
def moving(steps_6_and_8: Path, tmp_path: Path) -> Path:
    """A run at step 6; `next_step` continues it."""
    shutil.copytree(steps_6_and_8, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "8").rename(tmp_path / "8")
    return tmp_path / "run"


def next_step(run_dir: Path) -> None:
    (run_dir.parent / "8").rename(run_dir / "checkpoints" / "8")


def test_a_program_reads_and_records_one_step(moving: Path) -> None:
    """Once a program scored step 8 and recorded step 6."""
    with one_choice():
        before = describe(Input("policy", str(moving)))
        next_step(moving)
        with reading_step(moving) as place:
            assert read_arrays(place)["w"].tolist() == [6.0, 6.0]
        assert describe(Input("policy", str(moving))) == before and before["step"] == 6
        assert newest_to_read(moving.parent / "run" / ".." / "run") == 6  # the same run by another name
    assert describe(Input("policy", str(moving)))["step"] == newest_to_read(moving) == 8


def test_the_processes_of_a_program_agree(moving: Path) -> None:
    next_step(moving)
    with one_choice(lambda step: 6), reading_step(moving) as place:
        assert place.name == "6"


def test_retention_leaves_a_step_that_is_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with reading_step(tmp_path) as place, reading_step(tmp_path):
        save(tmp_path, 2, 3, keep=1)
        assert saved_steps(tmp_path) == [1, 3] and read_arrays(place)["w"].tolist() == [1.0, 1.0]
    save(tmp_path, 4, keep=1)  # it goes with the next save
    assert saved_steps(tmp_path) == [4]


def test_a_step_that_vanishes_is_chosen_again(moving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention was faster than the reader's lock, twice: before the manifest was opened, and after."""
    find = reading.find_step

    def then_removed(run_dir: Path, step: int | None = None) -> Path:
        place = find(run_dir, step)
        if place.name == "6":
            next_step(moving)
            shutil.rmtree(place)
        return place

    monkeypatch.setattr(reading, "find_step", then_removed)
    with reading_step(moving) as place:
        assert place.name == "8"


def test_a_step_renamed_after_its_manifest_was_opened(moving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = reading._lock

    def then_removed(file, how: int) -> bool:
        place = moving / "checkpoints" / "6"
        if place.exists():
            next_step(moving)
            place.rename(moving / "checkpoints" / "6.deleting")
        return lock(file, how)

    monkeypatch.setattr(reading, "_lock", then_removed)
    with reading_step(moving) as place:
        assert place.name == "8"


def test_a_step_without_a_manifest_is_still_damage(moving: Path) -> None:
    (moving / "checkpoints" / "6" / "manifest.json").unlink()
    with reading_step(moving) as place:
        assert place.name == "6"
    with unread(moving / "checkpoints" / "6") as free:
        assert free
    with pytest.raises(InputError, match="no checkpoint of step 7"), reading_step(moving, 7):
        pass


def test_a_step_on_a_disk_that_is_gone_is_not_waited_for(moving: Path) -> None:
    shutil.rmtree(moving / "checkpoints" / "6")
    (moving / "checkpoints" / "6").symlink_to("/not/mounted/6")
    with (
        pytest.raises(InputError, match="6: a link to /not/mounted/6, which is not there"),
        reading_step(moving) as place,
    ):
        verify(place)


def test_the_selected_step_is_forgotten_at_the_end(moving: Path) -> None:
    with pytest.raises(KeyError), one_choice(), reading_step(moving):
        raise KeyError
    with unread(moving / "checkpoints" / "6") as free:
        assert free
