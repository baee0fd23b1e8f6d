"""The smoke chain that many tests look at."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiment_processes import command, forked
from forked_programs import Forked, Result, Server


@pytest.fixture(scope="session")
def chain(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of configs/smoke/pipeline.gin, run once for all tests (and all workers of pytest-xdist). Its stages are
    forked; test_experiment_pipeline.py has pipelines that start theirs."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / "smoke"
    with (shared / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "report.html").is_file():
            result = server(shared, forked("all", "pipeline", "configs/smoke/pipeline.gin", RUN_DIR=directory))
            assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model in each layout (`stages_on_files.write_models`)."""
    from stages_on_files import write_models

    directory = tmp_path_factory.mktemp("models")
    write_models(directory)
    return directory


@pytest.fixture
def train(server: Server, tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs an experiment on a smoke config, with its run directory below tmp_path and exit code ``code``.

    meanwhile: is called with the program that runs. seconds_a_step: > 0 gives it time to stop the run between two steps.
    """

    def call(
        experiment: str,
        config: str,
        run_dir: str,
        *,
        code: int = 0,
        seconds_a_step: float = 0.0,
        meanwhile: Callable[[Forked], object] = lambda _: None,
        **macros: Any,
    ) -> Result:
        arguments = command(experiment, f"configs/smoke/{config}.gin", RUN_DIR=tmp_path / run_dir, **macros)[1:]
        slowly = [str(Path(__file__).parent / "slow" / "run_slowly.py"), str(seconds_a_step)] if seconds_a_step else []
        program = server.start(tmp_path, [*slowly, *arguments])
        meanwhile(program)
        result = program.finish()
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return call
