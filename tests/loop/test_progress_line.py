"""Tests of the progress line: the metrics that it shows for each kind of run."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_jax.data import EncodedSet, Template
from rlhf_jax.data.record_sets import Records, report_skipped
from rlhf_jax.loop.progress import Display, headline
from rlhf_jax.testing import byte_tokenizer

ROLLOUT = {
    "loss": 0.1,
    "loss/policy": 0.1,
    "kl": 0.25,
    "kl_coefficient": 0.05,
    "score": 0.5,
    "score_std": 0.1,
    "response_length": 31.5,
    "monitor/words": 7.0,
    "monitor/correct": 0.125,
    "monitor/zzz": 1.0,
}


def test_rollouts_show_score_kl_length_and_monitor() -> None:
    assert headline(ROLLOUT) == "score 0.5  kl 0.25  response_length 31.5  monitor/correct 0.125  monitor/words 7"
    without_reference = {name: value for name, value in ROLLOUT.items() if name != "kl"}
    assert headline(without_reference).startswith("score 0.5  response_length 31.5  monitor")


def test_heldout_metrics_stay_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("reward", 0, 3, True)
    display.update(1, {"loss": 0.5, "accuracy": 0.75})
    display.keep_heldout({"heldout/loss": 0.625, "heldout/accuracy": 0.5, "other": 1.0})
    display.update(3, {"loss": 0.25, "accuracy": None})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reward 1/3  loss 0.5  accuracy 0.75  0 s")
    assert lines[1].startswith("reward 3/3  loss 0.25  heldout/loss 0.625  heldout/accuracy 0.5  0 s")


@pytest.mark.parametrize(("dropped", "warning"), [(2, ""), (3, "warning: ")])  # of 10 and of 11: .2, .27
def test_many_rows_left_out_are_a_warning(dropped: int, warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    train: EncodedSet = EncodedSet([[1]] * 8, [], Counter({"too long": dropped}))
    report_skipped(Records([], [], Template(style="raw")), train, EncodedSet([], [], Counter()), byte_tokenizer())
    expected = f"{warning}training records: 8 of {8 + dropped} used; left out: too long {dropped}\n"
    assert capsys.readouterr().err == expected
