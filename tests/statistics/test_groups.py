"""Metrics by a column against scipy, hand-worked numbers and published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.statistics import cluster_mean_interval, group_table, wilson_interval
from rlhf_jax.statistics.reach import range_reach


def test_reach_of_the_studentized_range():
    # Tables of the studentized range at 0.05: q(3, 10) = 3.877, q(4, 20) = 3.958, q(3, inf) = 3.314
    for groups, degrees, quantile in ((3, 10, 3.877), (4, 20, 3.958), (3, math.inf, 3.314)):
        assert range_reach(0.95, groups, degrees) * math.sqrt(2) == pytest.approx(quantile, abs=1e-3)
    assert range_reach(0.95, 2, 10) == pytest.approx(scipy.stats.t.ppf(0.975, 10))


def test_two_groups_are_welch():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal(12) + 9, 2 * rng.standard_normal(20)
    table = group_table([*first, *second], ["x"] * 12 + ["y"] * 20)
    expected = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert table.gap is not None and (table.gap.best, table.gap.worst) == ("x", "y")
    gap = table.gap.difference
    assert (gap.low, gap.high) == pytest.approx((expected.low, expected.high))
    assert table.groups[0].mean == cluster_mean_interval(first, list(range(12)))


def test_the_gap_of_equal_groups_may_be_zero():
    values = np.random.default_rng(1).standard_normal(60)
    gap = group_table(values.tolist(), [index % 3 for index in range(60)]).gap
    assert gap is not None and gap.difference.low == 0.0 and gap.difference.value > 0


def test_shares_have_newcombes_interval():
    # Newcombe 1998, example (a): 56 / 70 against 48 / 80: 0.2, [0.0524, 0.3339]
    values = [1.0] * 56 + [0.0] * 14 + [1.0] * 48 + [0.0] * 32
    table = group_table(values, ["x"] * 70 + ["y"] * 80)
    assert table.gap is not None
    gap = table.gap.difference
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert table.groups[0].mean.low == pytest.approx(wilson_interval(56, 70).low)


def test_clusters_across_groups_are_paired():
    """A template filled for both groups: the interval is that of the paired t test."""
    rng = np.random.default_rng(2)
    template = 5 * rng.standard_normal(15)
    first, second = template + rng.standard_normal(15), template + rng.standard_normal(15)
    table = group_table([*first, *second], ["x"] * 15 + ["y"] * 15, [*range(15), *range(15)])
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    bounds = sorted(abs(bound) for bound in expected)
    assert table.gap is not None and table.gap.difference.high == pytest.approx(bounds[1])
    assert table.gap.difference.n == 15


def test_each_group_against_the_others():
    rng = np.random.default_rng(3)
    values, groups = rng.standard_normal(40), np.repeat(["x", "y", "y", "z"], 10)
    table = group_table(values.tolist(), groups.tolist())
    against = table.groups[2].against_others
    expected = scipy.stats.ttest_ind(values[30:], values[:30], equal_var=False).confidence_interval(1 - 0.05 / 3)
    assert against is not None and (against.low, against.high) == pytest.approx((expected.low, expected.high))


def test_missing_entries_and_small_groups_are_counted():
    table = group_table([1.0, 2.0, 4.0, None, 5.0, 6.0, 7.0], ["x", "x", "y", "y", None, "z", "z"])
    assert (table.without_group, table.without_score, table.too_small) == (1, 1, ("y",))
    assert [group.rows for group in table.groups] == [2, 1, 2]
    assert table.groups[1].mean.low is None and table.groups[1].against_others is not None
    assert table.groups[1].against_others.low is None
    assert table.gap is not None and table.gap.best == "z"


def test_a_single_group_has_no_gap():
    table = group_table([1.0, 2.0], ["x", "x"])
    assert table.gap is None and table.groups[0].against_others is None


def test_constant_groups_have_no_interval():
    gap = group_table([0.5, 0.5, 0.7, 0.7], ["x", "x", "y", "y"]).gap
    assert gap is not None and gap.difference.low is None and gap.difference.value == pytest.approx(0.2)


def test_unusable_tables_are_refused():
    with pytest.raises(InputError, match="give equally many"):
        group_table([1.0], ["x", "y"])
    with pytest.raises(InputError, match="check the column's name"):
        group_table([1.0], [None])
