"""Several processes that are hosts of their own to JAX, against one process with the same global mesh of four devices.

scripts/test.sh -m multihost
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.saved import saved_steps

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.multihost
DEVICES = 4


def launch(
    processes: int, experiment: str, run_dir: Path, bindings: dict[str, str], config: str
) -> subprocess.Popen[str]:
    """An experiment as ``processes`` processes that share four pretended devices."""
    given = [f"--gin_bindings={key} = {value}" for key, value in {"RUN_DIR": repr(str(run_dir)), **bindings}.items()]
    command = [sys.executable, "scripts/launch.py", f"--processes={processes}", f"--devices={DEVICES // processes}"]
    command += [f"--logs={run_dir.parent / 'logs'}", "--grace=5", "--", f"experiments/{experiment}.py"]
    settings = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [*command, f"--gin_file={config}", *given, "--gin_bindings=LoopConfig.tensorboard = False"],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == code, out
    return out


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


SFT = {"run.steps": "4", "LoopConfig.evaluate_every": "2", "LoopConfig.save_every": "2"}
REWARD = {"run.steps": "3", "LoopConfig.evaluate_every": "3", "BatchConfig.batch_size": "8"}
PPO = {"run.steps": "2"}


def write_comparisons(path: Path) -> Path:
    rows = [
        {"id": str(i), "prompt": f"case {i % 40}", "chosen": f"yes {i % 7} thanks", "rejected": f"no {i % 5}"}
        for i in range(160)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_stages(processes: int, root: Path) -> None:
    """SFT from scratch with evaluations and checkpoints, a reward model of it, PPO of it with a reward computed on the host."""
    root.mkdir()
    finish(launch(processes, "train_sft", root / "base", SFT, "configs/smoke/base.gin"))
    base = repr(str(root / "base"))
    reward = {**REWARD, "POLICY": base, "COMPARISONS": repr(str(write_comparisons(root / "comparisons.jsonl")))}
    finish(launch(processes, "train_reward", root / "reward", reward, "configs/smoke/reward.gin"))
    finish(launch(processes, "train_ppo", root / "ppo", {**PPO, "POLICY": base}, "tests/multihost/ppo_gold.gin"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one") / "runs"
    all_stages(1, root)
    return root


@pytest.mark.parametrize("processes", [2, 4])
def test_every_stage_gives_what_one_process_gives(one: Path, tmp_path: Path, processes: int) -> None:
    root = tmp_path / "runs"
    all_stages(processes, root)
    for stage, steps in (("base", [2, 4]), ("reward", [3]), ("ppo", [2])):
        found, expected = lines(root / stage), lines(one / stage)
        assert len(found) == len(expected) > 1
        for got, want in zip(found, expected, strict=True):
            assert got.keys() == want.keys()
            for name, value in want.items():
                wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)
                assert got[name] == wanted, (stage, want["step"], name)
        assert saved_steps(root / stage)[-1] == steps[-1]
    assert json.loads((root / "base" / "provenance.json").read_text())["launches"][0]["processes"] == processes


def test_a_dead_process_stops_the_others_and_the_run_goes_on(one: Path, tmp_path: Path) -> None:
    """Killed in the middle: the parent says who died, stops the others soon, and the same command ends where one undisturbed
    process ends."""
    root = tmp_path / "runs"
    root.mkdir()
    longer = {**SFT, "run.steps": "4"}
    process = launch(2, "train_sft", root / "base", {**longer, "LoopConfig.save_every": "1"}, "configs/smoke/base.gin")
    deadline = time.monotonic() + 600
    while not saved_steps(root / "base"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(int(pid) for pid in children if b",2,1" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    out = finish(process, 128 + signal.SIGKILL)
    assert time.monotonic() - killed < 60
    assert "launch: process 1 ended with SIGKILL; stopping the others" in out
    finish(launch(2, "train_sft", root / "base", {**longer, "LoopConfig.save_every": "1"}, "configs/smoke/base.gin"))
    final, undisturbed = lines(root / "base")[-1], lines(one / "base")[-1]
    assert final["step"] == undisturbed["step"] == 4
    assert final["heldout/loss"] == pytest.approx(undisturbed["heldout/loss"], rel=1e-5)
