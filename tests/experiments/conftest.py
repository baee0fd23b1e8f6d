"""The smoke chain that many tests look at."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiment_processes import command, finish, start


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of configs/smoke/pipeline.gin, run once for all tests (and all workers of pytest-xdist)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / "smoke"
    with (shared / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "report.html").is_file():
            finish(start(command("pipeline", "configs/smoke/pipeline.gin", RUN_DIR=directory)))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model in each layout (`stages_on_files.write_models`)."""
    from stages_on_files import write_models

    directory = tmp_path_factory.mktemp("models")
    write_models(directory)
    return directory


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts an experiment on a smoke config whose run directory is below tmp_path."""

    def call(experiment: str, config: str, run_dir: str, *, seconds_a_step: float = 0.0, **macros: Any):
        arguments = command(experiment, f"configs/smoke/{config}.gin", RUN_DIR=tmp_path / run_dir, **macros)
        return start(arguments, seconds_a_step=seconds_a_step)

    return call
