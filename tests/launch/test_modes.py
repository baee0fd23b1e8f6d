"""Tests of --plan and --doctor: settings, required values, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from forked_programs import Server

from rlhf_jax.errors import InputError
from rlhf_jax.launch import launching, run_mode  # noqa: F401  defines the flags
from rlhf_jax.launch.modes import RunSettings
from rlhf_jax.loop import LoopConfig
from rlhf_jax.loop.faults import Fault
from rlhf_jax.parallel import MeshConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Described:
    records: Any = "some"
    run_only = ("records",)
    phase_names = ("train",)


SETTINGS: dict[str, Any] = {"run_dir": "runs/x", "steps": 3, "seed": 0, "loop": LoopConfig()}


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["x"])
    yield
    for name in ("plan", "plan_json", "doctor"):
        flags.FLAGS[name].value = flags.FLAGS[name].default


def test_a_run_gets_its_settings() -> None:
    assert run_mode(Described(), mesh=MeshConfig(), **SETTINGS) == RunSettings("runs/x", 3, 0, SETTINGS["loop"])


@pytest.mark.parametrize("name", [*SETTINGS, "records"])
def test_a_missing_setting_is_named(name: str) -> None:
    algorithm = Described(None) if name == "records" else Described()
    settings = SETTINGS | ({name: None} if name in SETTINGS else {})
    with pytest.raises(InputError, match=f"run.{name}: has no value; bind it"):
        run_mode(algorithm, mesh=MeshConfig(), **settings)


def test_the_doctor_needs_data_alone() -> None:
    flags.FLAGS.doctor = True
    with pytest.raises(InputError, match="run.records: has no value"):
        run_mode(Described(None), mesh=MeshConfig(), **dict.fromkeys(SETTINGS))


def test_flags_without_effect_are_refused() -> None:
    flags.FLAGS.plan_json = "x.json"
    with pytest.raises(InputError, match="--plan_json: has no effect without --plan"):
        run_mode(Described(), mesh=MeshConfig(), **SETTINGS)
    flags.FLAGS.plan, flags.FLAGS.doctor = "local", True
    with pytest.raises(InputError, match="--plan, --doctor, --preview: give one of them"):
        run_mode(Described(), mesh=MeshConfig(), **SETTINGS)


def test_phases_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match=r"LoopConfig.deadlines: no phase 'roll'; use one of step, train, log"):
        run_mode(Described(), mesh=MeshConfig(), **SETTINGS | {"loop": LoopConfig(deadlines=(("roll", 3.0),))})
    with pytest.raises(InputError, match="Fault.point = 'update': one of train, log"):
        run_mode(Described(), mesh=MeshConfig(), **SETTINGS | {"loop": LoopConfig(faults=(Fault("update", "kill"),))})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--topology=local"], "error: --experiment=: name the training script: train_dpo, train_grpo"),
        (["plan", "--experiment=train_x", "--topology=local"], "error: --experiment=train_x: name the training"),
        (["plan", "--experiment=train_sft"], "error: --topology: give it, for instance --topology=v5p:2x2x4"),
        (["doctor"], "error: --experiment=: name the training script"),
    ],
)
def test_scripts_name_the_missing_flag(arguments: list[str], message: str, server: Server, tmp_path: Path) -> None:
    script, *options = arguments
    completions = server(tmp_path, [str(ROOT / "experiments" / f"{script}.py"), *options])
    assert (
        completions.returncode == 2 and completions.stderr.startswith(message) and completions.stderr.count("\n") == 1
    ), completions.stderr
