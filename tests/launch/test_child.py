"""Tests of child processes: exit codes, output, forwarded signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.launch.child import STOPPED, run_child

PARENT = """
import os, sys
from rlhf_jax.launch.child import run_child
print(run_child([sys.executable, "-c", sys.argv[1]], dict(os.environ)), flush=True)
"""
SAVES = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.6)
    pathlib.Path("saved").write_text(str(number))
    sys.exit(CODE)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_exit_codes(tmp_path: Path) -> None:
    assert run_child(python("import sys; sys.exit(3)"), dict(os.environ)) == 3
    assert run_child(python("import os; os.kill(os.getpid(), 9)"), dict(os.environ)) == 137
    assert STOPPED == (143, 130, 129)


def test_output_is_appended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for word in ("one", "two"):
        run_child(python(f"import sys; print({word!r}); print({word!r}, file=sys.stderr)"), {}, output=log)
    assert sorted(log.read_text().split()) == ["one", "one", "two", "two"]


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run_child(python("pass"), {})
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_child_may_save_before_it_leaves(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """code 0: the child finished nevertheless, and counts as stopped."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [*python(PARENT), SAVES.replace("CODE", str(code))]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        parent.send_signal(number)
        out, _ = parent.communicate(timeout=60)
    assert out == f"{code or 128 + number}\n"
    assert (tmp_path / "saved").read_text() == str(int(number))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_parent_takes_its_child_along(tmp_path: Path) -> None:
    """SIGKILL cannot be forwarded; the child gets SIGTERM from the kernel and saves."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [*python(PARENT), SAVES.replace("CODE", "143")]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        parent.kill()
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
