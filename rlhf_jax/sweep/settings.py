"""The plan of a sweep (settings times seeds, a readable name for each run) and the metrics of its finished runs.

This module starts no process and computes no statistics: ``experiments/sweep.py`` does that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_jax.checkpoint_files.manifest import latest_step
from rlhf_jax.errors import InputError
from rlhf_jax.storage.files import read_object
from rlhf_jax.storage.metric_files import read_metrics

Setting = dict[str, str]
"""{gin key: value as gin text}."""
REMEDY = "run the evaluation again"
LONGEST_VALUE = 40
"""Characters of a value in a directory name; a longer one is cut and ends with its hash."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    name: its directory below the sweep's. setting: the part of the name that its seeds share. values: the gin keys that it
    sets. seed: None = the configuration's own.
    """

    name: str
    setting: str
    values: Setting
    seed: int | None


def _split_outside_quotes(text: str, separator: str) -> list[str]:
    """Cut ``text`` at the separators outside of quotes and brackets: "1,(2,3),'a,b'" -> 1 | (2,3) | 'a,b'."""
    parts, begin, depth, quote = [], 0, 0, ""
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[begin:index].strip())
            begin = index + 1
    return [*parts, text[begin:].strip()]


def _parse_assignment(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise InputError(f"--{flag}={text!r}: write KEY=VALUE, for instance PPOConfig.kl_coefficient=0.05")
    return key, value


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Parse 'PPOConfig.kl_coefficient=0.02,0.05' into (the key, its values as gin text). Raises InputError."""
    key, values = _parse_assignment(text, "grid")
    parts = _split_outside_quotes(values, ",")
    if "" in parts:
        raise InputError(f"--grid={text!r}: a value is empty; write KEY=VALUE,VALUE")
    if len(set(parts)) < len(parts):
        raise InputError(f"--grid={text!r}: a value is given twice")
    return key, parts


def parse_point(text: str) -> Setting:
    """Parse 'A.b=1; C.d=2' into {'A.b': '1', 'C.d': '2'}. Raises InputError."""
    pairs = [_parse_assignment(part, "point") for part in _split_outside_quotes(text, ";") if part]
    if not pairs or len(dict(pairs)) < len(pairs):
        raise InputError(f"--point={text!r}: write KEY=VALUE; KEY=VALUE with every key once")
    return dict(pairs)


def expand(axes: Sequence[str], points: Sequence[str]) -> list[Setting]:
    """Return every point with every combination of the axes; the last axis changes fastest.

    Without points: one that sets nothing. Raises InputError.
    """
    parsed = [parse_axis(text) for text in axes]
    keys = [key for key, _ in parsed]
    starts = [parse_point(text) for text in points] or [{}]
    for key in [*keys, *{key for point in starts for key in point}]:
        if keys.count(key) > 1 or (key in keys and any(key in point for point in starts)):
            raise InputError(f"--grid, --point: {key} is given twice; put all its values into one --grid")
    settings = [
        point | dict(zip(keys, values, strict=True))
        for point in starts
        for values in itertools.product(*(values for _, values in parsed))
    ]
    for index, setting in enumerate(settings):
        if setting in settings[:index]:
            raise InputError(f"--point: {setting} is given twice")
    return settings


def plan(settings: Sequence[Setting], seeds: Sequence[int]) -> list[PlannedRun]:
    """Return one run for each setting and seed; the seeds of a setting follow each other.

    seeds: [] = the configuration's own.
    Names: ``kl_coefficient=0.02__seed=1``; keys are cut to the components that distinguish them. Raises InputError.
    """
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds={','.join(map(str, seeds))}: a seed is given twice")
    short = _shorten_keys(list(dict.fromkeys(key for setting in settings for key in setting)))
    names = [
        "__".join(f"{short[key]}={_file_name_part(value)}" for key, value in setting.items()) for setting in settings
    ]
    occurrences = Counter(names)
    runs = []
    for setting, name in zip(settings, names, strict=True):
        if occurrences[name] > 1:  # values that differ only in characters a file name cannot have
            name = f"{name}-{_hash(json.dumps(setting))}"
        for seed in seeds or (None,):
            parts = [name] if name else []
            parts += [f"seed={seed}"] if seed is not None else []
            runs.append(PlannedRun("__".join(parts) or "default", name or "default", setting, seed))
    return runs


def _shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Cut keys short: {'policy/O.b1': 'b1'}; two keys that end alike keep one component more, and so on."""
    parts = {key: re.split(r"[./]", key) for key in keys}
    short = {}
    for key, words in parts.items():
        other_parts = [other for name, other in parts.items() if name != key]
        length = next(
            n for n in range(1, len(words) + 1) if n == len(words) or all(o[-n:] != words[-n:] for o in other_parts)
        )
        short[key] = ".".join(words[-length:])
    return short


def _file_name_part(value: str) -> str:
    """Format a value as part of a file name."""
    text = re.sub(r"[^A-Za-z0-9.+-]+", "_", value).strip("_") or _hash(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 9]}-{_hash(value)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ---- results


@dataclass(frozen=True)
class Measurements:
    """The final metrics of a finished run by name, and the problems of the files that they were read from."""

    metrics: dict[str, float]
    problems: list[str]


def final_metrics(run_dir: Path, average: int = 1) -> Measurements:
    """Return the measurements of a finished run.

    metrics.jsonl: each metric's last value, or the mean of its last ``average`` ones. evaluation.json: POLICY/SCORE, and
    FROM->TO/SCORE for the paired difference, FROM->TO/gold_at_equal_length. Metrics of sub-directories (the stages of
    a pipeline) have their names in front: ppo/score, evaluation/sft->ppo/gold. Raises InputError for a damaged
    evaluation.json.
    """
    whole = _read_directory(run_dir, average)
    for stage in sorted(path for path in run_dir.iterdir() if path.is_dir()):
        part = _read_directory(stage, average)
        whole.metrics.update({f"{stage.name}/{name}": value for name, value in part.metrics.items()})
        whole.problems.extend(part.problems)
    return whole


def _read_directory(directory: Path, average: int) -> Measurements:
    lines, _ = read_metrics(directory, latest_step(directory))
    values: dict[str, list[float]] = {}
    for row in lines.rows:
        for name, value in row.items():
            if name not in ("step", "stage") and value is not None:
                values.setdefault(name, []).append(value)
    metrics = {name: sum(series[-average:]) / len(series[-average:]) for name, series in values.items()}
    file = directory / "evaluation.json"
    if file.is_file():
        metrics |= _read_evaluation(read_object(file, REMEDY, finite=False), str(file))
    return Measurements(metrics, list(lines.problems))


def _read_evaluation(evaluation: dict[str, Any], place: str) -> dict[str, float]:
    try:
        metrics = {name: value for name, value in _list_means(evaluation) if value is not None}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: not what evaluate.py writes ({type(error).__name__}: {error}); {REMEDY}") from error
    for name, value in metrics.items():
        if type(value) not in (int, float):
            raise InputError(f"{place}: {name} is {type(value).__name__}, not a number; {REMEDY}")
    return metrics


def _list_means(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Return POLICY/SCORE, FROM->TO/SCORE and FROM->TO/gold_at_equal_length of an evaluation.json."""
    for policy in evaluation["policies"]:
        yield from ((f"{policy['name']}/{score}", entry["mean"]) for score, entry in policy["scores"].items())
    for pair in evaluation["differences"]:
        arrow = f"{pair['from']}->{pair['to']}"
        yield from ((f"{arrow}/{score}", entry["mean"]) for score, entry in pair["paired"].items())
        if "length_controlled" in pair:
            gain = pair["length_controlled"]["gain"]["mean"]
            yield f"{arrow}/gold_at_equal_length", math.nan if gain is None else gain  # null: not identifiable
