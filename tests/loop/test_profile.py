"""Tests of --profile: the traced steps, also when the loop ends inside the window."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from rlhf_jax.config import BoundConfig
from rlhf_jax.errors import InputError
from rlhf_jax.launch import launching  # noqa: F401  defines the flag
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.loop.profile import Profile


@pytest.fixture
def set_flag(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets --profile as the command line does."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["x"])
    return lambda text: monkeypatch.setattr(flags.FLAGS["profile"], "value", text)


def train(run_dir: Path, total: int, stop_at: int | None = None) -> None:
    bound = BoundConfig(config="", operative=f"run.steps = {total}\n")
    loop = LoopConfig(save_every=1, tensorboard=False, progress=False)
    double = jax.jit(lambda x: 2 * x)
    with open_run(run_dir, stage="toy", bound=bound, seed=0, loop=loop) as run:
        state, _ = run.restore({"w": jnp.ones(8)}, {})
        for step in run.steps(run.resumed_step, total):
            state = {"w": double(state["w"])}
            run.log(step, {"loss": state["w"].sum()})
            if step == stop_at:
                raise InputError("the data ends")
            run.save(step, state, {})


def profile_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "profile" in line]


def test_a_window_leaves_a_trace_of_its_steps(set_flag, tmp_path: Path, capsys) -> None:
    set_flag("2:3")
    train(tmp_path / "r", 4)
    assert list((tmp_path / "r" / "profile").rglob("*.xplane.pb"))
    assert profile_lines(capsys.readouterr().err) == [f"profile of steps 2 to 3: {tmp_path / 'r' / 'profile'}"]


def test_a_window_beyond_the_run_ends_with_it(set_flag, tmp_path: Path, capsys) -> None:
    set_flag("2:9")
    train(tmp_path / "r", 3)
    assert profile_lines(capsys.readouterr().err) == [
        "--profile: step 9 comes after the last step, 3; the trace ends there",
        f"profile of steps 2 to 3: {tmp_path / 'r' / 'profile'}",
    ]


def test_a_loop_that_fails_in_the_window_leaves_a_trace(set_flag, tmp_path: Path, capsys) -> None:
    """The line names the steps that started; the directory of a run with steps stays."""
    set_flag("2:4")
    with pytest.raises(InputError, match="the data ends"):
        train(tmp_path / "r", 5, stop_at=3)
    assert profile_lines(capsys.readouterr().err) == [f"profile of steps 2 to 3: {tmp_path / 'r' / 'profile'}"]
    assert list((tmp_path / "r" / "profile").rglob("*.xplane.pb"))


def test_a_run_inside_a_profile_is_refused(set_flag, tmp_path: Path) -> None:
    train(tmp_path / "r", 1)
    with pytest.raises(InputError, match="inside .*r/profile, which belongs to .*r; give another directory"):
        train(tmp_path / "r" / "profile" / "x", 1)


def test_steps_that_do_not_run_are_reported(set_flag, tmp_path: Path, capsys) -> None:
    for text in ("2:3", "12:13", None):
        set_flag(text)
        Profile.from_flags(tmp_path).begin(5, 9)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "--profile: step 2 is done already; nothing is traced",
        "--profile: step 12 comes after the last step, 9; nothing is traced",
    ]


@pytest.mark.parametrize("text", ["", "3", "3:2", "0:4", "a:b", "1:2:3"])
def test_invalid_values_are_refused(set_flag, tmp_path: Path, text: str) -> None:
    set_flag(text)
    with pytest.raises(InputError, match=f"--profile={text}: give the first and the last step"):
        train(tmp_path / "r", 1)
    assert not (tmp_path / "r").exists()
