"""Runs whose checkpoints are missing or unreadable: an error, not a fresh start."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from rlhf_jax.checkpoint_files.manifest import saved_steps, verify
from rlhf_jax.config import BoundConfig
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention, newest_verified


def train(run_dir: Path, total: int, save_every: int = 2) -> None:
    """Run a loop whose state is one vector and whose host value sums the steps."""
    loop = LoopConfig(save_every=save_every, keep=9, tensorboard=False, progress=False)
    bound = BoundConfig(f"run.steps = {total}\n", f"run.steps = {total}\n")
    with open_run(run_dir, stage="toy", bound=bound, seed=0, loop=loop) as run:
        state, host = run.restore({"w": jnp.zeros(2)}, {"row": 0})
        for step in run.steps(run.resumed_step, total):
            state = {"w": state["w"] + 1}
            run.log(step, {"loss": jnp.float32(step)})
            run.save(step, state, {"row": host["row"] + step})


def contents(run_dir: Path) -> dict[str, bytes]:
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(run_dir, 4)
    return run_dir


def remove(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def empty(run_dir: Path) -> None:
    remove(run_dir)
    (run_dir / "checkpoints").mkdir()


def dangle(run_dir: Path) -> None:
    remove(run_dir)
    (run_dir / "checkpoints").symlink_to("/not/mounted/checkpoints")


def loop(run_dir: Path) -> None:
    remove(run_dir)
    (run_dir / "checkpoints").symlink_to(run_dir / "checkpoints")


def file_in_place(run_dir: Path) -> None:
    remove(run_dir)
    (run_dir / "checkpoints").write_text("")


def dangling_step(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "4")
    (run_dir / "checkpoints" / "4").symlink_to("/not/mounted/4")


def looping_manifest(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "4" / "manifest.json"
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize(
    ("hide", "message"),
    [
        (
            remove,
            r"no checkpoint is there, and provenance\.json says that the run has saved step 2: put the checkpoints",
        ),
        (empty, r"no checkpoint is there, and provenance\.json says that the run has saved step 2"),
        (dangle, r"a link to /not/mounted/checkpoints, which is not there; mount that disk"),
        (loop, r"checkpoints: cannot be read \(Too many levels of symbolic links\); make it readable"),
        (file_in_place, r"checkpoints: cannot be read \(Not a directory\)"),
        (dangling_step, r"checkpoints/4: a link to /not/mounted/4, which is not there"),
        (looping_manifest, r"4/manifest\.json: cannot be read \(Too many levels"),
    ],
)
def test_hidden_checkpoints_are_refused(hide, message: str, finished: Path, tmp_path: Path) -> None:
    """Regression: the run started at step 0 and overwrote metrics and provenance without a warning."""
    shutil.copytree(finished, tmp_path / "run")
    hide(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path / "run", 6)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_metrics_reveal_removed_checkpoints(finished: Path, tmp_path: Path) -> None:
    """Older versions did not record saves in provenance.json."""
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "provenance.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "saved_step"}))
    remove(tmp_path / "run")
    with pytest.raises(InputError, match=r"metrics\.jsonl shows steps up to 4"):
        train(tmp_path / "run", 6)


def test_a_resumed_launch_reveals_removed_checkpoints(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    train(tmp_path / "run", 6)
    empty(tmp_path / "run")
    with pytest.raises(InputError, match="says that the run has saved step 6"):
        train(tmp_path / "run", 6)


def test_killed_before_the_first_save_begins_again(finished: Path, tmp_path: Path) -> None:
    """A run killed before its first save has metrics and an empty ``checkpoints``."""
    with (
        pytest.raises(KeyError),
        open_run(
            tmp_path / "run", stage="toy", bound=BoundConfig("", ""), seed=0, loop=LoopConfig(tensorboard=False)
        ) as run,
    ):
        for step in run.steps(0, 3):
            run.log(step, {"loss": jnp.float32(step)})
            if step == 2:
                raise KeyError("killed")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    train(tmp_path / "run", 4)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.skipif(os.getuid() != 0, reason="takes another uid for a moment, which only root may")
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/4", "checkpoints/4/state", "checkpoints/4/manifest.json"])
def test_unreadable_checkpoints_are_an_error(name: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for place in [*tmp_path.parents, tmp_path]:
        if place.owner() == "root" and place.name.startswith("pytest"):
            place.chmod(0o755)
    os.chmod(tmp_path / "run" / name, 0)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); make it readable"):
            newest_verified(tmp_path / "run")
    finally:
        os.seteuid(0)


def test_host_values_are_those_of_the_save(tmp_path: Path) -> None:
    """The loop changes its lists while the thread writes; step 1 holds the values at the time of the save."""
    bad: list[int] = []

    def change(point: str, step: int, place: Path) -> None:
        if point == "hash":  # the thread, before it writes the manifest
            bad.append(7)

    with Checkpoints(tmp_path, Retention(2), at=change) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(2)}, {"bad_steps": bad})
    assert bad == [7] and verify(tmp_path / "checkpoints" / "1")["host"] == {"bad_steps": []}


@pytest.mark.parametrize("name", ["[a]", "a\\b", "[a-z]", "**"])
def test_step_without_arrays_gets_no_number(name: str, tmp_path: Path) -> None:
    """With these characters in the path Orbax writes to another place, or does not merge its files, and reports success."""
    with (
        pytest.raises(RunStopped, match="not there after saving|a save failed"),
        Checkpoints(tmp_path / name, Retention(2)) as checkpoints,
    ):
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
    assert saved_steps(tmp_path / name) == []


@pytest.mark.parametrize("character", "*?[]\\")
def test_paths_that_orbax_cannot_store_are_errors(character: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checkpoints cannot be stored under a path with"):
        train(tmp_path / f"a{character}b" / "run", 1)
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_not_steps(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for name in ("٣", "007", "1e3", "-1"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    assert saved_steps(tmp_path / "run") == [2, 4]
