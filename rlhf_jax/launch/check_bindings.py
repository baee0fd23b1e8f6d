"""Checks of the gin bindings of later commands: pipelines and sweeps make them before their first process.

Every command's gin is parsed against its script (names, types, macros), and unused bindings are reported, without
building anything: files that an earlier stage has yet to write are not opened, and ranges of values are checked when the
run itself begins. gin allows one ``run`` per process, so each script is loaded, by the path of its file, in a fork.

    check([Command("train_ppo", ("configs/smoke/ppo.gin",), ("PPOConfig.clip_lo = 0.1",))])   # InputError
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.config.gin_errors import Binding
from rlhf_jax.config.parsing import clear_bindings, parse, unused_bindings
from rlhf_jax.errors import InputError
from rlhf_jax.storage.shipped import PACKAGE, script_path


class Command(NamedTuple):
    """The name of an experiment's script, its gin files and bindings. name: of the stage or run, for the message."""

    experiment: str
    files: tuple[str, ...]
    bindings: tuple[str, ...]
    name: str = ""


def check(commands: Sequence[Command]) -> None:
    """Check the bindings of all commands. Raises InputError with the message of the first command that has an error."""
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.launch.check_bindings"],
        input=json.dumps(commands),  # a command line is too short for thousands of runs
        capture_output=True,
        check=False,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])},
    )
    if result.returncode == 2:
        raise InputError(result.stdout.strip())
    if result.returncode:
        raise RuntimeError(f"checking the bindings ended with exit code {result.returncode}: {result.stderr}")


def _find_problem(experiment: str, commands: Sequence[Command]) -> str:
    """Return the first error in the commands of one experiment, '' for none."""
    spec = importlib.util.spec_from_file_location("__experiment__", script_path(experiment))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for command in commands:
        place = f"{command.name}: " if command.name else ""
        clear_bindings()
        try:
            scanned = parse(command.files, command.bindings)
        except InputError as error:
            return f"{place}{error}"
        if unused := unused_bindings(scanned):
            names = "; ".join(f"{b.place}: {_key_of(b)}" for b in unused)
            return f"{place}{names}: bound but nothing reads it; remove it or reference its object, '@...()'"
    return ""


def _key_of(binding: Binding) -> str:
    name = "/".join(filter(None, (binding.scope, binding.selector)))
    return f"{name}.{binding.argument}" if binding.argument else f"{name} (macro)"


def _check_all(commands: Sequence[Command]) -> int:
    """Check all commands; return 2, with the message on stdout, when one has an error."""
    from rlhf_jax.config import surface  # once, before the forks: every script needs it

    assert surface is not None
    by_script: dict[str, list[Command]] = {}
    for command in commands:
        by_script.setdefault(command.experiment, []).append(command)
    for experiment, commands_of_script in by_script.items():
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            problem = _find_problem(experiment, commands_of_script)
            print(problem, end="", flush=True)
            os._exit(2 if problem else 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE.parent))
    requested = [Command(e, tuple(f), tuple(b), name) for e, f, b, name in json.load(sys.stdin)]
    sys.exit(_check_all(requested))
