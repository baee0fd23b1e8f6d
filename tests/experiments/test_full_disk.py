"""A disk that is full, wherever a run meets it: one line, exit code 3, no traceback; the same command goes on later."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from experiment_processes import ROOT
from forked_programs import Server
from stages_on_files import CONFIG, GOOD, STAGES, lines

from rlhf_jax.launch.command import exit_code_for
from rlhf_jax.loop.status import Status
from rlhf_jax.loop.watchdog import Watchdog
from rlhf_jax.rundir.tracking import Events, Tracker
from rlhf_jax.storage.files import write_atomically

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
LIMITED = """
import resource, runpy, sys
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # a cut entry would stay in the cache of all tests
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""No file may grow beyond the limit: EFBIG, which is what a full disk is to the program that writes."""


@pytest.mark.parametrize("limit", [12_000, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_run_ends_with_one_line_and_goes_on(limit: int, models: Path, tmp_path: Path, server: Server) -> None:
    """The small limit is met by the files of the run itself, the larger one by the arrays of a checkpoint."""
    (tmp_path / "limited.py").write_text(LIMITED)
    (tmp_path / "data.jsonl").write_text(lines(GOOD["train_sft"]))
    config = CONFIG + STAGES["train_sft"].replace("tensorboard = False", "tensorboard = True").replace(
        "steps = 1", "steps = 4"
    )
    (tmp_path / "config.gin").write_text(config)
    places = {"RUN_DIR": tmp_path / "run", "MODEL": models / "run", "DATA": tmp_path / "data.jsonl"}
    command = [str(ROOT / "experiments" / "train_sft.py"), f"--gin_file={tmp_path / 'config.gin'}"]
    command += [f"--gin_bindings={name} = {str(path)!r}" for name, path in places.items()]
    result = server(tmp_path, [str(tmp_path / "limited.py"), str(limit), *command])
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("stopped: "), result.stderr
    assert not (
        ROOT / ".git" / "index.lock"
    ).exists()  # what asks git for the state of the repository never writes there
    again = server(tmp_path, command)
    assert again.returncode == 0, again.stderr


def test_an_atomic_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_closing_metric_files_raises_once_and_closes_all(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "sft", resumed_step=0, tensorboard=True)
    files = dict(tracker._files)
    tracker._files["metrics"].close()
    tracker._files["metrics"] = FULL.open("a")
    with pytest.raises(OSError) as met:
        tracker.write(1, {"loss": 1.0})
    assert exit_code_for(met.value) == 3 and met.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        tracker.close()
    assert files["timing"].closed
    tracker.close()  # nothing is left to close


def test_tensorboard_reports_to_the_run_itself(tmp_path: Path) -> None:
    events = Events(tmp_path, 0)
    events._writer._py_recordio_writer._writer.close()
    events._writer._py_recordio_writer._writer = FULL.open("wb")
    events.add_scalar("loss", 1.0, 1)
    with pytest.raises(OSError, match="No space left") as met:
        events.close()
    assert exit_code_for(met.value) == 3


def test_status_on_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "status.json").symlink_to(FULL)
    with pytest.raises(OSError) as met:
        Status(tmp_path)
    assert exit_code_for(met.value) == 3


def test_stacks_that_cannot_be_written_do_not_keep_a_hang_alive(tmp_path: Path) -> None:
    (tmp_path / "stacks.txt").symlink_to(FULL)
    dog = Watchdog(tmp_path, {}, 1.0, lambda: 0.0)
    assert "could not be written (No space left on device)" in dog._write_stacks("step 1: took longer")
