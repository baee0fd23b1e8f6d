"""Comparisons of policies on the same prompts, score by score: the content of evaluation.json."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import prompt_column
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.records import Response
from rlhf_jax.rewards import Scores
from rlhf_jax.statistics.intervals import (
    Interval,
    length_controlled_difference,
    mean_interval,
    paired_difference,
    paired_share_difference,
    wilson_interval,
)

MEASUREMENTS = ("length", "reward")
"""Scores of the experiment evaluate that are never treated as shares, even when all their values are 0 or 1."""


@dataclasses.dataclass(frozen=True)
class ScoredResponses:
    """The responses of one policy, in the order of the prompts, and their scores by name."""

    responses: Sequence[Response]
    scores: Mapping[str, Scores]


def compare(results: Mapping[str, ScoredResponses], sample_count: int) -> dict[str, Any]:
    """Return {"prompts", "policies", "differences", "samples"}: the scores of every policy with intervals, the differences of
    each policy to the one before it, and the first ``sample_count`` prompts with all responses.

    A response without a score is left out of that score's means and pairs, and counted under "failed". Bounds that the data
    cannot give are None. Raises InputError when the policies answer different prompts, RunStopped for a score that no
    response has.
    """
    names = list(results)
    ids = [[response.id for response in result.responses] for result in results.values()]
    if any(other != ids[0] for other in ids[1:]):
        raise InputError(
            "run.policies: their tokenizers leave out different prompts, so that responses cannot be paired; raise "
            "BatchConfig.length until no prompt is left out"
        )
    shares = _shares(results)
    return {
        "prompts": len(ids[0]),
        "policies": [_policy(name, result, shares) for name, result in results.items()],
        "differences": [_difference(before, after, results, shares) for before, after in itertools.pairwise(names)],
        "samples": [_sample(index, results) for index in range(min(sample_count, len(ids[0])))],
    }


def _shares(results: Mapping[str, ScoredResponses]) -> set[str]:
    """Return the names of the scores that are 0 or 1 for every response of every policy: their means are shares."""
    values: dict[str, set[float]] = {}
    for result in results.values():
        for name, scores in result.scores.items():
            values.setdefault(name, set()).update(np.unique(scores.values[scores.scored]).tolist())
    return {name for name, distinct in values.items() if distinct <= {0.0, 1.0} and name not in MEASUREMENTS}


def _policy(name: str, result: ScoredResponses, shares: set[str]) -> dict[str, Any]:
    for key, scores in result.scores.items():
        if not scores.scored.any():
            raise RunStopped(f"run.score_texts: the score {key!r} failed for every response of {name}: {scores.reason}")
    means = {key: _plain(_interval(key, scores, shares)) for key, scores in result.scores.items()}
    failed = {key: scores.failed for key, scores in result.scores.items() if scores.failed}
    return {"name": name, "scores": means} | ({"failed": failed} if failed else {})


def _interval(key: str, scores: Scores, shares: set[str]) -> Interval:
    """Return the mean of a score: of a share with Wilson's interval, else with Student's."""
    values = scores.values[scores.scored]
    return wilson_interval(values.sum(), values.size) if key in shares else mean_interval(values)


def _difference(before: str, after: str, results: Mapping[str, ScoredResponses], shares: set[str]) -> dict[str, Any]:
    a, b = results[after].scores, results[before].scores
    paired: dict[str, Any] = {}
    for key in a:
        if key not in b:
            continue
        scored = a[key].scored & b[key].scored
        if not scored.any():
            raise RunStopped(f"run.score_texts: the score {key!r} failed for {before} or {after} on every prompt")
        difference = paired_share_difference if key in shares else paired_difference
        paired[key] = _plain(difference(a[key].values[scored], b[key].values[scored]))
    entry = {"from": before, "to": after, "paired": paired}
    if "gold" not in paired:
        return entry
    scored = a["gold"].scored & b["gold"].scored
    parts = (side[key].values[scored] for key in ("gold", "length") for side in (a, b))
    controlled = length_controlled_difference(*parts)
    slope = None if math.isnan(controlled.slope) else controlled.slope
    gain = {"gain": _plain(controlled.gain), "slope": slope, "extrapolated": controlled.extrapolated}
    return entry | {"length_controlled": gain}


def _sample(index: int, results: Mapping[str, ScoredResponses]) -> dict[str, Any]:
    first = next(iter(results.values())).responses[index]
    texts = {name: result.responses[index].text for name, result in results.items()}
    sample: dict[str, Any] = {"prompt": prompt_column(first.prompt), "replies": texts}
    if all("gold" in result.scores for result in results.values()):
        sample["gold"] = {name: result.scores["gold"].to_list()[index] for name, result in results.items()}
    return sample


def completion_rows(results: Mapping[str, ScoredResponses]) -> list[dict[str, Any]]:
    """Return the lines of completions.jsonl: every response of every policy with its scores, None where scoring failed."""
    rows = []
    for name, result in results.items():
        columns = {key: scores.to_list() for key, scores in result.scores.items()}
        for index, response in enumerate(result.responses):
            row: dict[str, Any] = {"policy": name, "id": response.id, "prompt": prompt_column(response.prompt)}
            row |= {"response": response.text, "ended": response.ended}
            rows.append(row | {"scores": {key: values[index] for key, values in columns.items()}})
    return rows


def _plain(interval: Interval) -> dict[str, Any]:
    """Return an interval for a JSON file, with None in place of NaN."""
    fields = dataclasses.asdict(interval)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}
