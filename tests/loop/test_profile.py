"""--profile traces the steps of its window, also when the loop ends inside it."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags

from rlhf_jax.errors import InputError
from rlhf_jax.launch import launching  # noqa: F401  defines the flag
from rlhf_jax.loop.profile import Profile


def asked(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str | None) -> Profile:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["x"])
    monkeypatch.setattr(flags.FLAGS["profile"], "value", text)
    return Profile.asked(directory)


@pytest.mark.parametrize("last", [3, 9])
def test_a_window_leaves_a_trace(monkeypatch, tmp_path: Path, capsys, last: int) -> None:
    profile = asked(monkeypatch, tmp_path, f"2:{last}")
    profile.begin(0, 9)
    for step in range(1, 5):
        profile.before(step)
        (jnp.ones(8) * step).block_until_ready()
        profile.after(step)
        assert not (tmp_path / "profile").exists() or step >= 2
    profile.end()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"profile of steps 2 to {last}" in capsys.readouterr().err


def test_steps_that_do_not_run_are_said(monkeypatch, tmp_path: Path, capsys) -> None:
    asked(monkeypatch, tmp_path, "2:3").begin(5, 9)
    asked(monkeypatch, tmp_path, "12:13").begin(5, 9)
    asked(monkeypatch, tmp_path, None).begin(5, 9)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "--profile: step 2 is done already; nothing is traced",
        "--profile: step 12 comes after the last step, 9; nothing is traced",
    ]


@pytest.mark.parametrize("text", ["", "3", "3:2", "0:4", "a:b", "1:2:3"])
def test_other_forms_are_refused(monkeypatch, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=f"--profile={text}: give the first and the last step"):
        asked(monkeypatch, tmp_path, text)
