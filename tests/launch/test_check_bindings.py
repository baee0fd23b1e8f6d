"""Tests of the checks of later commands: errors are found before the first command, and nothing is built or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.launch.check_bindings import Command, check

SMOKE = {
    "train_sft": "sft",
    "train_reward": "reward",
    "train_ppo": "ppo",
    "generate": "completions",
    "evaluate": "evaluate",
}
SLOW = pytest.mark.slow


def command(experiment: str, *bindings: str, name: str = "") -> Command:
    return Command(experiment, (f"configs/smoke/{SMOKE[experiment]}.gin",), bindings, name)


def test_commands_of_several_experiments_are_valid() -> None:
    """The paths that their macros name do not exist yet."""
    check([command(experiment, "RUN_DIR = 'x'") for experiment in SMOKE])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        pytest.param(
            "PPOConfig.clip_lo = 0.1", "unknown parameter 'clip_lo' of PPOConfig; did you mean 'clip_low'?", marks=SLOW
        ),
        pytest.param("PPOConfig.clip_low = 'big'", "PPOConfig.clip_low = 'big': must be a number", marks=SLOW),
        (
            "plicy/OptimizerConfig.learning_rate = 1e-4",
            "plicy/OptimizerConfig.learning_rate: bound but nothing reads it",
        ),
        pytest.param("KLL = 0.1", "KLL (macro): bound but nothing reads it", marks=SLOW),
    ],
)
def test_the_second_command_has_a_typo(binding: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check([command("train_sft"), command("train_ppo", binding, name="stage ppo")])
    assert str(caught.value).startswith("stage ppo: --gin_bindings=") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not Path("x").exists()
