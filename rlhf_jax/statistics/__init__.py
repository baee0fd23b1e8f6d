"""Means, shares and differences with confidence intervals; calibration and best-of-n estimates."""

from rlhf_jax.statistics.intervals import (
    Interval,
    LengthControlled,
    across_seeds,
    bootstrap_interval,
    length_controlled_difference,
    mean_interval,
    paired_difference,
    paired_share_difference,
    wilson_interval,
    win_rate,
)
from rlhf_jax.statistics.preference import (
    Calibration,
    CalibrationBin,
    best_of_n_kl_bound,
    calibration,
    expected_max,
    pairwise_accuracy,
    preference_calibration,
)

__all__ = [
    "Calibration",
    "CalibrationBin",
    "Interval",
    "LengthControlled",
    "across_seeds",
    "best_of_n_kl_bound",
    "bootstrap_interval",
    "calibration",
    "expected_max",
    "length_controlled_difference",
    "mean_interval",
    "paired_difference",
    "paired_share_difference",
    "pairwise_accuracy",
    "preference_calibration",
    "wilson_interval",
    "win_rate",
]
