"""Runs of programs that share their imports: one process imports and is forked for every command.

Each run is otherwise like a new start of the program: its own process, argv, stdout, stderr and exit code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("reports.pipeline_page", "algorithms", "config.surface", "doctor", "plan")
EXPERIMENTS = ["rich.table", *(f"rlhf_jax.{name}" for name in MODULES)]
"""What every experiment imports."""


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@dataclass
class Forked:
    """A program that was started. output: the directory of its files stdout and stderr."""

    pid: int
    output: Path
    ask: Callable[[Any], Any]
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.ask({"poll": self.pid})
        return self.code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self) -> Result:
        """Wait for its end."""
        while self.poll() is None:
            time.sleep(0.01)
        assert self.code is not None
        return Result(self.code, (self.output / "stdout").read_text(), (self.output / "stderr").read_text())


class Server:
    """Starts programs as forks of one process that serves (`serve`)."""

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests, self._answers, self._started = requests, answers, list[Forked]()

    def _ask(self, request: Any) -> Any:
        print(json.dumps(request), file=self._requests, flush=True)
        return json.loads(self._answers.readline())

    def start(
        self, cwd: Path, argv: Sequence[str], environment: Mapping[str, str] = {}, output: Path | None = None
    ) -> Forked:
        """Start a program.

        environment: what differs from the server's; modules that read it when they are imported do not see that.
        output: where stdout and stderr go; None: cwd.
        """
        output = output or cwd
        files = {name: str(output / name) for name in ("stdout", "stderr")}
        request = {"cwd": str(cwd), "argv": list(argv), "environment": dict(environment), "files": files}
        self._started.append(Forked(self._ask(request), output, self._ask))
        return self._started[-1]

    def __call__(self, cwd: Path, argv: Sequence[str], environment: Mapping[str, str] = {}) -> Result:
        """Run a program to its end."""
        return self.start(cwd, argv, environment).finish()

    def inherit(self, argv: Sequence[str], stdin: str = "", stdout: str | None = None) -> int:
        """Run a program to its end and return its exit code, with the working directory, stdout and stderr of the server.

        stdin, stdout: files.
        """
        files = {} if stdout is None else {"stdout": stdout}
        request = {"cwd": None, "argv": list(argv), "environment": {}, "files": files, "stdin": stdin}
        return self._ended(self._ask(request))

    def _ended(self, pid: int) -> int:
        while (code := self._ask({"poll": pid})) is None:
            time.sleep(0.01)
        return int(code)

    def close(self) -> None:
        """End what still runs."""
        for program in self._started:
            program.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def forked_programs(imports: Sequence[str], environment: Mapping[str, str], root: Path = ROOT) -> Iterator[Server]:
    """Give a server of programs. imports: the modules that all of them import. root: the tree that has them."""
    settings = {**environment, "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__)), *imports]
    with subprocess.Popen(command, cwd=root, env=settings, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        server = Server(process.stdin, process.stdout)
        yield server
        server.close()


def fork_of_this_process() -> Server:
    """Return a server that has imported what this process has, for a program that starts others."""
    (request, ask), (answered, answer) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(ask)
        os.close(answered)
        serve(os.fdopen(request), os.fdopen(answer, "w"))
        os._exit(0)
    os.close(request)
    os.close(answer)
    return Server(os.fdopen(ask, "w"), os.fdopen(answered))


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Fork for every program that is asked for, until there are no more requests."""
    gc.freeze()  # what was imported is shared with every child, untouched
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            _become(request)
        print(json.dumps(answer), file=answers, flush=True)


def _become(request: dict[str, Any]) -> None:
    signal.alarm(1200)  # a program that waits for ever ends with SIGALRM
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        if name in request["files"]:
            os.dup2(os.open(request["files"][name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdin = open(request.get("stdin") or os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    sys.argv = request["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the interpreter apart takes longer than most of these programs


if __name__ == "__main__":
    sys.path.pop(0)  # programs look for modules where they would without this one
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve(sys.stdin, os.fdopen(os.dup(1), "w"))
