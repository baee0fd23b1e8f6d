"""What a directory must be before a run may open it, and what a resumed run may not change. Every refusal comes before
anything is written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rlhf_jax.remote import is_remote
from rlhf_jax.run.config import Change, bound_values, changes
from rlhf_jax.run.provenance import read_provenance
from rlhf_jax.saved import MANIFEST, checkpoint_dir
from rlhf_jax.types import InputError

OURS = {"config.gin", "operative_config.gin", "provenance.json"}
MADE_ON_OPENING = {
    *OURS,
    ".lock",
    "metrics.jsonl",
    "timing.jsonl",
    "tensorboard",
    "checkpoints",
    "status.json",
    "model.json",
    "tokenizer",
}
STEPS = ("run.steps", "run.iterations")
"""How an experiment may call its number of steps."""


def lock(directory: Path) -> IO[str]:
    """Hold DIRECTORY/.lock until the file is closed or this process ends. Raises InputError when another holds it."""
    file = (directory / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{directory}: in use by {owner}; wait for it, stop it, or use another run_dir") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    os.fsync(file.fileno())  # other hosts look for it, see refuse_unshared_directory
    return file


def refuse_unshared_directory(directory: Path, owner: int) -> None:
    """Raises InputError when ``directory`` is not the one that process ``owner`` has locked: the processes of a run write
    parts of one checkpoint, which directories of their own would never hold whole."""
    file = directory / ".lock"
    if not file.is_file() or not file.read_text().startswith(f"process {owner} on "):
        raise InputError(
            f"{directory}: not the directory that the first process has opened under this name: put run_dir on a file "
            "system that all hosts share (docs/tpu.md)"
        )


def refuse_foreign(directory: Path, stage: str) -> None:
    """Raises InputError when ``directory`` holds files and is no run of this stage: nothing is written into a mistyped
    path, and no run's record is overwritten by another program's."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory; give another run_dir")
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if names - {".lock"} and not names & OURS:
        raise InputError(f"{directory}: not empty and not a run ({sorted(names)[0]} is there); give another run_dir")
    theirs = (read_provenance(directory) or {}).get("stage", stage)
    if theirs != stage:
        raise InputError(f"{directory}: belongs to a run of stage {theirs!r}, this is {stage!r}; give another run_dir")


def refuse_steps(directory: Path, operative: str, step: int) -> None:
    """Raises InputError when the steps asked for are none, or fewer than the run has done already.

    step: the newest by its name. A directory without a manifest is no step that was done; opening the run sets it aside.
    """
    for key, asked in bound_values(operative).items():
        if key not in STEPS or not isinstance(asked, int):
            continue
        if asked < 1:
            raise InputError(f"{key} = {asked}: give a whole number >= 1")
        if asked < step and os.path.lexists(checkpoint_dir(directory) / str(step) / MANIFEST):
            raise InputError(
                f"{directory}: already at step {step}, asked for {asked} ({key}): ask for more, or a new run_dir"
            )


def refuse_changes(directory: Path, now: Mapping[str, Any], operative: str, holds: str) -> None:
    """Raises InputError by name when a resumed run is not the run that was begun.

    now: {"stage", "seed", "inputs"}; a path may move when it still holds the same content. holds: what would be lost,
    such as "is at step 3".
    """
    before = read_provenance(directory)
    stored = directory / "operative_config.gin"
    if before is None or not stored.is_file():
        raise InputError(
            f"{directory}: {holds} but has no provenance.json or operative_config.gin; use another run_dir"
        )
    remedy = f"put it back, or use a new run_dir ({directory} {holds})"
    for key in ("stage", "seed"):
        if before[key] != now[key]:
            raise InputError(f"{key} changed from {before[key]!r} to {now[key]!r}: {remedy}")
    old, new = ({entry["name"]: entry for entry in entries} for entries in (before["inputs"], now["inputs"]))
    if old.keys() != new.keys():
        raise InputError(f"inputs changed from {sorted(old)} to {sorted(new)}: {remedy}")
    for name in sorted(old):
        if old[name]["fingerprint"] != new[name]["fingerprint"]:
            raise InputError(
                f"input {name!r}: the content of {new[name]['path']} is not what the run began with: {remedy}"
            )
    cwd = before["launches"][-1]["working_directory"]
    moves = {(old[name]["path"], new[name]["path"]) for name in old}
    found = changes(stored.read_text(), operative)
    schedules = {
        key: value for key, value in bound_values(operative).items() if key.endswith("OptimizerConfig.schedule")
    }
    decaying = [f"{key} = {value!r}" for key, value in schedules.items() if value != "constant"]
    if decaying and any(change.key in STEPS for change in found):
        raise InputError(
            f"run.steps: changed, and {decaying[0]} decays over run.steps: the steps already done had another learning "
            f"rate; {remedy}"
        )
    refused = [
        f"{change.key} changed from {change.old!r} to {change.new!r}"
        for change in found
        if not change.allowed and not _is_move(change, cwd, moves)
    ]
    if refused:
        raise InputError(f"{'; '.join(refused)}: may not change on resume; {remedy}")


def make_directory(directory: Path) -> None:
    """Raises InputError when it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot make it ({error.strerror}); give another run_dir") from error


def forget(directory: Path) -> None:
    """Remove a run directory that this process made and in which nothing was done: no step, no file of an algorithm's
    own. What could not be used (a batch that does not divide over the mesh shows late) then leaves nothing behind."""
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    begun = any(json.loads(line)["step"] for line in lines) or any((directory / "checkpoints").glob("*"))
    if not begun and {entry.name for entry in directory.iterdir()} <= MADE_ON_OPENING:
        shutil.rmtree(directory)


def _is_move(change: Change, old_cwd: str, moves: set[tuple[str, str]]) -> bool:
    """Whether a key changed only because an input (its content already compared) lies elsewhere now."""
    if not isinstance(change.old, str) or not isinstance(change.new, str):
        return False
    old, new = change.old, change.new
    before = old if is_remote(old) else str(Path(old_cwd, old))
    return (before, new if is_remote(new) else str(Path(new).absolute())) in moves
