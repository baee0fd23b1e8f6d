"""A script that hands over to a training script, with other names for some of its flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def hand_over(
    words: str | None,
    scripts: Path,
    argv: Sequence[str],
    renamed: Mapping[str, str],
    *,
    needed: str = "",
    add: Sequence[str] = (),
) -> None:
    """Run the script that --experiment names in ``scripts``, in the place of this process.

    words: printed for --help. renamed: {name of a flag here: its name there}. needed: a flag without which nothing starts. add:
    further flags. A missing or unknown experiment ends the process with one line and exit code 2.
    """
    known = sorted(path.stem for path in scripts.glob("train_*.py"))
    experiment, arguments, names = "", list(add), set()
    rest = iter(argv[1:])
    for word in rest:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            arguments.append(word)
            continue
        names.add(name)
        if name == "experiment":
            experiment = value if equals else next(rest, "")
        else:
            arguments.append(f"--{renamed.get(name, name)}{equals}{value}")
    if names & {"help", "h"}:
        print(words)
        sys.exit(0)
    if experiment not in known:
        _refuse(f"--experiment={experiment}: name the training script: {', '.join(known)}")
    if needed and needed not in names:
        _refuse(f"--{needed}: give it, for instance --{needed}=v5p:2x2x4, or --{needed}=local")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(scripts / f"{experiment}.py"), *arguments])


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
