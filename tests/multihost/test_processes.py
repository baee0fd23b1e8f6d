"""Several processes that are hosts of their own to JAX, against one process with the same global mesh of four devices.

scripts/test.sh -m multihost

Everything is compared bit for bit: the mesh decides which numbers are added in which order, not who holds the devices.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from compiler_flags import COMPILER

from rlhf_jax.checkpoint_files.manifest import find_step, read_arrays, read_manifest, saved_steps
from rlhf_jax.parallel.distributed import HEARTBEAT_SECONDS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.multihost
DEVICES = 4
STEPS = {"sft": 4, "reward": 3, "ppo": 3, "dpo": 2, "grpo": 2, "ahead": 3}
PROGRAMS = {
    "sft": ("train_sft", "configs/smoke/base.gin", {"LoopConfig.evaluate_every": "2"}),
    "reward": (
        "train_reward",
        "configs/smoke/reward.gin",
        {"LoopConfig.evaluate_every": "3", "BatchConfig.batch_size": "8"},
    ),
    "ppo": ("train_ppo", "tests/multihost/ppo_gold.gin", {}),
    "dpo": (
        "train_dpo",
        "configs/smoke/dpo.gin",
        # It starts from texts without a template.
        {"LoopConfig.evaluate_every": "2", "ModelSource.other_template": "True"},
    ),
    "grpo": ("train_grpo", "configs/smoke/grpo.gin", {}),
    "ahead": (
        "train_grpo",
        "configs/smoke/grpo.gin",
        {"run.one_step_off": "True", "GRPOConfig.importance": "@ImportanceConfig()"},
    ),
}


def launch(
    processes: int, stage: str, root: Path, base: Path | str, *flags: str, **bindings: str
) -> subprocess.Popen[str]:
    """A stage as ``processes`` processes that share four pretended devices. base: where the SFT run is, a directory or a URL."""
    experiment, config, own = PROGRAMS[stage]
    gin_values = {
        "RUN_DIR": repr(str(root / stage)),
        "run.steps": str(STEPS[stage]),
        "LoopConfig.save_every": "1",
        **own,
    }
    gin_values |= {
        "LoopConfig.tensorboard": "False",
        **{name.replace("__", "."): value for name, value in bindings.items()},
    }
    if stage != "sft":
        gin_values["POLICY"] = repr(f"{base}/sft")
    if stage in ("grpo", "ahead"):
        gin_values["REWARD"] = repr(f"{base}/reward")
    if stage in ("reward", "dpo"):
        gin_values["COMPARISONS"] = repr(str(write_comparisons(root / "comparisons.jsonl")))
    command = [sys.executable, "scripts/launch.py", f"--processes={processes}", f"--devices={DEVICES // processes}"]
    command += [
        f"--logs={root / 'logs'}",
        "--grace=20",
        "--",
        f"experiments/{experiment}.py",
        f"--gin_file={config}",
        *flags,
    ]
    settings = {**os.environ, "XLA_FLAGS": COMPILER}
    return subprocess.Popen(
        [*command, *(f"--gin_bindings={key} = {value}" for key, value in gin_values.items())],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == code, out
    return out


def write_comparisons(path: Path) -> Path:
    rows = [
        {"id": str(i), "prompt": f"case {i % 40}", "chosen": f"yes {i % 7} thanks", "rejected": f"no {i % 5}"}
        for i in range(160)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage as one process with four devices: SFT from scratch, a reward model of it, PPO of it with a reward that
    the host computes, DPO of it, GRPO of it with that reward model, and the same with rollouts one step ahead."""
    root = tmp_path_factory.mktemp("one")
    for stage in STEPS:
        finish(launch(1, stage, root, root))
    return root


def same(stage: str, root: Path, one: Path) -> None:
    """Metrics (rollouts, rewards and held-out numbers are among them) and every array of the last checkpoint."""
    metrics = (root / stage / "metrics.jsonl").read_text()
    assert metrics == (one / stage / "metrics.jsonl").read_text()
    assert json.loads(metrics.splitlines()[-1])["step"] == STEPS[stage] == saved_steps(root / stage)[-1]
    arrays, expected = (read_arrays(find_step(where / stage)) for where in (root, one))
    assert arrays.keys() == expected.keys() and len(arrays) > 20
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    if stage == "reward":
        scale = "reward_normalisation.json"
        assert (root / stage / scale).read_text() == (one / stage / scale).read_text()


def test_four_processes_are_one(one: Path, tmp_path: Path) -> None:
    """The stages one after another: what four processes saved, four processes read."""
    for stage in ("sft", "reward", "ppo"):
        finish(launch(4, stage, tmp_path, tmp_path))
        same(stage, tmp_path, one)
        devices = json.loads((tmp_path / stage / "provenance.json").read_text())["launches"][0]["devices"]
        assert (devices["processes"], devices["count"]) == (4, DEVICES)


@pytest.mark.parametrize("stage", ["dpo", "grpo", "ahead"])
def test_two_processes_are_one(one: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their models come from URLs, and the first keeps a copy of the run directory at one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    finish(launch(2, stage, tmp_path, f"file://{one}", f"--sync=file://{tmp_path}/bucket"))
    same(stage, tmp_path, one)
    local, remote = (
        {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        for place in (tmp_path / stage, tmp_path / "bucket")
    )
    assert remote == local - {".lock"} and f"checkpoints/{STEPS[stage]}/manifest.json" in remote


def slow(phase: str) -> dict[str, str]:
    """Bindings that make ``phase`` of step 2 take ten seconds in every process: something happens to them then."""
    fault = {"point": repr(phase), "action": "'slow'", "step": "2", "seconds": "10.0"}
    return {"LoopConfig__faults": "[@Fault()]", **{f"Fault__{name}": value for name, value in fault.items()}}


def until_in(phase: str, run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Wait for ``phase`` of step 2, and for the checkpoint of step 1, which is written in the background."""
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        status = run_dir / "status.json"
        text = status.read_text() if status.is_file() else ""
        current = json.loads(text) if text else {"step": 0, "phase": ""}
        if (current["step"], current["phase"]) == (2, phase) and saved_steps(run_dir) == [1]:
            return
        time.sleep(0.02)


def child(parent: subprocess.Popen[str], index: int) -> int:
    """The process id of process ``index`` of two."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f",2,{index}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes())


def signal_all(parent: subprocess.Popen[str]) -> None:
    parent.send_signal(signal.SIGTERM)


def signal_one(parent: subprocess.Popen[str]) -> None:
    os.kill(child(parent, 1), signal.SIGTERM)


@pytest.mark.parametrize(("stage", "phase", "interrupt"), [("sft", "train", signal_all), ("ppo", "reward", signal_one)])
def test_a_signal_stops_all_at_the_same_step(
    one: Path, tmp_path: Path, stage: str, phase: str, interrupt: Callable[[subprocess.Popen[str]], None]
) -> None:
    """SIGTERM to all, or to one alone: each finishes step 2, it is saved, all end with 143; the same command goes on."""
    process = launch(2, stage, tmp_path, one, **slow(phase))
    until_in(phase, tmp_path / stage, process)
    interrupt(process)
    out = finish(process, 128 + signal.SIGTERM)
    other = (tmp_path / "logs" / "process_1.log").read_text()
    stopped = [re.findall(r"stopped at step (\d+);", text) for text in (out, other)]
    assert stopped == [["2"], ["2"]]
    assert "launch: stopped by a signal, all with exit code 143" in out
    assert saved_steps(tmp_path / stage) == [1, 2] and read_manifest(find_step(tmp_path / stage))["step"] == 2
    finish(launch(2, stage, tmp_path, one))
    same(stage, tmp_path, one)


def test_a_dead_process_stops_the_others_and_the_run_goes_on(one: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a step: the parent says who died and stops the other, which waits for it in a collective;
    the same command goes on from the last checkpoint."""
    process = launch(2, "reward", tmp_path, one, **slow("train"))
    until_in("train", tmp_path / "reward", process)
    os.kill(child(process, 1), signal.SIGKILL)
    killed = time.monotonic()
    out = finish(process, 128 + signal.SIGKILL)
    assert time.monotonic() - killed < 40  # the grace of 20 s, and what ending takes
    assert "launch: process 1 ended with SIGKILL; stopping the others" in out
    assert saved_steps(tmp_path / "reward") == [1]
    finish(launch(2, "reward", tmp_path, one))
    same("reward", tmp_path, one)


@pytest.mark.parametrize("victim", [0, 1])
def test_without_a_parent_the_heartbeat_stops_the_others(tmp_path: Path, victim: int) -> None:
    """As on two machines: nobody tells the one that is left, the coordinator (process 0) or who asks it does."""
    program = [sys.executable, str(Path(__file__).with_name("endless.py"))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": COMPILER}
    pair = [
        subprocess.Popen([*program, f"localhost:{port},2,{index}"], env=settings, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        for process in pair:
            assert process.stdout is not None and "going\n" in process.stdout  # after what Gloo has to say
        pair[victim].kill()
        killed = time.monotonic()
        code = pair[1 - victim].wait(timeout=3 * HEARTBEAT_SECONDS)
        assert code != 0
        assert time.monotonic() - killed < 2 * HEARTBEAT_SECONDS
    finally:
        for process in pair:
            process.kill()
            process.wait()
