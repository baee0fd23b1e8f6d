"""A new algorithm over a copy of the tree: the files of tests/algorithms/toy, and one line in each of three lists."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compiler_flags import COMPILER
from forked_programs import EXPERIMENTS, Result, Server, forked_programs

from rlhf_jax.testing import difference

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy")
FILES = {
    "learn.py": "rlhf_jax/learn/anchored.py",
    "algorithm.py": "rlhf_jax/algorithms/anchored.py",
    "experiment.py": "experiments/train_anchored.py",
    "anchored.gin": "configs/anchored.gin",
    "run.gin": "configs/run_anchored.gin",
}
LINES = {
    "rlhf_jax/learn/__init__.py": "from rlhf_jax.learn.anchored import AnchorConfig, distance, make_anchor_loss\n",
    "rlhf_jax/algorithms/__init__.py": "from rlhf_jax.algorithms.anchored import Anchored\n",
    "rlhf_jax/config/surface.py": "from rlhf_jax.learn import AnchorConfig\ngin.register(AnchorConfig, module='rlhf_jax')\n",
}
"""What is added to files that exist."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("rlhf_jax", "experiments", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, place in FILES.items():
        text = (TOY / name).read_text().replace("include 'anchored.gin'", "include 'configs/anchored.gin'")
        (copy / place).write_text(text)
    for name, line in LINES.items():
        with (copy / name).open("a") as file:
            file.write(line)
    return copy


@pytest.fixture(scope="module")
def server(tree: Path) -> Iterator[Server]:
    environment = {**os.environ, "XLA_FLAGS": COMPILER}
    with forked_programs(EXPERIMENTS, environment, tree) as call:
        yield call


@pytest.fixture
def train(tree: Path, server: Server) -> Callable[..., Result]:
    def call(*arguments: str, config: str = "run_anchored", code: int = 0) -> Result:
        completions = server(tree, ["experiments/train_anchored.py", f"--gin_file=configs/{config}.gin", *arguments])
        assert completions.returncode == code, completions.stderr
        return completions

    return call


def test_it_is_planned_without_data(train, tmp_path: Path) -> None:
    """The file of sizes alone: no data, run directory, steps, seed or loop."""
    train("--plan=local", f"--plan_json={tmp_path / 'plan.json'}", config="anchored")
    phases = [phase["phase"] for phase in json.loads((tmp_path / "plan.json").read_text())["phases"]]
    assert phases == ["anchored step", "anchored evaluate", "anchored measure"]


@pytest.mark.tpu_aot
def test_it_is_planned_for_a_tpu_slice(train) -> None:
    assert "v5e:2x4" in train("--plan=v5e:2x4", "--gin_bindings=BatchConfig.batch_size = 16", config="anchored").stdout


def test_it_passes_the_doctor(train, tmp_path: Path) -> None:
    completions = train("--doctor", f"--gin_bindings=RUN_DIR = '{tmp_path}/run'")
    assert "nothing wrong" in completions.stdout and "gradient accumulation" in completions.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_refuses_what_only_a_plan_may_lack(train) -> None:
    completions = train(config="anchored", code=2)
    assert completions.stderr.splitlines()[-1].startswith("error: run.run_dir: has no value")


def test_killed_in_its_own_phase_it_goes_on_bit_for_bit(train, tmp_path: Path) -> None:
    """kill -9 while the new phase works; the same command without the fault goes on."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(f"--gin_bindings=RUN_DIR = '{whole}'")
    fault = ["LoopConfig.faults = [@Fault()]", "Fault.point = 'measure'", "Fault.action = 'kill'", "Fault.step = 3"]
    train(f"--gin_bindings=RUN_DIR = '{broken}'", *(f"--gin_bindings={line}" for line in fault), code=-9)
    train(f"--gin_bindings=RUN_DIR = '{broken}'")
    assert difference(whole, broken) == ""
    values = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert values[-1]["loss/nll"] < values[0]["loss/nll"] and values[-1]["moved"] > values[0]["moved"] > 0


def test_an_unknown_phase_is_refused_when_the_run_opens(train, tmp_path: Path) -> None:
    fault = ["LoopConfig.faults = [@Fault()]", "Fault.point = 'update'", "Fault.action = 'kill'"]
    bindings = [f"--gin_bindings={line}" for line in fault]
    completions = train(f"--gin_bindings=RUN_DIR = '{tmp_path}/run'", *bindings, code=2)
    assert "Fault.point = 'update': one of train, measure, log" in completions.stderr
    assert not (tmp_path / "run").exists()


def test_the_guide_shows_these_files() -> None:
    guide = (ROOT / "docs" / "extending.md").read_text()
    for name in ("learn.py", "algorithm.py", "experiment.py"):
        assert (TOY / name).read_text() in guide
    assert (ROOT / "rlhf_jax" / "models" / "families" / "mistral.py").read_text() in guide
