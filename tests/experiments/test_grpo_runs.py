"""GRPO on the smoke chain: identity before every update, groups that learn, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_processes import read_lines
from interrupted_runs import same_as, terminate

from rlhf_jax.io import load_pretrained


@pytest.mark.slow  # three processes; PPO, in the default suite, resumes by the same code with more state
def test_grpo_runs_and_resumes_exactly(chain: Path, train, tmp_path: Path) -> None:
    places = {"POLICY": chain / "sft", "REWARD": chain / "reward", "BatchConfig.folded": True}
    train("train_grpo", "grpo", "unbroken", **places)
    lines = read_lines(tmp_path / "unbroken" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        assert abs(line["identity/ratio"] - 1.0) < 1e-5 and line["identity/clip_fraction"] == 0.0
        assert line["sampler_gap"] < 1e-5 and 0.0 <= line["zero_variance_groups"] < 1.0 and line["score_within"] > 0.0
    assert abs(lines[0]["kl"]) < 1e-4 < abs(lines[-1]["kl"])  # from the reference, and away from it
    assert load_pretrained(tmp_path / "unbroken").model.config.head == "lm"  # it is a policy like any other

    terminate(train, tmp_path / "broken", 2, "train_grpo", "grpo", **places)
    offloaded = {"run.offload_optimizer": True}  # where the moments lie during rollouts changes no bit
    train("train_grpo", "grpo", "broken", **places, **offloaded)
    same_as(tmp_path / "unbroken", tmp_path / "broken", "policy", "opt_state", "rng", "step")
