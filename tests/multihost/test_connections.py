"""A process that is late by more than Gloo waits: before the mesh is made, and between that and the first computation."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from compiler_flags import COMPILER

pytestmark = pytest.mark.multihost


def start(when: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": COMPILER}
    program = [sys.executable, str(Path(__file__).with_name("late.py"))]
    return [
        subprocess.Popen(
            [*program, f"localhost:{port},2,{index}", when],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def test_a_late_process_is_waited_for() -> None:
    for process in [process for when in ("before", "behind") for process in start(when)]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert "[12 16] 7\n" in out  # 0 + 2 + 4 + 6, 1 + 3 + 5 + 7, and what the first process said
