"""Tests of the bar on a terminal: messages beside it are escaped, and a terminal that closes does not end the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
from rlhf_jax.messages import steady_output
from rlhf_jax.loop.progress import Display
steady_output()
display = Display("sft", 0, 3, True)
display.update(1, {"monitor/loss[red]": 0.5})
display._bar.refresh()
print("warning: \\x1b]0;owned\\x07", file=sys.stderr)
os.write(1, b"drawn\\n")  # rich takes what is printed
sys.stdin.readline()
for step in (2, 3):
    display.update(step, {"monitor/loss[red]": 0.25})
    display._bar.refresh()
display.close()
print("after", file=sys.stderr)
os.write(1, b"done\\n")
"""


def test_a_bar_and_a_terminal_that_closes() -> None:
    terminal, child_end = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=child_end, text=True) as process:
        os.close(child_end)
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "drawn\n"
        output = os.read(terminal, 100_000).decode()
        assert "\x1b[" in output and "monitor/loss[red] 0.5" in output
        assert "\\x1b]0;owned\\x07" in output and "\x1b]0;" not in output
        os.close(terminal)
        assert process.communicate("\n", timeout=60)[0] == "done\n"
        assert process.returncode == 0
