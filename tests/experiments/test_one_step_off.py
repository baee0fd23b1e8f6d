"""Rollouts sampled one update ahead: what is measured of them, and exact resume, though the policy that sampled is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_processes import finish, read_lines
from interrupted_runs import same_as, terminate

from rlhf_jax.io import load_pretrained
from rlhf_jax.models import Model


def places(chain: Path) -> dict[str, object]:
    return {"POLICY": chain / "sft", "REWARD": chain / "reward", "run.one_step_off": True}


def begin_with_weights(begin, algorithm: str):
    """``begin`` with the default importance weights, which are a reference and not a value."""

    def call(*arguments, **options):
        return begin(*arguments, **options, **{f"{algorithm}.importance": Reference("@ImportanceConfig()")})

    return call


class Reference(str):
    """A gin reference: its repr is itself."""

    def __repr__(self) -> str:
        return str(self)


@pytest.mark.slow  # tests/algorithms/test_rollouts.py shows what is sampled by which policy, saved and taken up again
def test_ppo_one_step_off(chain: Path, begin, tmp_path: Path) -> None:
    begin = begin_with_weights(begin, "PPOConfig")
    finish(begin("train_ppo", "ppo", "unbroken", **places(chain)))
    lines, usual = (read_lines(run / "metrics.jsonl") for run in (tmp_path / "unbroken", chain / "ppo"))
    # The first rollout is the same, on policy; its update is the same up to the rounding of a product with 1.
    assert lines[0]["sampler_gap"] == usual[0]["sampler_gap"] and abs(lines[0]["importance"] - 1.0) < 1e-6
    assert lines[0]["loss"] == pytest.approx(usual[0]["loss"], abs=1e-5)
    for line in lines[1:]:  # older samples of a policy that has moved since, scored by the present one
        assert line["identity/identity_gap"] < 1e-5 and line["sampler_gap"] > 1e-3
        assert 0.5 < line["importance"] < 2.0 and 0.5 < line["importance_sample_size"] < 1.0
    assert isinstance(load_pretrained(tmp_path / "unbroken").model, Model)  # found within what is saved

    terminate(begin, tmp_path / "broken", 2, "train_ppo", "ppo", **places(chain))
    finish(begin("train_ppo", "ppo", "broken", **places(chain)))
    same_as(tmp_path / "unbroken", tmp_path / "broken", "policy", "value", "opt_state", "completions", "kl_coefficient")


@pytest.mark.slow
def test_grpo_one_step_off_whose_ratio_begins_at_the_sampler(chain: Path, begin, tmp_path: Path) -> None:
    sampler = {**places(chain), "GRPOConfig.old_logprobs": "sampler"}
    finish(begin("train_grpo", "grpo", "unbroken", **sampler))
    lines = read_lines(tmp_path / "unbroken" / "metrics.jsonl")
    assert lines[0]["identity/identity_gap"] < 1e-5
    for line in lines[1:]:
        assert line["identity/identity_gap"] > 1e-3 and "importance" not in line
    terminate(begin, tmp_path / "broken", 2, "train_grpo", "grpo", **sampler)
    finish(begin("train_grpo", "grpo", "broken", **sampler))
    same_as(tmp_path / "unbroken", tmp_path / "broken", "policy", "opt_state", "completions")


@pytest.mark.slow
def test_rolled_back_rollouts_are_sampled_anew(chain: Path, begin, tmp_path: Path) -> None:
    """A number of step 5 is not finite: back to step 4, whose checkpoint holds a rollout of prompts that are passed over."""
    begin = begin_with_weights(begin, "PPOConfig")
    fault = {
        "LoopConfig.faults": Reference("[@Fault()]"), "Fault.point": "log", "Fault.action": "nan", "Fault.step": 5,
        "LoopConfig.on_bad_step": "rollback",
    }  # fmt: skip
    _, err = finish(begin("train_ppo", "ppo", "back", **places(chain), **fault))
    assert "step 5: " in err and "going on from step 4 with the next batches" in err
    lines = read_lines(tmp_path / "back" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["sampler_gap"] < 1e-5 < lines[3]["sampler_gap"]  # of the policy as it is after the rollback
    assert lines[5]["sampler_gap"] > 1e-3
