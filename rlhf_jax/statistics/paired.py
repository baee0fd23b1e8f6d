"""Two policies on the same records: rows joined on record ids, differences, win rates and the paired bootstrap."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_jax.errors import InputError
from rlhf_jax.statistics.clusters import (
    Statistic,
    cluster_bootstrap,
    cluster_mean_interval,
    clustered_mean,
    wilson_bounds,
)
from rlhf_jax.statistics.estimate import (
    Estimate,
    check_confidence,
    is_constant,
    symmetric_estimate,
    without_interval,
)

RecordId = str | int
ScoredRecords = Sequence[tuple[RecordId, float | None]]
"""(record id, score) in any order; a score of None is missing (a judge that failed)."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The scores of two sides on the records that both have, sorted by id.

    ids: [N]. first, second: [N] scores of the sides.
    only_first, only_second: number of records that only that side has a score for.
    """

    ids: tuple[RecordId, ...]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    only_first: int
    only_second: int


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """A comparison of two sides on their common records.

    estimate: the difference or the win rate.
    pairs: number of common records. only_first, only_second: number of records without a partner.
    """

    estimate: Estimate
    pairs: int
    only_first: int
    only_second: int


def join_on_ids(first: ScoredRecords, second: ScoredRecords) -> Pairs:
    """Join two lists of scored records on their ids; the order of rows has no influence.

    Records that only one side has, or has a score for, are counted and left out. Raises InputError when an id appears twice
    in a list, when a score is not finite, and when the lists have no record in common.
    """
    first_scores, second_scores = _index(first, "first"), _index(second, "second")
    first_ids = {name for name, score in first_scores.items() if score is not None}
    second_ids = {name for name, score in second_scores.items() if score is not None}
    ids = sorted(first_ids & second_ids, key=lambda name: (isinstance(name, str), name))
    if not ids:
        raise InputError(
            f"join_on_ids: none of {len(first_ids)} and {len(second_ids)} scored records has a partner; "
            "compare results on the same records"
        )
    return Pairs(
        tuple(ids),
        np.array([first_scores[name] for name in ids], np.float64),
        np.array([second_scores[name] for name in ids], np.float64),
        len(first_ids) - len(ids),
        len(second_ids) - len(ids),
    )


def _index(records: ScoredRecords, side: str) -> dict[RecordId, float | None]:
    scores: dict[RecordId, float | None] = {}
    for name, score in records:
        if name in scores:
            raise InputError(
                f"join_on_ids ({side}): the id {name!r} appears twice; give every response an id of its own"
            )
        if score is not None and not np.isfinite(score):
            raise InputError(f"join_on_ids ({side}): the score of {name!r} is {score}; give None for a missing score")
        scores[name] = score
    return scores


def compare_means(
    pairs: Pairs, prompts: Mapping[RecordId, Hashable] | None = None, confidence: float = 0.95
) -> PairedComparison:
    """Compare the means of two sides: first minus second over the common records, with a t interval.

    prompts: the prompt of each record id where several records belong to one; the interval is then cluster-robust
    (``cluster_mean_interval``). None: every record is a prompt of its own, and the interval is that of the paired t test.
    Differences that are all the same have no interval.
    """
    return _comparison(
        pairs, cluster_mean_interval(pairs.first - pairs.second, cluster_of_pairs(pairs, prompts), confidence)
    )


def compare_wins(
    pairs: Pairs, prompts: Mapping[RecordId, Hashable] | None = None, confidence: float = 0.95
) -> PairedComparison:
    """Compare two sides by the share of records on which the first scores higher, a tie counted as half.

    0.5: no preference. Student's interval of the mean of 1, 0.5 and 0 (cluster-robust with ``prompts``) gives the effective
    number of records, share * (1 - share) / error^2, at which Wilson's bounds are taken, so that they lie in [0, 1];
    where one side wins every record the number is that of the prompts. Ties only, or a single prompt: no interval.
    """
    check_confidence(confidence)
    wins = (pairs.first > pairs.second) + 0.5 * (pairs.first == pairs.second)
    mean = clustered_mean(wins, cluster_of_pairs(pairs, prompts))
    if mean.error is None:
        return _comparison(pairs, without_interval(mean.value, 1, confidence, "a single prompt"))
    if is_constant(wins) and mean.value == 0.5:
        return _comparison(pairs, without_interval(0.5, mean.clusters, confidence, "every record is a tie"))
    return _comparison(pairs, _win_estimate(mean.value, mean.error, mean.clusters, confidence))


def _win_estimate(share: float, error: float, clusters: int, confidence: float) -> Estimate:
    reach = symmetric_estimate(0.0, 1.0, clusters - 1, clusters, confidence).high
    assert reach is not None
    size = float(clusters) if error == 0.0 else share * (1 - share) / error**2
    low, high = wilson_bounds(share, size, reach)
    return Estimate(share, low, high, clusters, confidence)


def paired_bootstrap(
    pairs: Pairs,
    statistic: Statistic,
    *,
    seed: int,
    prompts: Mapping[RecordId, Hashable] | None = None,
    resamples: int = 4999,
    confidence: float = 0.95,
) -> PairedComparison:
    """Compare two sides by any statistic of both, with whole prompts resampled on both sides together.

    statistic: called with the scores of the first and of the second side, for instance
    ``lambda a, b: np.median(a) - np.median(b)``. See ``cluster_bootstrap``.
    """
    estimate = cluster_bootstrap(
        [pairs.first, pairs.second],
        cluster_of_pairs(pairs, prompts),
        statistic,
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )
    return _comparison(pairs, estimate)


def cluster_of_pairs(pairs: Pairs, prompts: Mapping[RecordId, Hashable] | None) -> list[Hashable]:
    """Return [N] the prompt of each pair. Raises InputError when ``prompts`` lacks an id."""
    if prompts is None:
        return list(pairs.ids)
    missing = [name for name in pairs.ids if name not in prompts]
    if missing:
        raise InputError(f"prompts: the record {missing[0]!r} has no prompt; give one for each of {len(pairs.ids)} ids")
    return [prompts[name] for name in pairs.ids]


def _comparison(pairs: Pairs, estimate: Estimate) -> PairedComparison:
    return PairedComparison(estimate, len(pairs.ids), pairs.only_first, pairs.only_second)
