"""scripts/chaos.py: it sees every difference it should; and, slow, three killed runs of each stage."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.run.checkpoint import Checkpoints, Retention
from rlhf_jax.run.faults import flip_bit
from rlhf_jax.testing import difference

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "chaos.py"


@pytest.fixture(scope="module")
def chaos() -> Any:
    sys.path.append(str(SCRIPT.parent))  # where python looks first when it runs the script
    spec = importlib.util.spec_from_file_location("chaos_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def make_run(directory: Path, *, steps: int = 3, weight: float = 1.0, row: int = 6, loss: float = 0.5) -> Path:
    directory.mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    state = {"w": jnp.full(3, weight, jnp.float32), "rng": jax.random.key(0, impl="threefry2x32")}
    with Checkpoints(directory, Retention(1)) as checkpoints:
        checkpoints.save(steps, state, {"row": row})
    return directory


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("chaos") / "unbroken")


SMALLEST = float(np.nextafter(np.float32(1.0), np.float32(2.0)))
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, ""),
    "last bit of a weight": ({"weight": SMALLEST}, "different: 1 arrays, w among them"),
    "data position": ({"row": 7}, "different: what the checkpoint keeps on the host"),
    "a metric": ({"loss": 0.25}, "different: line 1 of metrics.jsonl"),
    "a step": ({"steps": 2}, "lost: 2 lines of metrics, not 3"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named(name: str, unbroken: Path, tmp_path: Path) -> None:
    changes, words = DIFFERENCES[name]
    assert difference(unbroken, make_run(tmp_path / "broken", **changes)) == words


def test_a_reward_model_without_its_scale_is_different(unbroken: Path, tmp_path: Path) -> None:
    broken = make_run(tmp_path / "broken")
    (broken / "reward_normalisation.json").write_text("{}")
    assert difference(unbroken, broken) == "different: reward_normalisation.json"


def test_damage_is_not_the_same(unbroken: Path, tmp_path: Path) -> None:
    broken = make_run(tmp_path / "broken")
    flip_bit(broken / "checkpoints" / "3" / "state" / "_METADATA")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        difference(unbroken, broken)


def test_the_phase_is_that_of_the_process_itself(chaos: Any, tmp_path: Path) -> None:
    assert chaos.where(tmp_path, 7) == ("start", 0)
    (tmp_path / "status.json").write_text('{"pid": 7, "step": 3, "phase": "train", "saving": "hash 2"}   \n')
    assert chaos.where(tmp_path, 7) == ("train + hash", 3)
    assert chaos.where(tmp_path, 8) == ("start", 0)  # an older process left it


def test_table_counts_both_phases_of_a_kill_and_every_verdict(chaos: Any, tmp_path: Path) -> None:
    kills = [chaos.Kill(1.5, "train + hash", 3, 3, 2), chaos.Kill(0.5, "start", 0, 3, 2)]
    trials = [chaos.Trial(1, tmp_path, kills, "same"), chaos.Trial(2, tmp_path, kills[:1], "lost: exit code 1")]

    text = chaos.table("sft", chaos.PHASES["sft"], 9.0, trials)
    assert "| 1 | 1.50 s | train + hash | 3 | 2 | 1 | killed again |" in text
    assert "start 1, train 2" in text and "hash 2" in text
    assert text.endswith("lost = 1, different = 0, same = 1\n")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_three_killed_runs(stage: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What comes before the stage is made once for all three."""
    out = tmp_path_factory.getbasetemp() / "chaos_runs"
    command = [sys.executable, str(SCRIPT), f"--stage={stage}", "--trials=3", "--noaimed", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("lost = 0, different = 0, same = 3")
