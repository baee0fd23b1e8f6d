"""Stopped anywhere and started again by the same command: the very run it would have been. The unbroken run is the chain's.

Every broken run is slowed down a little between its steps, so that the signal arrives midway; nothing else differs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from interrupted_runs import kill, resumed_steps, same_as, terminate


@pytest.mark.parametrize(
    ("arguments", "macros"),
    [
        pytest.param(
            ("train_sft", "sft"), {"BASE": "base"}, id="sft", marks=pytest.mark.slow
        ),  # the same loop as PPO below
        pytest.param(
            ("train_reward", "reward"),
            {"POLICY": "sft", "COMPARISONS": "completions/comparisons.jsonl"},
            id="reward",
            marks=pytest.mark.slow,  # the loop and its files are those of PPO below
        ),
    ],
)
def test_terminated(chain: Path, train, tmp_path: Path, arguments: tuple[str, str], macros: dict[str, str]) -> None:
    places = {name: chain / path for name, path in macros.items()}
    broken = tmp_path / "broken"
    saved = terminate(train, broken, 3, *arguments, **places)
    assert 3 <= saved < 12 and saved not in (5, 10)  # not one of the steps that are saved anyway
    assert not (broken / "reward_normalisation.json").exists()
    assert "Traceback" not in train(*arguments, "broken", **places).stderr
    assert resumed_steps(broken) == [0, saved]
    same_as(chain / arguments[1], broken, "params", "opt_state", "rng", "step")
    if arguments[1] == "reward":
        actual, reference = (
            (run_dir / "reward_normalisation.json").read_text() for run_dir in (broken, chain / "reward")
        )
        assert actual == reference


def test_ppo_terminated(chain: Path, train, tmp_path: Path) -> None:
    places = {"POLICY": chain / "sft", "REWARD": chain / "reward"}
    broken = tmp_path / "broken"
    saved = terminate(train, broken, 2, "train_ppo", "ppo", **places)
    assert 2 <= saved < 4
    train("train_ppo", "ppo", "broken", **places)
    assert resumed_steps(broken) == [0, saved]
    # The value model, the optimiser and the KL coefficient go on as well, not only the policy.
    same_as(chain / "ppo", broken, "policy", "value", "opt_state", "rng", "kl_coefficient")


@pytest.mark.slow  # two more processes for one file that is taken away
def test_going_on_takes_away_the_scale_of_an_older_step(chain: Path, train, tmp_path: Path) -> None:
    """Whoever loads the reward run meanwhile must not get gain and bias that belong to other weights."""
    shutil.copytree(chain / "reward", tmp_path / "reward")
    scale = tmp_path / "reward" / "reward_normalisation.json"
    older = scale.read_text()
    places = {"POLICY": chain / "sft", "COMPARISONS": chain / "completions" / "comparisons.jsonl"}
    kill(train, tmp_path / "reward", 13, "train_reward", "reward", **places, **{"run.steps": 14})
    assert not scale.exists()
    train("train_reward", "reward", "reward", **places, **{"run.steps": 14})
    assert scale.exists() and scale.read_text() != older
