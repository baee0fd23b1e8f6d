"""Warnings about rollouts that teach nothing."""

from __future__ import annotations

from rlhf_jax.learn import RewardSpread


def test_rollouts_in_a_row_without_spread_warn(capsys):
    spread = RewardSpread()
    flat, fine = (
        {"score": 0.7, "score_std": 3e-8},
        {"score": 0.7, "score_std": 0.1},
    )  # a mean of equal numbers is off by an ulp
    assert [spread.warn(step, value) for step, value in enumerate([flat, fine, flat, flat, flat], 1)] == [
        False,
        False,
        False,
        True,
        False,
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: step 4: 2 rollouts in a row without any reward spread: all responses have the same"
    )
    assert "(mean 0.7)" in line


def test_groups_are_flat_each_by_itself(capsys):
    """Spread between prompts teaches GRPO nothing."""
    spread = RewardSpread()
    grouped = {"score": 0.5, "score_std": 0.5, "zero_variance_groups": 1.0}
    assert [spread.warn(step, grouped) for step in (1, 2)] == [False, True]
    assert "all responses of every prompt have the same reward" in capsys.readouterr().err
    assert [RewardSpread().warn(step, grouped | {"zero_variance_groups": 0.9}) for step in (1, 2, 3)] == [False] * 3
