"""The planner lowers the very programs of the run: both write what they lower, and it is the same text."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from compiler_flags import EIGHT_DEVICES
from experiment_processes import command
from forked_programs import Server

RUNS = {
    "sft": ("train_sft", ["jit_train_step", "jit_evaluate"]),
    "reward": ("train_reward", ["jit_train_step", "jit_evaluate"]),
    "dpo": ("train_dpo", ["jit_train_step", "jit_evaluate"]),
    "ppo": ("train_ppo", ["jit_generate", "jit_score", "jit_prepare", "jit_update"]),
    "grpo": ("train_grpo", ["jit_generate", "jit_score", "jit_prepare", "jit_update"]),
}
ADAPTERS = ["run.lora = @LoraConfig()", "run.rollout_mesh = @rollout/MeshConfig()", "rollout/MeshConfig.fsdp = 1"]
ADAPTERS += ["rollout/MeshConfig.data = 8"]


DUMPED = """
import runpy, sys
import jax
_, place, *sys.argv[:] = sys.argv
jax.config.update("jax_dump_ir_to", place)
jax.config.update("jax_dump_ir_modes", "stablehlo")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lowered(server: Server, arguments: list[str], dump: Path) -> dict[str, str]:
    """Return {program: sha256 of what was lowered under that name first}, on eight pretended devices."""
    program = dump.with_suffix(".py")
    program.write_text(DUMPED)
    result = server(dump.parent, [str(program), str(dump), *arguments], {"XLA_FLAGS": EIGHT_DEVICES})
    assert result.returncode == 0, result.stderr
    digests: dict[str, str] = {}
    for file in sorted(dump.iterdir()):
        name = re.sub(r"^jax_ir\d+_|_compile\.mlir$", "", file.name)
        digests.setdefault(name, hashlib.sha256(without_places(file.read_text()).encode()).hexdigest())
    return digests


def without_places(text: str) -> str:
    """Strip the source locations: the planner is another program."""
    remaining = "\n".join(line for line in text.splitlines() if not line.startswith("#loc"))
    return re.sub(r" ?loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", remaining)


@pytest.mark.parametrize(
    ("stage", "bindings"),
    [
        pytest.param("sft", [], marks=pytest.mark.slow),
        pytest.param("sft", ["run.lora = @LoraConfig()"], marks=pytest.mark.slow),
        pytest.param("reward", [], marks=pytest.mark.slow),
        pytest.param("dpo", [], marks=pytest.mark.slow),
        pytest.param("dpo", ["run.lora = @LoraConfig()"], marks=pytest.mark.slow),
        pytest.param("grpo", [], marks=pytest.mark.slow),
        pytest.param("grpo", ["GRPOConfig.kl_coefficient = 0.0"], marks=pytest.mark.slow),
        ("ppo", []),
        pytest.param("ppo", ADAPTERS, marks=pytest.mark.slow),
    ],
)
def test_the_plan_lowers_what_the_run_lowers(
    chain: Path, server: Server, tmp_path: Path, stage: str, bindings: list[str]
) -> None:
    experiment, programs = RUNS[stage]
    macros = {
        "sft": {"BASE": chain / "base"},
        "reward": {"POLICY": chain / "sft", "COMPARISONS": chain / "completions" / "comparisons.jsonl"},
        "dpo": {"POLICY": chain / "sft", "COMPARISONS": chain / "completions" / "comparisons.jsonl"},
        "ppo": {"POLICY": chain / "sft", "REWARD": chain / "reward"},
        "grpo": {"POLICY": chain / "sft", "REWARD": chain / "reward"},
    }[stage]
    macros["RUN_DIR"] = tmp_path / "run"
    more = ["--gin_bindings=run.steps = 1", "--gin_bindings=run.mesh = @MeshConfig()"]
    more += ["--gin_bindings=MeshConfig.data = 2", *(f"--gin_bindings={line}" for line in bindings)]
    arguments = [*command(experiment, f"configs/smoke/{stage}.gin", **macros)[1:], *more]
    ran = lowered(server, arguments, tmp_path / "ran")
    flags = ["--plan=local", f"--plan_json={tmp_path / 'plan.json'}"]
    planned = lowered(server, [*arguments, *flags], tmp_path / "planned")
    assert set(programs) <= ran.keys()
    assert {name: planned.get(name) for name in programs} == {name: ran[name] for name in programs}
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["settings"]["mesh"] == {"data": 2, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 1}
    assert len({phase["program_sha256"] for phase in plan["phases"]}) == len(programs)
