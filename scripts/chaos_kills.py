"""Processes of scripts/chaos.py: started, killed at a moment or a call, and looked for when their parent is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from chaos_table import Kill

from rlhf_jax.checkpoint_files.manifest import latest_step
from rlhf_jax.storage.metric_files import read_lines
from rlhf_jax.storage.names import METRICS

HOOK = Path(__file__).resolve().parent / "chaos_hook"
LEAVE_WITHIN = 60.0
"""Seconds in which children of a killed process save and leave."""


def start(arguments: list[str], log: Path, cache: Path, **hook: str) -> subprocess.Popen[bytes]:
    """Start the process with its output in ``log`` and one compilation cache for all. hook: variables of chaos_hook."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    } | os.environ
    if hook:
        environment |= hook | {"PYTHONPATH": os.pathsep.join([str(HOOK), os.environ.get("PYTHONPATH", "")])}
    with log.open("ab") as file:
        return subprocess.Popen(arguments, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for it. Raises RuntimeError when it did not end well."""
    if code := process.wait():
        raise RuntimeError(f"exit code {code}, see {log}")


def last_logged(run_dir: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl, 0 without one."""
    return max((row["step"] for row in read_lines(run_dir / METRICS).rows), default=0)


def where(run_dir: Path, pid: int) -> tuple[str, int]:
    """Return (phase, step) of a stopped process: 'start' until it has opened its run directory; 'train + hash' in a save."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return "start", 0
    if status["pid"] != pid:
        return "start", 0
    saving = status["saving"].split(" ")[0]
    return status["phase"] + (f" + {saving}" if saving else ""), status["step"]


def kill_after(seconds: float, process: subprocess.Popen[bytes], run_dir: Path) -> Kill | None:
    """Kill the process after ``seconds``, held still while its phase is read; None when it ended before."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGSTOP)
        phase, step = where(run_dir, process.pid)
        process.kill()
        process.wait()
        return Kill(seconds, phase, step, last_logged(run_dir), latest_step(run_dir) or 0)
    return None


def killed_by_itself(process: subprocess.Popen[bytes], point: str, step: int, run_dir: Path) -> Kill | None:
    """Wait for a process that a fault or a hook kills at ``point``; None when it ended without."""
    began = time.monotonic()
    if process.wait() != -signal.SIGKILL:
        return None
    return Kill(time.monotonic() - began, point, step, last_logged(run_dir), latest_step(run_dir) or 0, aimed=True)


def calls(file: Path) -> Counter[str]:
    """Count each call of chaos_hook."""
    return Counter(file.read_text().split()) if file.is_file() else Counter()


def left_running(run_dir: Path) -> list[int]:
    """Return the processes that still work on ``run_dir`` after the time to save and leave; they are killed."""
    deadline = time.monotonic() + LEAVE_WITHIN
    while (running := _working_on(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return running


def _working_on(run_dir: Path) -> list[int]:
    """List this user's processes whose command line has the path."""
    actual = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(run_dir).encode() in words and int(entry.name) != os.getpid():
            actual.append(int(entry.name))
    return actual
