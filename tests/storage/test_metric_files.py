"""Metric files with damaged, torn, duplicate or missing lines: each is reported, and its numbers are not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_jax.storage.metric_files import read_lines, read_metrics
from rlhf_jax.storage.names import METRICS, TIMING


def line(step: int, **values: object) -> str:
    return json.dumps({"step": step, "stage": "sft", **values}) + "\n"


def write(directory: Path, steps: list[int], timed: list[int] | None = None) -> None:
    (directory / METRICS).write_text("".join(line(step, loss=step / 8) for step in steps))
    (directory / TIMING).write_text("".join(line(step, seconds=1.0) for step in (steps if timed is None else timed)))


def problems(directory: Path, finished: int | None = None) -> list[str]:
    return [problem.removeprefix(f"{directory}/") for problem in read_metrics(directory, finished)[0].problems]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"step": 2, "sta\n', "not JSON"),
        ("\0\0\0\0\n", "not JSON"),
        ("\n", "not JSON"),
        ("[2]\n", "must hold a JSON object"),
        ('{"loss": 1.0, "stage": "sft"}\n', "needs a step"),
        ('{"step": "2", "stage": "sft"}\n', "needs a step"),
        ('{"step": true, "stage": "sft"}\n', "needs a step"),
        ('{"step": -2, "stage": "sft"}\n', "needs a step"),
        ('{"step": 2, "stage": "sft", "loss": "low"}\n', "loss is str, not a number"),
        ('{"step": 2, "stage": "sft", "loss": NaN}\n', "NaN is not a number"),
        ('{"step": 2, "step": 9, "stage": "sft"}\n', "key 'step' occurs twice"),
        ("\udce9\n", "not UTF-8"),
    ],
)
def test_damaged_lines_are_named_and_do_not_count(bad: str, words: str, tmp_path: Path) -> None:
    text = line(1, loss=1.0) + bad + line(3, loss=3.0)
    (tmp_path / METRICS).write_bytes(text.encode(errors="surrogateescape"))
    lines = read_lines(tmp_path / METRICS)
    assert [row["step"] for row in lines.rows] == [1, 3]
    assert len(lines.problems) == 1 and f"{METRICS}:2: " in lines.problems[0] and words in lines.problems[0]


def test_a_torn_last_line_is_reported(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(line(1, loss=1.0) + line(2, loss=2.0)[:-1])
    lines = read_lines(tmp_path / METRICS)
    assert [row["step"] for row in lines.rows] == [1] and "the last line is torn" in lines.problems[0]


def test_doubled_lines_and_steps_that_go_back(tmp_path: Path) -> None:
    """Two lines of a step are fine when they name different metrics. When both have the same metric, the later line counts."""
    file = tmp_path / METRICS
    file.write_text(line(1, loss=1.0) + line(1, **{"heldout/loss": 2.0}) + line(2, loss=2.0))
    assert read_lines(file).problems == [] and len(read_lines(file).rows) == 3
    file.write_text(line(1, loss=1.0) + line(2, loss=2.0) + line(2, loss=2.5))
    assert read_lines(file).problems == [f"{file}:3: step 2 says loss a second time; the later line counts"]
    assert [row["loss"] for row in read_lines(file).rows] == [1.0, 2.5]
    file.write_text("".join(line(step, loss=step) for step in (1, 2, 3, 2, 3)))
    assert read_lines(file).problems == [f"{file}:4: step 2 after step 3; the later line counts"]
    assert [row["step"] for row in read_lines(file).rows] == [1, 2, 3]


def test_missing_lines(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 4, 5], [1, 2, 3, 4, 5])
    assert problems(tmp_path) == [f"{METRICS}: no line of step 3, which {TIMING} has"]
    write(tmp_path, [1, 2, 3, 4, 5], [1, 4, 5])
    assert problems(tmp_path) == [f"{TIMING}: no line of 2 steps (2 ... 3), which {METRICS} has"]
    write(tmp_path, [10, 20, 50, 60])  # gone from both files
    assert problems(tmp_path) == [f"{METRICS}: no line between steps 20 and 50"]


def test_the_end_against_the_saved_step(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3])
    assert problems(tmp_path, 3) == []
    assert problems(tmp_path, 5) == [f"{METRICS}: ends with step 3, and step 5 is saved"]
    write(tmp_path, [])
    assert problems(tmp_path, 5) == [f"{METRICS}: has no line of a step, and step 5 is saved"]
    (tmp_path / "operative_config.gin").write_text("LoopConfig.log_every = 10\n")
    assert problems(tmp_path, 5) == []  # no step was due
    write(tmp_path, [10])
    assert problems(tmp_path, 18) == [] and problems(tmp_path, 20) != []


@pytest.mark.parametrize(
    "steps",
    [
        [10, 20, 25],  # ended at 25
        [10, 20, 25, 30, 40],  # and went on with more steps
        [1, 2, 3, 10, 20, 30],  # LoopConfig.log_every raised on resume
        [10, 20, 21, 22, 23],  # and lowered
        [5],
        [],
    ],
)
def test_uneven_steps_of_a_complete_run_are_no_gaps(steps: list[int], tmp_path: Path) -> None:
    write(tmp_path, steps)
    assert problems(tmp_path, steps[-1] if steps else None) == []


def test_evaluations_between_logged_steps_need_no_timing(tmp_path: Path) -> None:
    rows = [line(0, **{"heldout/loss": 9.0})]
    for step in range(4, 41, 4):
        rows += [line(step, loss=1.0)] if step % 8 == 0 else []
        rows += [line(step, **{"heldout/loss": 2.0})]
    (tmp_path / METRICS).write_text("".join(rows))
    (tmp_path / TIMING).write_text("".join(line(step, seconds=1.0) for step in range(8, 41, 8)))
    assert problems(tmp_path, 40) == []
