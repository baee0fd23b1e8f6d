"""Grids, points, names, and what a finished run measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.sweep.settings import expand, final_metrics, parse_axis, parse_point, plan


def test_axis_is_cut_outside_of_quotes_and_brackets() -> None:
    assert parse_axis("PPOConfig.kl_coefficient = 0.02, 0.05") == ("PPOConfig.kl_coefficient", ["0.02", "0.05"])
    values = parse_axis("X.p=(1, 2),[3,(4,5)],'a,b',\"it's, so\",{'k': 1},@a/Y(),%M,None")[1]
    assert values == ["(1, 2)", "[3,(4,5)]", "'a,b'", '"it\'s, so"', "{'k': 1}", "@a/Y()", "%M", "None"]
    assert parse_point("A.b=1; C.d='x;y=z' ;") == {"A.b": "1", "C.d": "'x;y=z'"}


@pytest.mark.parametrize(
    ("axes", "points", "message"),
    [
        (["kl"], [], r"--grid='kl': write KEY=VALUE"),
        (["A.b="], [], r"--grid='A.b=': write KEY=VALUE"),
        (["A.b=1,,2"], [], "a value is empty"),
        (["A.b=1,1"], [], "a value is given twice"),
        (["A.b=1", "A.b=2"], [], r"A\.b is given twice; put all its values into one --grid"),
        (["A.b=1"], ["A.b=2"], r"A\.b is given twice"),
        ([], ["A.b=1; A.b=2"], "every key once"),
        ([], [" ; "], "write KEY=VALUE; KEY=VALUE"),
        ([], ["A.b=1", "A.b=1"], "is given twice"),
    ],
)
def test_what_is_refused(axes: list[str], points: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        expand(axes, points)


def test_every_combination() -> None:
    assert expand([], []) == [{}]
    assert expand(["A=1,2", "B=3,4"], []) == [
        {"A": "1", "B": "3"},
        {"A": "1", "B": "4"},
        {"A": "2", "B": "3"},
        {"A": "2", "B": "4"},
    ]
    assert expand(["A=1,2"], ["C=5", "C=6; D=7"]) == [
        {"C": "5", "A": "1"},
        {"C": "5", "A": "2"},
        {"C": "6", "D": "7", "A": "1"},
        {"C": "6", "D": "7", "A": "2"},
    ]


def names(axes: list[str], points: list[str] | None = None, seeds: list[int] | None = None) -> list[str]:
    return [run.name for run in plan(expand(axes, points or []), seeds or [])]


def test_readable_names() -> None:
    assert names(["PPOConfig.kl_coefficient=0.02,1e-1"], seeds=[0, 1]) == [
        "kl_coefficient=0.02__seed=0",
        "kl_coefficient=0.02__seed=1",
        "kl_coefficient=1e-1__seed=0",
        "kl_coefficient=1e-1__seed=1",
    ]
    assert names([]) == ["default"]
    assert names([], seeds=[3]) == ["seed=3"]
    # Keys that end alike keep what tells them apart.
    run_names = names(["policy/OptimizerConfig.learning_rate=1e-4", "value/OptimizerConfig.learning_rate=2e-4"])
    assert run_names == ["policy.OptimizerConfig.learning_rate=1e-4__value.OptimizerConfig.learning_rate=2e-4"]
    assert names(["T.style='plain','chat'"]) == ["style=plain", "style=chat"]


def test_names_are_file_names_and_differ() -> None:
    odd = names(["X.p='a/b','a b','../..','é'"])
    assert len(set(odd)) == 4 and all("/" not in name and " " not in name for name in odd)
    assert odd[0].startswith("p=a_b-") and odd[1].startswith("p=a_b-")
    (long,) = names(["X.p='" + "y" * 300 + "'"])
    assert len(long) == len("p=") + 40
    assert names(["X.p='" + "y" * 300 + "'"]) == [long]  # the same in every process


def test_seeds_are_given_once() -> None:
    with pytest.raises(InputError, match="--seeds=1,1: a seed is given twice"):
        plan([{}], [1, 1])


def test_final_metrics(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "stage": "ppo", "score": 1.0, "kl": 0.1},
        {"step": 2, "stage": "ppo", "score": 2.0, "kl": None},
        {"step": 2, "stage": "ppo", "heldout/loss": 0.7},
        {"step": 3, "stage": "ppo", "score": 6.0, "kl": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert final_metrics(tmp_path).metrics == {"score": 6.0, "kl": 0.3, "heldout/loss": 0.7}
    assert final_metrics(tmp_path, 2).metrics == pytest.approx({"score": 4.0, "kl": 0.2, "heldout/loss": 0.7})


def test_final_metrics_of_a_pipeline(tmp_path: Path) -> None:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": 0.0, "high": 1.0, "n": 9}

    evaluation = {
        "policies": [
            {"name": "sft", "scores": {"gold": interval(0.5)}},
            {"name": "ppo", "scores": {"gold": interval(0.7)}},
        ],
        "differences": [
            {
                "from": "sft",
                "to": "ppo",
                "paired": {"gold": interval(0.2)},
                "length_controlled": {"gain": interval(0.15), "slope": 0.0, "extrapolated": False},
            }
        ],
    }
    for stage in ("ppo", "evaluation", "compilation_cache"):
        (tmp_path / stage).mkdir()
    (tmp_path / "ppo" / "metrics.jsonl").write_text('{"step": 1, "stage": "ppo", "score": 2.0}\n')
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    assert final_metrics(tmp_path).metrics == {
        "ppo/score": 2.0,
        "evaluation/sft/gold": 0.5,
        "evaluation/ppo/gold": 0.7,
        "evaluation/sft->ppo/gold": 0.2,
        "evaluation/sft->ppo/gold_at_equal_length": 0.15,
    }
