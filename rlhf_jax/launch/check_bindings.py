"""Whether commands that are to be run later ask for what there is: for pipelines and sweeps, before their first process.

Every command's gin is parsed against the script that will read it (names, types, macros) and what nothing would read is
found, without building anything: files that an earlier stage has yet to write are not looked for, and ranges of values
are seen when the run itself begins. gin knows one ``run`` a process, so each script is loaded in a fork of a process of
its own; it is named by its file and not imported.

    check([Command("train_ppo", ("configs/smoke/ppo.gin",), ("PPOConfig.clip_lo = 0.1",))])   # InputError
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.config.gin_errors import Binding
from rlhf_jax.config.parsing import REPOSITORY, forget_bindings, parse, unread
from rlhf_jax.errors import InputError


class Command(NamedTuple):
    """An experiment by the name of its script, and what it would be given. name: of the stage or run, for the message."""

    experiment: str
    files: tuple[str, ...]
    bindings: tuple[str, ...]
    name: str = ""


def check(commands: Sequence[Command]) -> None:
    """Raises InputError with the message of the first command that could not be used."""
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.launch.check_bindings"],
        input=json.dumps(commands),  # thousands of runs are more than a command line holds
        capture_output=True,
        check=False,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode == 2:
        raise InputError(done.stdout.strip())
    if done.returncode:
        raise RuntimeError(f"checking the bindings ended with exit code {done.returncode}: {done.stderr}")


def _first_problem(experiment: str, commands: Sequence[Command]) -> str:
    """'' when all of one experiment's commands can be used."""
    script = REPOSITORY / "experiments" / f"{experiment}.py"
    spec = importlib.util.spec_from_file_location("__experiment__", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for command in commands:
        place = f"{command.name}: " if command.name else ""
        forget_bindings()
        try:
            scanned = parse(command.files, command.bindings)
        except InputError as error:
            return f"{place}{error}"
        if dead := unread(scanned):
            told = "; ".join(f"{b.place}: {_name(b)}" for b in dead)
            return f"{place}{told}: bound but nothing reads it; remove it or reference its object, '@...()'"
    return ""


def _name(binding: Binding) -> str:
    name = "/".join(filter(None, (binding.scope, binding.selector)))
    return f"{name}.{binding.argument}" if binding.argument else f"{name} (macro)"


def _main(commands: Sequence[Command]) -> int:
    """2, and the message on stdout, when some command cannot be used."""
    from rlhf_jax.config import surface  # once, before the forks: every script needs it

    assert surface is not None
    by_script: dict[str, list[Command]] = {}
    for command in commands:
        by_script.setdefault(command.experiment, []).append(command)
    for experiment, own in by_script.items():
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            problem = _first_problem(experiment, own)
            print(problem, end="", flush=True)
            os._exit(2 if problem else 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(REPOSITORY)))
    given = [Command(e, tuple(f), tuple(b), name) for e, f, b, name in json.load(sys.stdin)]
    sys.exit(_main(given))
