"""--doctor of the training scripts on good configurations and on broken ones: it says what is wrong, and touches nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from experiment_processes import ROOT
from forked_programs import Result, Server

from rlhf_jax.loop.faults import flip_bit

PLACES = {
    "sft": {"BASE": "base"},
    "reward": {"POLICY": "sft", "COMPARISONS": "completions/comparisons.jsonl"},
    "dpo": {"POLICY": "sft", "COMPARISONS": "completions/comparisons.jsonl"},
    "ppo": {"POLICY": "sft", "REWARD": "reward"},
    "grpo": {"POLICY": "sft", "REWARD": "reward"},
}


def slow(config: str):
    return pytest.param(config, marks=pytest.mark.slow)


def examine(server: Server, tmp_path: Path, chain: Path, config: str, *bindings: str, **places: Path) -> Result:
    paths = {name: chain / path for name, path in PLACES[config].items()} | places
    argv = [str(ROOT / "experiments" / f"train_{config}.py"), f"--gin_file=configs/smoke/{config}.gin", "--doctor"]
    argv += [f"--gin_bindings={name} = {str(path)!r}" for name, path in paths.items()]
    argv += [f"--gin_bindings=RUN_DIR = {str(tmp_path / 'run')!r}", *(f"--gin_bindings={text}" for text in bindings)]
    before = sorted(path.name for path in tmp_path.iterdir())
    result = server(tmp_path, argv)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("stdout", "stderr")) == before
    return result


def wrong(result: Result) -> dict[str, str]:
    """Return {check: message} of the WRONG lines; the last line on stderr counts them."""
    lines = [line.split(": ", 1) for line in result.stdout.splitlines() if line.startswith("WRONG")]
    problems = {check.removeprefix("WRONG").strip(): words for check, words in lines}
    if problems:
        assert result.returncode == 3 and f"doctor: {len(problems)} of " in result.stderr, result.stderr
    return problems


@pytest.mark.parametrize("config", ["sft", "ppo", slow("reward"), slow("dpo"), slow("grpo")])
def test_nothing_wrong(config: str, chain: Path, tmp_path: Path, server: Server) -> None:
    result = examine(server, tmp_path, chain, config)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("nothing wrong in 1")
    checks = {line[7:].split(":")[0] for line in result.stdout.splitlines()[:-1]}
    assert {"vocabulary", "BOS", "pad and EOS", "batches", "gradient accumulation", "memory", "time", "disk"} <= checks
    assert "checkpoint" in checks
    if config in ("ppo", "grpo"):
        assert ("groups" in checks) == (config == "grpo")
        assert {
            "sampler and scorer",
            "reference",
            "reward model",
            "tokenizers",
            "reward spread",
            "template of the policy",
        } <= checks
    else:
        assert {"label masks", "lengths", "end of response", "first steps"} <= checks


def test_most_of_the_data_too_long(chain: Path, tmp_path: Path, server: Server) -> None:
    problems = wrong(examine(server, tmp_path, chain, "sft", "BatchConfig.length = 88"))
    assert "most of the data is not learned from: raise BatchConfig.length" in problems["lengths"]


def test_a_damaged_model(chain: Path, tmp_path: Path, server: Server) -> None:
    shutil.copytree(chain / "base", tmp_path / "base")
    (newest,) = (tmp_path / "base" / "checkpoints").glob("30")
    flip_bit(newest / "state" / "_METADATA")
    problems = wrong(examine(server, tmp_path, chain, "sft", BASE=tmp_path / "base"))
    assert "damaged checkpoint: state/_METADATA has another sha256" in problems["refused"]


@pytest.mark.slow
def test_a_batch_larger_than_the_data(chain: Path, tmp_path: Path, server: Server) -> None:
    problems = wrong(examine(server, tmp_path, chain, "sft", "BatchConfig.batch_size = 256"))
    assert "lower BatchConfig.batch_size" in problems["batches"]


@pytest.mark.slow
def test_a_reward_model_whose_scale_was_changed(chain: Path, tmp_path: Path, server: Server) -> None:
    shutil.copytree(chain / "reward", tmp_path / "reward")
    file = tmp_path / "reward" / "reward_normalisation.json"
    numbers = json.loads(file.read_text())
    file.write_text(json.dumps(numbers | {"bias": numbers["bias"] + 0.5}))
    problems = wrong(examine(server, tmp_path, chain, "ppo", REWARD=tmp_path / "reward"))
    assert list(problems) == ["reward model"] and "the model loaded is not the one trained" in problems["reward model"]


@pytest.mark.slow
def test_a_sampler_too_far_from_the_scorer(chain: Path, tmp_path: Path, server: Server) -> None:
    problems = wrong(examine(server, tmp_path, chain, "ppo", "PPOConfig.max_sampler_gap = 0.0"))
    assert "the ratio would be wrong" in problems["sampler and scorer"]


@pytest.mark.slow
def test_samples_of_a_prompt_that_all_score_alike(chain: Path, tmp_path: Path, server: Server) -> None:
    """Without a temperature to speak of they are one reply."""
    problems = wrong(examine(server, tmp_path, chain, "grpo", "SamplingConfig.temperature = 1e-4"))
    assert "nothing to learn from" in problems["groups"]


@pytest.mark.slow
def test_every_reply_cut_off(chain: Path, tmp_path: Path, server: Server) -> None:
    problems = wrong(examine(server, tmp_path, chain, "ppo", "SamplingConfig.max_new_tokens = 1"))
    assert "raise SamplingConfig.max_new_tokens" in problems["responses"]


def test_a_configuration_of_something_else(server: Server, tmp_path: Path) -> None:
    script = [str(ROOT / "experiments" / "doctor.py"), "--experiment=train_ppo"]
    result = server(tmp_path, [*script, "--gin_file=configs/smoke/evaluate.gin"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
