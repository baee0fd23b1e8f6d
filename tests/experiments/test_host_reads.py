"""Device-to-host reads of a PPO iteration: each read waits for them, so there are few, and all of them say so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from experiment_processes import ROOT, command, environment

COUNTED = Path(__file__).parent / "counted"


def reads(arguments: list[str], file: Path) -> list[list[str]]:
    settings = environment() | {"PYTHONPATH": f"{COUNTED}:{ROOT}", "READS": str(file)}
    result = subprocess.run(arguments, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_kind_of_read_is_seen(tmp_path: Path) -> None:
    observed = reads([sys.executable, str(COUNTED / "planted.py")], tmp_path / "reads")
    assert [(kind, function) for kind, _, function in observed] == [
        ("implicit", "as_a_number"),
        ("implicit", "as_an_array"),
        ("implicit", "as_a_condition"),
        ("implicit", "as_text"),
        ("explicit", "explicit_read"),
    ]


@pytest.mark.slow
def test_an_iteration_of_ppo_reads_twice_and_says_so(chain: Path, tmp_path: Path) -> None:
    """The responses, and all metrics at once. Beside them only saving and the start read anything."""
    steps = 4
    places = {"RUN_DIR": tmp_path / "ppo", "POLICY": chain / "sft", "REWARD": chain / "reward"}
    run = command("train_ppo", "configs/smoke/ppo.gin", **places)
    observed = Counter(tuple(read) for read in reads([*run, f"--gin_bindings=run.steps = {steps}"], tmp_path / "reads"))
    outside = {
        ("rlhf_jax/rundir/checkpoints.py", "save"),
        ("rlhf_jax/parallel/placement.py", "init_sharded"),
        ("rlhf_jax/algorithms/models.py", "check_finite"),
    }
    assert {read: count for read, count in observed.items() if read[1:] not in outside} == {
        ("explicit", "rlhf_jax/parallel/placement.py", "to_host"): steps,
        ("explicit", "experiments/train_ppo.py", "run"): steps,
    }
