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

from rlhf_jax.loop.faults import flip_bit
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
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


@pytest.fixture(scope="module")
def kills(chaos: Any) -> Any:
    return sys.modules["chaos_kills"]


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


def test_the_phase_is_that_of_the_process_itself(kills: Any, tmp_path: Path) -> None:
    assert kills.where(tmp_path, 7) == ("start", 0)
    (tmp_path / "status.json").write_text('{"pid": 7, "step": 3, "phase": "train", "saving": "hash 2"}   \n')
    assert kills.where(tmp_path, 7) == ("train + hash", 3)
    assert kills.where(tmp_path, 8) == ("start", 0)  # an older process left it


def test_table_counts_both_phases_of_a_kill_and_every_verdict(chaos: Any, tmp_path: Path) -> None:
    kills = [chaos.Kill(1.5, "train + hash", 3, 3, 2), chaos.Kill(0.5, "start", 0, 3, 2)]
    trials = [chaos.Trial(1, tmp_path, kills, "same"), chaos.Trial(2, tmp_path, kills[:1], "lost: exit code 1")]

    text = chaos.table("sft", ("start", *chaos.STAGES["sft"].phases), 9.0, trials)
    assert "| 1 | 1.50 s | train + hash | 3 | 2 | 1 | killed again |" in text
    assert "start 1, train 2" in text and "hash 2" in text
    assert text.endswith("lost = 1, different = 0, orphan = 0, same = 1\n")
    assert "| all | 2 | 3 | 1 | 0 | 0 | 1 |" in chaos.sums({"sft": trials})


def test_every_stage_has_its_command_and_what_it_needs(chaos: Any) -> None:
    """All programs, and every way of training; what a stage needs is artifacts before it."""
    scripts = {stage.script for stage in chaos.STAGES.values()}
    assert {
        f"experiments/{name}.py" for name in ("train_sft", "train_reward", "train_dpo", "train_ppo", "train_grpo")
    } < scripts
    assert {
        "experiments/generate.py",
        "experiments/evaluate.py",
        "experiments/pipeline.py",
        "experiments/export.py",
    } < scripts
    assert chaos.inputs_of("ppo") == ["base", "sft", "completions", "reward"] and chaos.inputs_of("export") == [
        "base",
        "sft",
    ]
    for name in chaos.KILLED:
        words = chaos.command(name, Path("/in"), Path("/out/run"))
        assert (ROOT / words[1].removeprefix(f"{ROOT}/")).is_file() and any("/out/run" in word for word in words)
    assert {name for plan in chaos.SIZES.values() for name in plan} == set(chaos.KILLED)


HOOKED = """
import os
for number in range(3):
    open("a", "w").close()
    os.replace("a", f"b{number}")
"""


@pytest.mark.parametrize(("when", "artifacts"), [("before", ["b0"]), ("after", ["b0", "b1"])])
def test_the_hook_kills_at_the_second_rename(kills: Any, when: str, artifacts: list[str], tmp_path: Path) -> None:
    count = tmp_path / "count"
    environment = {
        **os.environ,
        "PYTHONPATH": str(kills.HOOK),
        "CHAOS_COUNT": str(count),
        "CHAOS_KILL_AT": f"rename 2 {when}",
    }
    completions = subprocess.run([sys.executable, "-c", HOOKED], cwd=tmp_path, env=environment)
    assert completions.returncode == -9 and kills.calls(count) == {"rename": 2}
    assert sorted(path.name for path in tmp_path.glob("b*")) == artifacts


def test_what_runs_on_is_an_orphan_and_is_ended(kills: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "LEAVE_WITHIN", 0.3)
    assert kills.left_running(tmp_path) == []
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]) as process:
        while str(tmp_path).encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            pass
        assert kills.left_running(tmp_path) == [process.pid]
        assert process.wait(10) == -9


@pytest.mark.slow
def test_killed_programs_end_as_the_unbroken_ones(tmp_path: Path) -> None:
    """SFT, generate and a sweep: moments, the first second, renames and fsyncs. Other stages: --size=nightly."""
    command = [sys.executable, str(SCRIPT), "--size=ci", f"--out={tmp_path}"]
    completions = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert completions.returncode == 0, completions.stdout + completions.stderr
