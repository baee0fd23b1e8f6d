"""A second start of the same run compiles nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from experiment_processes import command, finish, start


@pytest.mark.slow
def test_the_second_start_takes_every_program_from_the_cache(tmp_path: Path) -> None:
    told = []
    for _ in range(2):
        run = command("train_sft", "configs/smoke/base.gin", RUN_DIR=tmp_path / "run")
        more = [f"--compilation_cache={tmp_path / 'cache'}", "--gin_bindings=run.steps = 2"]
        _, stderr = finish(start([*run, *more]))
        told.append(
            re.search(r"first step done [\d.]+ s after the start \((\d+) programs compiled, (\d+) from", stderr)
        )
        shutil.rmtree(tmp_path / "run")  # the same run again, from its beginning
    first, second = told
    assert first and second
    assert int(first[1]) > 5 and int(first[2]) < int(first[1])
    assert int(second[1]) == 0 and int(second[2]) >= int(first[1])
