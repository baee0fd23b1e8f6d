"""scripts/launch.py as a parent of plain programs, and the spelling of --distributed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.distributed import connect

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
count, index = sys.argv[-1].split(",")[1:]
if index == "1":
    sys.exit({code})
time.sleep({seconds})
print("process", index, "of", count, "is done", flush=True)
"""


def launch(tmp_path: Path, code: int, seconds: float, *flags: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(code=code, seconds=seconds))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch.py"),
        *flags,
        f"--logs={tmp_path / 'logs'}",
        "--",
        str(script),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_all_end_well(tmp_path: Path) -> None:
    completions = launch(tmp_path, 0, 0.0, "--processes=3")
    assert completions.returncode == 0 and completions.stdout == "process 0 of 3 is done\n"
    assert (tmp_path / "logs" / "process_2.log").read_text() == "process 2 of 3 is done\n"


def test_one_that_fails_stops_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    completions = launch(tmp_path, 3, 600.0, "--processes=3", "--grace=5")
    assert completions.returncode == 3 and time.monotonic() - began < 60
    assert "launch: process 1 ended with exit code 3; stopping the others" in completions.stderr
    assert str(tmp_path / "logs") in completions.stderr and "is done" not in completions.stdout


SLOW_TO_LEAVE = """
import signal, sys, time
index = sys.argv[-1].split(",")[2]
def leave(*_):
    time.sleep(2.0 if index == "0" else 0.0)  # a checkpoint is being saved
    print("process", index, "saved", flush=True)
    sys.exit({code})
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600.0)
"""


@pytest.mark.parametrize(
    ("to_all", "message"),
    [
        (True, "stopped by a signal, all with exit code 143"),
        (False, "process 1 ended with exit code 143 and the others"),
    ],
)
def test_a_process_that_left_does_not_cut_others_short(tmp_path: Path, to_all: bool, message: str) -> None:
    """Process 0 needs two seconds to save, within the grace of five: a second signal would come in the middle of that.
    When only process 1 leaves, for it alone got the signal, the others are stopped once the grace is over."""
    script = tmp_path / "program.py"
    script.write_text(SLOW_TO_LEAVE.format(code=143))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch.py"),
        "--grace=5",
        f"--logs={tmp_path}",
        "--",
        str(script),
    ]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not ((tmp_path / "process_1.log").is_file() and (tmp_path / "process_1.log").read_text() == "ready\n"):
        assert parent.poll() is None
        time.sleep(0.05)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    if to_all:
        parent.terminate()
    else:
        os.kill(child_of(parent.pid, ",2,1"), signal.SIGTERM)
    out, errors = parent.communicate(timeout=60)
    assert parent.returncode == 143 and f"launch: {message}" in errors and out == "process 0 saved\n"


def child_of(parent: int, words: str) -> int:
    """The child process with ``words`` in its command line."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(pid) for pid in children if words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.parametrize("flags", [("--processes=0",), ("--proceses=2",)])
def test_mistakes_are_one_line(tmp_path: Path, flags: tuple[str, ...]) -> None:
    completions = launch(tmp_path, 0, 0.0, *flags)
    assert (
        completions.returncode == 2 and completions.stderr.startswith("error: ") and completions.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("how", ["", "yes", "host,2,0", "host:1,2", "host:1,2,2", "host:1,a,0"])
def test_other_spellings_of_distributed_are_refused(how: str) -> None:
    with pytest.raises(InputError, match=f"--distributed={how}: "):
        connect(how)


SAVES = """
import pathlib, signal, sys, time
index = sys.argv[-1].split(",")[2]
received = []
def leave(number, _):
    received.append(number)
    if len(received) > 1:
        pathlib.Path(f"twice_{index}").touch()
        sys.exit(134)
    time.sleep(0.5)
    pathlib.Path(f"saved_{index}").touch()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, leave)
pathlib.Path(f"ready_{index}").touch()
time.sleep(60.0)
"""


OBEDIENT = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes the command in its arguments, which obeys signals also when the suite runs under nohup or in the background."""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("how", "code"), [("ctrl_c", 130), ("hang_up", 129), ("kill", -9)])
def test_all_save_however_the_launcher_ends(tmp_path: Path, how: str, code: int) -> None:
    """Ctrl-C of a terminal reaches the whole foreground group: passed on as well, it would come twice and nothing would be
    saved. A launcher that is killed outright passes nothing on."""
    (tmp_path / "program.py").write_text(SAVES)
    launcher = [
        sys.executable,
        "-c",
        OBEDIENT,
        sys.executable,
        str(ROOT / "scripts" / "launch.py"),
        "--grace=5",
        f"--logs={tmp_path}",
        "--",
        "program.py",
    ]
    parent = subprocess.Popen(launcher, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(tmp_path, "ready_0", "ready_1")
    if how == "ctrl_c":
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.send_signal(signal.SIGHUP if how == "hang_up" else signal.SIGKILL)
    assert parent.wait(30) == code
    wait_for(tmp_path, "saved_0", "saved_1")
    assert not list(tmp_path.glob("twice_*"))


def wait_for(directory: Path, *names: str) -> None:
    deadline = time.monotonic() + 30
    while not all((directory / name).exists() for name in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.02)
