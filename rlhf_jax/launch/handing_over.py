"""Scripts that replace themselves with a training script, with other names for some of its flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rlhf_jax.storage.shipped import experiments, script_path


def hand_over(
    words: str | None,
    argv: Sequence[str],
    renamed: Mapping[str, str],
    *,
    needed: str = "",
    add: Sequence[str] = (),
) -> None:
    """Replace this process with the training script that --experiment names.

    words: printed for --help.
    renamed: {flag of this script: flag of the training script}.
    needed: a flag that must be present.
    add: more flags for the training script.
    A missing or unknown experiment ends the process with one line and exit code 2.
    """
    training = [name for name in experiments() if name.startswith("train_")]
    experiment, arguments, names = "", list(add), set()
    remaining = iter(argv[1:])
    for word in remaining:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            arguments.append(word)
            continue
        names.add(name)
        if name == "experiment":
            experiment = value if equals else next(remaining, "")
        else:
            arguments.append(f"--{renamed.get(name, name)}{equals}{value}")
    if names & {"help", "h"}:
        print(words)
        sys.exit(0)
    if experiment not in training:
        _exit_with_error(f"--experiment={experiment}: name the training script: {', '.join(training)}")
    if needed and needed not in names:
        _exit_with_error(f"--{needed}: give it, for instance --{needed}=v5p:2x2x4, or --{needed}=local")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script_path(experiment)), *arguments])


def _exit_with_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
