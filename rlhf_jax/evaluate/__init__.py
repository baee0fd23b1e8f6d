"""What a comparison of policies may claim, and the page that says it."""

from rlhf_jax.evaluate.compare import Evaluated, compare, completion_rows
from rlhf_jax.evaluate.preference import (
    Calibration,
    CalibrationBin,
    best_of_n_kl_bound,
    calibration,
    expected_max,
    pairwise_accuracy,
    preference_calibration,
)
from rlhf_jax.evaluate.report import headlines, number_cell, write_report
from rlhf_jax.evaluate.statistics import (
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

__all__ = [
    "Calibration",
    "CalibrationBin",
    "Evaluated",
    "Interval",
    "LengthControlled",
    "across_seeds",
    "best_of_n_kl_bound",
    "bootstrap_interval",
    "calibration",
    "compare",
    "completion_rows",
    "expected_max",
    "headlines",
    "length_controlled_difference",
    "mean_interval",
    "number_cell",
    "paired_difference",
    "paired_share_difference",
    "pairwise_accuracy",
    "preference_calibration",
    "wilson_interval",
    "win_rate",
    "write_report",
]
