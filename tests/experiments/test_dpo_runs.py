"""DPO on the smoke chain: it begins at its reference, learns, resumes exactly, with adapters too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from experiment_processes import read_lines
from interrupted_runs import same_as, terminate

from rlhf_jax.io import load_pretrained


def places(chain: Path) -> dict[str, Path]:
    return {"POLICY": chain / "sft", "COMPARISONS": chain / "completions" / "comparisons.jsonl"}


@pytest.mark.slow
def test_dpo_learns_and_resumes_exactly(chain: Path, train, tmp_path: Path) -> None:
    settings = places(chain) | {"BatchConfig.folded": True}
    train("train_dpo", "dpo", "unbroken", **settings)
    lines = read_lines(tmp_path / "unbroken" / "metrics.jsonl")
    losses = [line["loss/preference"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    heldout_lines = [line for line in lines if "heldout/loss" in line]
    assert [line["step"] for line in heldout_lines] == [4, 8, 12] and 0 <= heldout_lines[-1]["heldout/accuracy"] <= 1
    assert load_pretrained(tmp_path / "unbroken").model.config.head == "lm"  # it is a policy like any other

    terminate(train, tmp_path / "broken", 3, "train_dpo", "dpo", **settings)
    train("train_dpo", "dpo", "broken", **settings)
    same_as(tmp_path / "unbroken", tmp_path / "broken", "params", "opt_state", "rng", "step")


@pytest.mark.slow
def test_dpo_of_adapters_begins_at_its_base(chain: Path, train, tmp_path: Path) -> None:
    train("train_dpo", "dpo_lora", "run", **places(chain))
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(lines[0]["reward_gap"]) < 1e-6 < abs(lines[-1]["reward_gap"])
