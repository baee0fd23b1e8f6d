"""Policies compared on the same prompts, score by score: what evaluation.json holds."""

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
"""Scores of evaluate's own that are no shares, whatever their values."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Responses of one policy, in the order of the prompts, and their scores by name."""

    responses: Sequence[Response]
    scores: Mapping[str, Scores]


def compare(results: Mapping[str, Evaluated], shown: int) -> dict[str, Any]:
    """{"prompts", "policies", "differences", "samples"}: every policy's scores with intervals, each policy against the one
    before it, and the first ``shown`` prompts with all responses.

    A response without a score is left out of that score's means and pairs, and counted under "failed". Where data give no
    bounds they are None. Raises InputError when the policies answer different prompts, RunStopped for a score that no
    response has.
    """
    names = list(results)
    ids = [[response.id for response in result.responses] for result in results.values()]
    if any(other != ids[0] for other in ids[1:]):
        raise InputError(
            "run.policies: their tokenizers leave out different prompts, so that replies cannot be paired; raise "
            "BatchConfig.length until no prompt is left out"
        )
    shares = _shares(results)
    return {
        "prompts": len(ids[0]),
        "policies": [_policy(name, result, shares) for name, result in results.items()],
        "differences": [_difference(before, after, results, shares) for before, after in itertools.pairwise(names)],
        "samples": [_sample(index, results) for index in range(min(shown, len(ids[0])))],
    }


def _shares(results: Mapping[str, Evaluated]) -> set[str]:
    """Names of the scores that are 0 or 1 for every response of every policy: their means are shares."""
    values: dict[str, set[float]] = {}
    for result in results.values():
        for name, scores in result.scores.items():
            values.setdefault(name, set()).update(np.unique(scores.values[scores.scored]).tolist())
    return {name for name, seen in values.items() if seen <= {0.0, 1.0} and name not in MEASUREMENTS}


def _policy(name: str, result: Evaluated, shares: set[str]) -> dict[str, Any]:
    for key, scores in result.scores.items():
        if not scores.scored.any():
            raise RunStopped(f"run.score_texts: the score {key!r} failed for every response of {name}: {scores.reason}")
    means = {key: _plain(_interval(key, scores, shares)) for key, scores in result.scores.items()}
    failed = {key: scores.failed for key, scores in result.scores.items() if scores.failed}
    return {"name": name, "scores": means} | ({"failed": failed} if failed else {})


def _interval(key: str, scores: Scores, shares: set[str]) -> Interval:
    """A mean with Student's interval, a share with Wilson's."""
    values = scores.values[scores.scored]
    return wilson_interval(values.sum(), values.size) if key in shares else mean_interval(values)


def _difference(before: str, after: str, results: Mapping[str, Evaluated], shares: set[str]) -> dict[str, Any]:
    a, b = results[after].scores, results[before].scores
    paired: dict[str, Any] = {}
    for key in a:
        if key not in b:
            continue
        both = a[key].scored & b[key].scored
        if not both.any():
            raise RunStopped(f"run.score_texts: the score {key!r} failed for {before} or {after} on every prompt")
        difference = paired_share_difference if key in shares else paired_difference
        paired[key] = _plain(difference(a[key].values[both], b[key].values[both]))
    entry = {"from": before, "to": after, "paired": paired}
    if "gold" not in paired:
        return entry
    both = a["gold"].scored & b["gold"].scored
    parts = (side[key].values[both] for key in ("gold", "length") for side in (a, b))
    controlled = length_controlled_difference(*parts)
    slope = None if math.isnan(controlled.slope) else controlled.slope
    told = {"gain": _plain(controlled.gain), "slope": slope, "extrapolated": controlled.extrapolated}
    return entry | {"length_controlled": told}


def _sample(index: int, results: Mapping[str, Evaluated]) -> dict[str, Any]:
    first = next(iter(results.values())).responses[index]
    replies = {name: result.responses[index].text for name, result in results.items()}
    sample: dict[str, Any] = {"prompt": prompt_column(first.prompt), "replies": replies}
    if all("gold" in result.scores for result in results.values()):
        sample["gold"] = {name: result.scores["gold"].listed()[index] for name, result in results.items()}
    return sample


def completion_rows(results: Mapping[str, Evaluated]) -> list[dict[str, Any]]:
    """Every response of every policy with its scores, null where scoring failed: the lines of completions.jsonl."""
    rows = []
    for name, result in results.items():
        listed = {key: scores.listed() for key, scores in result.scores.items()}
        for index, response in enumerate(result.responses):
            asked = {"policy": name, "id": response.id, "prompt": prompt_column(response.prompt)}
            said = {"response": response.text, "ended": response.ended}
            rows.append(asked | said | {"scores": {key: values[index] for key, values in listed.items()}})
    return rows


def _plain(interval: Interval) -> dict[str, Any]:
    """For a JSON file: None for what the data cannot give."""
    fields = dataclasses.asdict(interval)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}
