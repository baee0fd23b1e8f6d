"""Every experiment from configs/smoke, once, as one chain: what it writes and what its numbers must be."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from experiment_processes import STAGES, read_lines

from rlhf_jax.checkpoint_files.manifest import saved_steps
from rlhf_jax.rundir import fingerprint, fingerprint_path, lineage, read_provenance

STEPS = {"base": 30, "sft": 12, "reward": 12, "ppo": 6}
SAVED = {"base": [20, 30], "sft": [5, 10, 12], "reward": [5, 10, 12], "ppo": [4, 6]}


@pytest.mark.parametrize("stage", STAGES)
def test_what_every_stage_writes(chain: Path, stage: str) -> None:
    run_dir = chain / stage
    provenance = read_provenance(run_dir)
    assert provenance is not None and len(provenance["launches"]) == 1
    experiments = {"base": "sft", "completions": "generate", "evaluation": "evaluate"}
    assert provenance["stage"] == experiments.get(stage, stage)
    config = (run_dir / "config.gin").read_text()
    operative = (run_dir / "operative_config.gin").read_text()
    assert "run.seed = %SEED" in config and f"RUN_DIR = '{run_dir}'" in "".join(config.split("\\\n    "))
    assert len(operative) > len(config)  # with the defaults
    (launch,) = provenance["launches"]
    assert launch["mesh"] == {"data": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert launch["git"].keys() == {"commit", "dirty"} and launch["versions"]["jax"]


@pytest.mark.parametrize("stage", STEPS)
def test_what_training_writes(chain: Path, stage: str) -> None:
    run_dir, steps = chain / stage, STEPS[stage]
    assert saved_steps(run_dir) == SAVED[stage]
    metrics, timing = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "timing.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in timing] == list(range(1, steps + 1))
    assert all(line["seconds"] > 0 for line in timing)
    assert not any("seconds" in line or "time" in line for line in metrics)
    (events,) = (run_dir / "tensorboard").iterdir()
    assert events.stat().st_size > 500
    assert json.loads((run_dir / "model.json").read_text())["config"]["hidden_size"] == 32
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()


def test_lineage_from_the_evaluation_to_the_data(chain: Path) -> None:
    """Every input is named with its fingerprint and configuration, and is still what it was."""
    tree = lineage(chain / "evaluation", verify=True)
    inputs = {entry["name"]: entry for entry in tree["inputs"]}
    assert list(inputs) == ["base", "sft", "ppo", "reward", "data"]
    for name in ("base", "sft", "ppo", "reward"):
        step = STEPS[name]
        assert inputs[name]["state"] == "same"
        assert (inputs[name]["path"], inputs[name]["step"]) == (str(chain / name), step)
        assert inputs[name]["fingerprint"] == fingerprint(chain / name, step)
        assert inputs[name]["config"] == fingerprint_path(chain / name / "operative_config.gin")
    ppo = {entry["name"]: entry for entry in inputs["ppo"]["run"]["inputs"]}
    assert (ppo["policy"]["path"], ppo["reward"]["path"]) == (str(chain / "sft"), str(chain / "reward"))
    # Reward model <- comparisons <- the policy that wrote the replies <- base <- its corpus.
    reward = {entry["name"]: entry for entry in ppo["reward"]["run"]["inputs"]}
    replies = reward["data 0"]
    assert replies["path"] == str(chain / "completions" / "comparisons.jsonl")
    assert (replies["state"], replies["run"]["stage"]) == ("same", "generate")
    model = replies["run"]["inputs"][0]
    assert model["path"] == str(chain / "sft")
    base = model["run"]["inputs"][0]
    assert (base["path"], base["run"]["inputs"][0]["path"]) == (str(chain / "base"), "generated")


def test_supervised_runs_learn(chain: Path) -> None:
    for stage, least in (("base", 1.0), ("sft", 0.3)):
        heldout_losses = [
            line["heldout/loss"] for line in read_lines(chain / stage / "metrics.jsonl") if "heldout/loss" in line
        ]
        assert heldout_losses[0] - heldout_losses[-1] > least, (stage, heldout_losses)  # the first is before training
    base = read_lines(chain / "base" / "metrics.jsonl")[0]["heldout/loss"]
    assert abs(base - 6.24) < 0.3  # log 512: a fresh model knows nothing


def test_completions_and_comparisons(chain: Path) -> None:
    rows = read_lines(chain / "completions" / "completions.jsonl")
    assert len(rows) == 160
    by_prompt: dict[str, list[str]] = {}
    for row in rows:
        by_prompt.setdefault(row["id"], []).append(row["response"])
    assert {len(replies) for replies in by_prompt.values()} == {2}
    assert sum(len(set(replies)) == 2 for replies in by_prompt.values()) > 40  # samples differ in their random bits
    comparisons = read_lines(chain / "completions" / "comparisons.jsonl")
    summary = json.loads((chain / "completions" / "annotation.json").read_text())
    assert summary["comparisons"] == len(comparisons) > 40
    for row in comparisons:
        assert {row["chosen"], row["rejected"]} == set(by_prompt[row["id"]])


def test_reward_model(chain: Path) -> None:
    lines = read_lines(chain / "reward" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert {"heldout/accuracy", "heldout/accuracy_low", "heldout/accuracy_high", "heldout/loss"} <= lines[-1].keys()
    scale = json.loads((chain / "reward" / "reward_normalisation.json").read_text())
    assert scale["gain"] > 0 and scale["pairs"] > 5


def test_ppo_starts_at_identity_and_samples_what_it_scores(chain: Path) -> None:
    lines = read_lines(chain / "ppo" / "metrics.jsonl")
    for line in lines:
        assert abs(line["identity/ratio"] - 1.0) < 1e-5
        assert abs(line["identity/identity_gap"]) < 1e-4
        assert abs(line["identity/approx_kl_k2"]) < 1e-8
        assert line["identity/clip_fraction"] == 0.0
        assert line["sampler_gap"] < 1e-5 and line["sampler_gap_max"] < 1e-4
        assert "monitor/gold" in line and 0.0 <= line["monitor/gold"] <= 1.0
        assert 1.0 <= line["response_length"] <= 24.0
    # Policy and reference are one model before the first update, and two afterwards.
    assert abs(lines[0]["kl"]) < 1e-4 and lines[-1]["kl"] != lines[0]["kl"]
    # The adaptive controller: below its target of 0.5 nats after the first rollout, so the coefficient falls by
    # max(kl / 0.5 - 1, -0.2) * 16 episodes / horizon 100: 0.05 * (1 - 0.032).
    assert lines[0]["kl_coefficient"] == pytest.approx(0.05)
    assert lines[1]["kl_coefficient"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 100))
    # And so on with the k1 SUM over a response: a mean per token or an approximate KL would stay below the target.
    for line, following in itertools.pairwise(lines):
        nudge = min(max(line["kl"] / 0.5 - 1.0, -0.2), 0.2) * 16 / 100
        assert following["kl_coefficient"] == pytest.approx(line["kl_coefficient"] * (1 + nudge), rel=1e-5)
    assert max(line["kl"] for line in lines[:-1]) > 0.4  # beyond the clip at -20 %, where the kinds of KL differ


def test_evaluation_and_report(chain: Path) -> None:
    evaluation = json.loads((chain / "evaluation" / "evaluation.json").read_text())
    assert [policy["name"] for policy in evaluation["policies"]] == ["base", "sft", "ppo"]
    for policy in evaluation["policies"]:
        assert {"gold", "gold/fact", "length", "ended", "reward"} <= policy["scores"].keys()
        assert policy["scores"]["gold"]["n"] == 24
        ended = policy["scores"]["ended"]  # a share: Wilson's interval, which has a width at 0 and 1 too
        assert 0.0 <= ended["low"] < ended["high"] <= 1.0 and ended["low"] <= ended["mean"] <= ended["high"]
        z2, n = 1.959964**2, 24
        assert ended["low"] + ended["high"] == pytest.approx((2 * ended["mean"] + z2 / n) / (1 + z2 / n), abs=1e-6)
    assert evaluation["seed"] == 0 and {"commit"} < evaluation.keys()
    assert [(entry["from"], entry["to"]) for entry in evaluation["differences"]] == [("base", "sft"), ("sft", "ppo")]
    assert len(evaluation["samples"]) == 4
    page = (chain / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(STEPS) and "http://" not in page and "https://" not in page
    record = json.loads((chain / "pipeline.json").read_text())
    assert list(record["stages"]) == list(STAGES)
