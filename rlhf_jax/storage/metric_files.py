"""Reading of metrics.jsonl and timing.jsonl of a run, with a report of damaged, torn, duplicate and missing lines.

A killed process leaves a torn last line, a power cut empty pages, and editing deletes or duplicates lines. A summary of the
remaining lines would not show it; therefore the readers return the problems beside the rows.

"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.storage.files import parse_object, read_bytes, read_text
from rlhf_jax.storage.names import METRICS, OPERATIVE_CONFIG, TIMING


@dataclass(frozen=True)
class MetricLines:
    """Lines of a metric file.

    rows: the valid lines, as objects. problems: of the other lines, 'FILE:LINE: description'.

    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def parse_line(text: str, place: str) -> dict[str, Any]:
    """Parse one line: whole number ``step``, text ``stage``, numbers or null. Raises InputError."""
    row = parse_object(text, place, "the line does not count")
    if type(row.get("step")) is not int or row["step"] < 0 or not isinstance(row.get("stage", ""), str):
        raise InputError(f"{place}: no line of a run (needs a step, and stage is a text); the line does not count")
    for name, value in row.items():
        if name != "stage" and value is not None and type(value) not in (int, float):
            raise InputError(f"{place}: {name} is {type(value).__name__}, not a number; the line does not count")
    return row


def read_lines(path: Path) -> MetricLines:
    """Read the lines of one file; none when there is no such file. Raises InputError when it cannot be read.

    Problems: an invalid line, a last line without its end, a metric that an earlier line of the same step has, a step
    that comes after a later one. In the last two cases the later line in the file counts.

    """
    if not path.exists() and not path.is_symlink():
        return MetricLines()
    content = read_bytes(path, "see who may read it")
    rows: list[dict[str, Any]] = []
    problems = []
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):
        place = f"{path}:{number}"
        try:
            row = parse_line(raw.decode("utf-8"), place)
        except UnicodeDecodeError:
            problems.append(f"{place}: not UTF-8 text; the line does not count")
            continue
        except InputError as error:
            problems.append(str(error))
            continue
        if rows and row["step"] < rows[-1]["step"]:
            problems.append(f"{place}: step {row['step']} after step {rows[-1]['step']}; the later line counts")
            rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
        elif repeated := _repeated_metric(rows, row):
            problems.append(f"{place}: step {row['step']} says {repeated} a second time; the later line counts")
            rows = [earlier for earlier in rows if earlier["step"] != row["step"] or repeated not in earlier]
        rows.append(row)
    if not content.endswith(b"\n") and content:
        problems.append(f"{path}: the last line is torn; it does not count")
    return MetricLines(rows, problems)


def read_metrics(run_dir: Path, finished: int | None = None) -> tuple[MetricLines, MetricLines]:
    """Read (metrics, timing) of a run; the problems of both are with the metrics.

    Each logged step writes a line to both files, at regular intervals. A step that only one file has, and a gap between
    regular steps, are missing lines. finished: the step that the run has saved; the files must reach it.

    """
    metrics, timing = read_lines(run_dir / METRICS), read_lines(run_dir / TIMING)
    problems = [*metrics.problems, *timing.problems]
    steps, timed = ([row["step"] for row in lines.rows] for lines in (metrics, timing))
    if missing := sorted(set(timed) - set(steps)):
        problems.append(f"{run_dir / METRICS}: no line of {_format_steps(missing)}, which {TIMING} has")
    untimed = sorted(_training_steps(metrics.rows, set(timed)) - set(timed))
    if timed and untimed:
        problems.append(f"{run_dir / TIMING}: no line of {_format_steps(untimed)}, which {METRICS} has")
    logged = sorted({*timed, *untimed})
    problems += [f"{run_dir / METRICS}: no line between steps {low} and {high}" for low, high in _gaps(logged)]
    last, every = max(steps, default=0), max(_cadence(logged), _log_every(run_dir))
    if finished and finished - last >= every:
        ends = f"ends with step {last}" if last else "has no line of a step"
        problems.append(f"{run_dir / METRICS}: {ends}, and step {finished} is saved")
    return MetricLines(metrics.rows, problems), timing


def _training_steps(rows: list[dict[str, Any]], timed: set[int]) -> set[int]:
    """Return the steps with a line of training: one that has the names most frequent in first lines of timed steps."""
    first = {row["step"]: frozenset(row) for row in reversed(rows)}
    usual = Counter(names for step, names in first.items() if step in timed).most_common(1)
    return {step for step, names in first.items() if step and usual and names == usual[0][0]}


def _log_every(run_dir: Path) -> int:
    """Return LoopConfig.log_every of the run's configuration; 1 when it does not state it."""
    file = run_dir / OPERATIVE_CONFIG
    values = re.findall(r"^LoopConfig\.log_every = (\d{1,9})$", read_text(file), re.MULTILINE) if file.is_file() else []
    return int(values[-1]) if values else 1


def _repeated_metric(rows: list[dict[str, Any]], row: dict[str, Any]) -> str | None:
    names = set(row) - {"step", "stage"}
    for earlier in reversed(rows):
        if earlier["step"] != row["step"]:
            return None
        if repeated := sorted(names.intersection(earlier)):
            return repeated[0]
    return None


def _gaps(steps: list[int]) -> list[tuple[int, int]]:
    """Return pairs of neighbouring steps that are further apart than those before and those after them."""
    distances = [(high - low, low, high) for low, high in pairwise(steps)]
    runs = [list(group) for _, group in groupby(distances, key=lambda gap: gap[0])]
    inner = zip(runs, runs[1:], runs[2:], strict=False)
    return [(low, high) for a, b, c in inner if b[0][0] > max(a[0][0], c[0][0]) for _, low, high in b]


def _cadence(steps: list[int]) -> int:
    """Return the largest distance between logged steps that is no gap, 1 when there is none."""
    missing = _gaps(steps)
    distances = [high - low for low, high in pairwise(steps) if (low, high) not in missing]
    return max(distances, default=1)


def _format_steps(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps ({steps[0]} ... {steps[-1]})"
