"""Rollouts sampled one update ahead: what is measured of them, and exact resume, though the policy that sampled is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_processes import read_lines
from interrupted_runs import resumed_steps, same_as, terminate

from rlhf_jax.io import load_pretrained
from rlhf_jax.models import Model


def places(chain: Path) -> dict[str, object]:
    return {"POLICY": chain / "sft", "REWARD": chain / "reward", "run.one_step_off": True}


class Reference(str):
    """A gin reference: its repr is itself."""

    def __repr__(self) -> str:
        return str(self)


WEIGHTS = {"PPOConfig.importance": Reference("@ImportanceConfig()")}
FEW = {"run.steps": 3, "LoopConfig.save_every": 2}
KILLED = {
    "LoopConfig.faults": Reference("[@Fault()]"), "Fault.point": "retain", "Fault.action": "kill", "Fault.step": 2,
}  # fmt: skip
"""A fault: killed as soon as step 2 is saved."""


def test_ppo_one_step_off(chain: Path, train, tmp_path: Path) -> None:
    """Killed once step 2 is saved, with a rollout of the policy before; the same command goes on bit for bit."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    settings = places(chain) | WEIGHTS | FEW
    train("train_ppo", "ppo", "unbroken", **settings)
    lines, usual = (read_lines(run / "metrics.jsonl") for run in (unbroken, chain / "ppo"))
    # The first rollout is the same, on policy; its update is the same up to the rounding of a product with 1.
    assert lines[0]["sampler_gap"] == usual[0]["sampler_gap"] and abs(lines[0]["importance"] - 1.0) < 1e-6
    assert lines[0]["loss"] == pytest.approx(usual[0]["loss"], abs=1e-5)
    for line in lines[1:]:  # older samples of a policy that has moved since, scored by the present one
        assert line["identity/identity_gap"] < 1e-5 and line["sampler_gap"] > 1e-3
        assert 0.5 < line["importance"] < 2.0 and 0.5 < line["importance_sample_size"] < 1.0
    assert isinstance(load_pretrained(unbroken).model, Model)  # found within what is saved

    train("train_ppo", "ppo", "broken", code=-9, **settings, **KILLED)
    train("train_ppo", "ppo", "broken", **settings)
    assert resumed_steps(broken) == [0, 2]
    same_as(unbroken, broken, "policy", "value", "opt_state", "completions", "kl_coefficient")


@pytest.mark.slow  # GRPO resumes by the same code as PPO above
def test_grpo_one_step_off_whose_ratio_begins_at_the_sampler(chain: Path, train, tmp_path: Path) -> None:
    sampler = {**places(chain), "GRPOConfig.old_logprobs": "sampler"}
    train("train_grpo", "grpo", "unbroken", **sampler)
    lines = read_lines(tmp_path / "unbroken" / "metrics.jsonl")
    assert lines[0]["identity/identity_gap"] < 1e-5
    for line in lines[1:]:
        assert line["identity/identity_gap"] > 1e-3 and "importance" not in line
    terminate(train, tmp_path / "broken", 2, "train_grpo", "grpo", **sampler)
    train("train_grpo", "grpo", "broken", **sampler)
    same_as(tmp_path / "unbroken", tmp_path / "broken", "policy", "opt_state", "completions")


@pytest.mark.slow  # tests/algorithms/test_rollouts.py shows which policy samples after a rollback
def test_rolled_back_rollouts_are_sampled_anew(chain: Path, train, tmp_path: Path) -> None:
    """A number of step 5 is not finite: back to step 4, whose checkpoint holds a rollout of prompts that are passed over."""
    fault = {
        "LoopConfig.faults": Reference("[@Fault()]"), "Fault.point": "log", "Fault.action": "nan", "Fault.step": 5,
        "LoopConfig.on_bad_step": "rollback",
    }  # fmt: skip
    err = train("train_ppo", "ppo", "back", **places(chain), **WEIGHTS, **fault).stderr
    assert "step 5: " in err and "going on from step 4 with the next batches" in err
    lines = read_lines(tmp_path / "back" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["sampler_gap"] < 1e-5 < lines[3]["sampler_gap"]  # of the policy as it is after the rollback
    assert lines[5]["sampler_gap"] > 1e-3
