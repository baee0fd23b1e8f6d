"""Tests of the metric files: exact numbers, lines that a resume removes, bad values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import RunStopped
from rlhf_jax.loop.bad_steps import stop_if_bad
from rlhf_jax.rundir.tracking import Tracker, fetch, remove_later_lines
from rlhf_jax.types import Mean


def mean(total: float, weight: float) -> Mean:
    return Mean(jnp.float32(total), jnp.float32(weight))


def test_fetch_divides_in_float64() -> None:
    values = fetch({"b": mean(1.0, 3.0), "a": 2, "c": jnp.float32(0.1), "d": mean(1.0, 2.0) + mean(3.0, 6.0)})
    # 1 / 3 in double precision; float32(0.1) is 0.100000001490116...; (1 + 3) / (2 + 6) = 0.5.
    assert values == {"a": 2.0, "b": 1 / 3, "c": float(np.float32(0.1)), "d": 0.5}
    assert list(values) == ["a", "b", "c", "d"]


def test_zero_weight_is_no_error_but_nan_is() -> None:
    values = fetch({"nothing": mean(0.0, 0.0), "bad": mean(math.nan, 2.0), "lost": mean(1.0, 0.0)})
    assert values["nothing"] is None
    assert math.isnan(values["bad"] or 0.0) and math.isnan(values["lost"] or 0.0)
    stop_if_bad(1, {"nothing": None, "fine": 1.0})
    with pytest.raises(RunStopped, match=r"step 4: not finite: kl=inf, loss=nan;"):
        stop_if_bad(4, {"fine": 1.0, "kl": math.inf, "loss": math.nan})


def test_lines_are_exact_and_nonfinite_values_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "sft", resumed_step=0, tensorboard=False)
    tracker.write(1, {"loss": 0.1, "nothing": None, "kl": math.nan})
    tracker.write_timing(1, {"seconds": 2.5})
    text = (tmp_path / "metrics.jsonl").read_text()  # flushed although still open
    assert text == '{"step": 1, "stage": "sft", "loss": 0.1, "nothing": null, "kl": null}\n'
    assert json.loads((tmp_path / "timing.jsonl").read_text())["seconds"] == 2.5
    tracker.close()
    assert not (tmp_path / "tensorboard").exists()


def test_resume_removes_later_and_torn_lines(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "stage": "sft", "loss": 0.{step}}}\n' for step in (1, 2, 3, 4)]
    lines.insert(2, '{"step": 2, "stage": "sft", "heldout/loss": 0.5}\n')
    for name in ("metrics.jsonl", "timing.jsonl"):
        (tmp_path / name).write_text("".join(lines) + '{"step": 5, "sta')
    tracker = Tracker(tmp_path, "sft", resumed_step=2, tensorboard=False)
    tracker.write(3, {"loss": 0.3})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:4])
    assert (tmp_path / "timing.jsonl").read_text() == "".join(lines[:3])


def test_fresh_start_removes_step_0_of_an_earlier_attempt(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = Tracker(tmp_path, "sft", resumed_step=0, tensorboard=False)
        tracker.write(0, {"heldout/loss": 2.0})
        tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "stage": "sft", "heldout/loss": 2.0}\n'


def test_a_torn_line_at_the_restored_step_goes_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "s"}\n{"step": 2, "stage": "s", "loss": 0.')
    remove_later_lines(path, 2)
    assert path.read_text() == '{"step": 1, "stage": "s"}\n'
    remove_later_lines(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_tensorboard_gets_the_finite_numbers(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "ppo", resumed_step=0, tensorboard=True)
    tracker.write(1, {"loss": 0.25, "kl": math.inf})
    tracker.close()
    content = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"ppo/loss" in content and b"ppo/kl" not in content
