"""Tests of the checks of the number of steps and of the run directory's path."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rundir.resume import check_run_place, check_steps


def test_step_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "999").mkdir(parents=True)
    check_steps(tmp_path, "run.steps = 3\n", 999)
    (tmp_path / "checkpoints" / "999" / "manifest.json").touch()
    with pytest.raises(InputError, match="already at step 999, asked for 3 "):
        check_steps(tmp_path, "run.steps = 3\n", 999)


def test_a_nul_in_the_path_is_named() -> None:
    with pytest.raises(InputError, match="cannot be stored under a path with"):
        check_run_place(Path("/runs/a\0b"))
