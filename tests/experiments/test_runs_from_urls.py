"""A run whose model and data are URLs and whose directory is kept at one; its machine is lost, another finds the model moved."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from experiment_processes import ROOT, command, environment, finish, read_lines, start
from interrupted_runs import same_as

from rlhf_jax.rundir import lineage, read_provenance

pytestmark = pytest.mark.slow


def begin(run_dir: Path, machine: Path, steps: int, chain: str, *flags: str) -> subprocess.Popen[str]:
    """Start a DPO run. machine: the directory of its downloads."""
    macros = {"POLICY": f"{chain}/sft", "COMPARISONS": f"{chain}/completions/comparisons.jsonl"}
    arguments = command("train_dpo", "configs/smoke/dpo.gin", RUN_DIR=run_dir, **macros)
    every = [
        f"--gin_bindings=LoopConfig.{name}_every = 2" for name in ("save", "evaluate")
    ]  # the last step is always due
    more = [f"--gin_bindings=run.steps = {steps}", *every, *flags]
    settings = environment() | {"XDG_CACHE_HOME": str(machine)}
    pipe = subprocess.PIPE
    return subprocess.Popen([*arguments, *more], cwd=ROOT, env=settings, stdout=pipe, stderr=pipe, text=True)


def test_another_machine_goes_on_bit_for_bit(chain: Path, tmp_path: Path) -> None:
    unbroken, lost, fetched = (tmp_path / name for name in ("unbroken", "lost", "found"))
    finish(begin(unbroken, tmp_path / "0", 4, str(chain)))
    sync, bucket = f"--sync=file://{tmp_path}/bucket/run", tmp_path / "bucket" / "models"
    shutil.copytree(chain, bucket)
    finish(begin(lost, tmp_path / "1", 2, f"file://{bucket}", sync))
    shutil.rmtree(lost)
    bucket.rename(tmp_path / "moved")  # the same content under another URL
    _, message = finish(begin(fetched, tmp_path / "2", 4, f"file://{tmp_path}/moved", sync))
    assert f"fetched from file://{tmp_path}/bucket/run (steps [2])" in message
    same_as(unbroken, fetched, "params", "opt_state", "rng", "step")
    assert read_lines(tmp_path / "bucket" / "run" / "metrics.jsonl") == read_lines(unbroken / "metrics.jsonl")
    local, remote = ((read_provenance(place) or {})["inputs"] for place in (unbroken, fetched))
    assert remote[0]["path"] == f"file://{tmp_path}/moved/sft"
    assert [entry["fingerprint"] for entry in remote] == [entry["fingerprint"] for entry in local]
    assert [entry["state"] for entry in lineage(fetched)["inputs"]] == ["recorded", "recorded"]


def test_stages_of_a_pipeline_are_found_complete(chain: Path, tmp_path: Path) -> None:
    config = tmp_path / "two.gin"
    config.write_text(
        f"run.run_dir = '{tmp_path}/one'\n"
        "run.stages = [@base/Stage()]\nbase/Stage.name = 'base'\nbase/Stage.experiment = 'train_sft'\n"
        "base/Stage.gin_file = 'configs/smoke/base.gin'\nbase/Stage.bindings = ('run.steps = 2',)\n"
    )
    sync = f"--sync=file://{tmp_path}/bucket/"
    finish(start([*command("pipeline", config), sync]))
    shutil.rmtree(tmp_path / "one")
    _, message = finish(start([*command("pipeline", config), sync]))
    assert f"fetched from file://{tmp_path}/bucket/base" in message and "already complete (2 steps)" in message
    assert os.listdir(tmp_path / "bucket") == ["base"]
