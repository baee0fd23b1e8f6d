"""TRL's defaults in the configurations are those of the release that they name (golden/trl_defaults.json)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rlhf_jax.learn import DPOConfig, GRPOConfig, ImportanceConfig

TRL = json.loads((Path(__file__).parent / "golden" / "trl_defaults.json").read_text())
ADVANTAGES = {"group": "standardised", "none": "centred"}
REDUCTIONS = {"dapo": "tokens", "grpo": "sequences", "dr_grpo": "columns"}
IMPORTANCE = {"sequence_mask": ("sequence", "drop"), "token_truncate": ("token", "clip")}


def test_grpo():
    trl, actual = TRL["GRPOConfig"], GRPOConfig()
    expected = {
        "epochs": trl["num_iterations"],
        "minibatches": 1 if trl["steps_per_generation"] is None else None,  # one step a generation
        "clip_low": trl["epsilon"],
        "clip_high": trl["epsilon"] if trl["epsilon_high"] is None else trl["epsilon_high"],
        "dual_clip": trl["delta"],
        "ratio": trl["importance_sampling_level"],
        "advantages": ADVANTAGES[trl["scale_rewards"]],
        "scale_epsilon": TRL["beside the deviation of a group"],
        "reduction": REDUCTIONS[trl["loss_type"]],
        "kl_coefficient": trl["beta"],
        "kl_estimator": "weighted_k3" if trl["use_bias_correction_kl"] else "k3",
        "mask_truncated": trl["mask_truncated_completions"],
    }
    assert {name: getattr(actual, name) for name in expected} == expected
    # TRL has no such settings: what they switch on is off here, guards apart, and the divisor matters with cut responses only.
    alone = {
        "drop_zero_variance_groups": False,
        "missing_eos_penalty": None,
        "score_clip": None,
        "max_kl": None,
        "biased_kl": False,
    }
    assert {name: getattr(actual, name) for name in alone} == alone
    remaining = {
        "kl_in",
        "kl_kind",
        "divisor",
        "missing_eos",
        "max_sampler_gap",
        "max_identity_gap",
        "old_logprobs",
        "importance",
    }
    assert {field.name for field in dataclasses.fields(GRPOConfig)} == (expected.keys() | alone.keys() | remaining) - {
        "kl_estimator"
    }


def test_dpo():
    trl, actual = TRL["DPOConfig"], DPOConfig()
    expected = {"beta": trl["beta"], "loss": trl["loss_type"][0], "label_smoothing": trl["label_smoothing"]}
    assert len(trl["loss_type"]) == 1  # and no "sft" beside it
    expected |= {"average": False, "sft_coefficient": 0.0}  # TRL averages for "ipo" and "sigmoid_norm"
    assert dataclasses.asdict(actual) == expected


def test_masked_importance_sampling():
    """What ImportanceConfig's docstring calls TRL's default, which corrects for vLLM."""
    trl = TRL["GRPOConfig"]
    unit, outside = IMPORTANCE[trl["vllm_importance_sampling_mode"]]
    high, low = trl["vllm_importance_sampling_clip_max"], trl["vllm_importance_sampling_clip_min"] or 0.0
    assert ImportanceConfig(unit, outside, low, high) == ImportanceConfig("sequence", "drop", 0.0, 3.0)


def test_the_recipe_of_rloo():
    """As GRPOConfig's docstring gives it."""
    trl = TRL["RLOOConfig"]
    recipe = GRPOConfig(advantages="leave_one_out", kl_in="reward", kl_coefficient=0.05)
    assert (recipe.kl_coefficient, recipe.clip_low, recipe.epochs) == (
        trl["beta"],
        trl["epsilon"],
        trl["num_iterations"],
    )
    assert recipe.kl_estimator == "k1" and not trl["normalize_advantages"]


def test_the_documented_version_is_the_one_compared_with():
    for config in (GRPOConfig, DPOConfig, ImportanceConfig):
        assert f"TRL {TRL['version']}" in " ".join((config.__doc__ or "").split())
