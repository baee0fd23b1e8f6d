"""Runs of a program that share its imports: one process imports and is forked for every command.

Each run is otherwise like a new start of the program: its own process, argv, stdout, stderr and exit code.

"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

ROOT = Path(__file__).resolve().parents[1]
FORKING = """
import gc, json, os, runpy, signal, sys, traceback
gc.freeze()  # what was imported is shared with every child, untouched
for line in sys.stdin:
    cwd, argv = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(600)  # what waits for ever ends with SIGALRM
        os.chdir(cwd)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv = argv
        code = 99
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else error.code is not None
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the interpreter apart takes longer than most of these programs
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[[Path, Sequence[str]], Result]
"""(working directory, argv) -> the result; leaves the files stdout and stderr in the working directory."""


@contextlib.contextmanager
def forked_programs(imports: str, environment: Mapping[str, str], root: Path = ROOT) -> Iterator[Call]:
    """Start the importing process and yield a function that runs a command.

    imports: the modules that every command imports, 'a.b, c'. root: the source tree that has them.

    """
    command = [sys.executable, "-c", f"import {imports}\n{FORKING}"]
    settings = {**environment, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=root, env=settings, stdin=PIPE, stdout=PIPE, text=True) as process:

        def call(cwd: Path, argv: Sequence[str]) -> Result:
            print(json.dumps([str(cwd), list(argv)]), file=process.stdin, flush=True)
            assert process.stdout is not None
            code = int(process.stdout.readline())
            return Result(code, (cwd / "stdout").read_text(), (cwd / "stderr").read_text())

        yield call
