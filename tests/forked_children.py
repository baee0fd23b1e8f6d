"""A pipeline or a sweep that forks what it would start anew: python forked_children.py check|all PROGRAM ARGUMENT...

check: the process that checks the bindings of its children. all: the children too, which then get no signals. Each is a fork
of this process as it was before PROGRAM was read.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from forked_programs import fork_of_this_process

import rlhf_jax.launch
from rlhf_jax.launch import check_bindings

sys.path.pop(0)
children = fork_of_this_process()


def check(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run`."""
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "asked", Path(place) / "answer"
        request.write_text(input)
        code = children.inherit([check_bindings.__file__], str(request), str(answer))
        return subprocess.CompletedProcess(command, code, answer.read_text(), "see above")


check_bindings.subprocess = SimpleNamespace(run=check)
_, forked, *sys.argv[:] = sys.argv
if forked == "all":
    rlhf_jax.launch.run_child = lambda command, environment: children.inherit(command[1:])
runpy.run_path(sys.argv[0], run_name="__main__")
