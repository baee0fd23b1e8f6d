"""Children end with a parent that is killed, also while they hold Python's lock or when a thread watches the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax import processes

ROOT = Path(__file__).resolve().parents[1]
POOL = """
import multiprocessing, sys, time
sys.path.insert(0, {here!r})
import test_parent_death as tests
from rlhf_jax.processes import this_process
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=tests.WORKERS[{name!r}], args=(this_process(),), daemon=True).start()
    time.sleep(60)
"""
TIED = """
import subprocess, sys, time
from rlhf_jax.processes import tied_to_parent
subprocess.Popen(tied_to_parent([sys.executable, "-S", "-c", sys.argv[1]]))
time.sleep(60)
"""
SLEEPER = "import os, sys, time; sys.stdout.write(str(os.getpid()) + '\\n'); sys.stdout.flush(); time.sleep(60)"


def hold_the_lock(parent: processes.Parent) -> None:
    """Run one call of C code that never lets another thread run: a regular expression that backtracks."""
    import re

    processes.end_with_parent(parent)
    print(os.getpid(), flush=True)
    re.match("(a*)*b", "a" * 60)


def watch_with_a_thread(parent: processes.Parent) -> None:
    """Run a worker that was started from a thread, whose end is not the end of the process."""
    processes.end_with_parent(processes.Parent(parent.pid, lasting=False))
    print(os.getpid(), flush=True)
    time.sleep(60)


WORKERS = {"lock": hold_the_lock, "thread": watch_with_a_thread}


def is_alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_outlives_kill(command: list[str]) -> bool:
    """Return whether the process whose id ``command`` prints still runs five seconds after ``command`` was killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        deadline = time.monotonic() + 5
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    survived = is_alive(pid)
    if survived:
        os.kill(pid, signal.SIGKILL)
    return survived


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", sorted(WORKERS))
def test_worker_ends_with_killed_parent(tmp_path: Path, name: str) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL.format(here=str(Path(__file__).parent), name=name))
    assert not child_outlives_kill([sys.executable, str(script)])


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_program_ends_with_killed_parent() -> None:
    assert not child_outlives_kill([sys.executable, "-c", TIED, SLEEPER])


def test_program_whose_parent_is_gone_does_not_start() -> None:
    """Parent 1 stands for one that died between fork and prctl."""
    command = [sys.executable, "-S", "-c", processes._TIED, "1", sys.executable, "-c", "print('started')"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (143, "")


def test_program_that_watches_gets_sigterm() -> None:
    """The way of systems without prctl: the wrong parent in the variable is a parent that has ended."""
    text = "from rlhf_jax.processes import watch_parent; watch_parent(); import time; time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), processes.VARIABLE: "1"}
    assert subprocess.run([sys.executable, "-c", text], env=environment, timeout=30).returncode == -signal.SIGTERM
