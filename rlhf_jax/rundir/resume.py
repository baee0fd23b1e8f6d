"""What a directory must be before a run may open it, and what a resumed run may not change. Every refusal comes before
anything is written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rlhf_jax.checkpoint_files.manifest import checkpoint_dir, list_checkpoints, unreadable
from rlhf_jax.config.parsing import Change, bound_values, changes
from rlhf_jax.errors import InputError
from rlhf_jax.rundir.provenance import changed_content, read_provenance
from rlhf_jax.storage.names import (
    BAD_STEPS,
    CARD,
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    METRICS,
    OPERATIVE_CONFIG,
    PARAMETERS,
    PROFILE,
    PROVENANCE,
    STATUS,
    TIMING,
    TOKENIZER,
)
from rlhf_jax.storage.remote import is_remote

OURS = {CONFIG, OPERATIVE_CONFIG, PROVENANCE}
MADE_ON_OPENING = {
    *OURS,
    ".lock",
    METRICS,
    TIMING,
    "tensorboard",
    CHECKPOINTS,
    STATUS,
    CARD,
    TOKENIZER,
    PARAMETERS,
    PROFILE,
}
TEMPORARY = frozenset(f"{name}.tmp" for name in MADE_ON_OPENING)
"""What `write_atomically` leaves of these when it is killed."""
NOT_STORABLE = "*?[]\\"
"""Characters that Orbax reads as a pattern or as a separator: with one of them in a path it writes elsewhere, finds nothing, or
finds the files of another run."""
OWN_PLACES = {
    PROVENANCE: {CHECKPOINTS, "tensorboard", TOKENIZER, BAD_STEPS, PROFILE},
    CARD: {CHECKPOINTS, TOKENIZER},
    "pipeline.json": {"compilation_cache"},
    "sweep.json": {"compilation_cache", "logs"},
}
"""The directories that the owner of such a file writes, and removes from, by itself."""
STEPS = ("run.steps", "run.iterations")
"""How an experiment may call its number of steps."""


def lock(directory: Path) -> IO[str]:
    """Hold DIRECTORY/.lock until the file is closed or this process ends. Raises InputError when another holds it, or has
    removed the directory meanwhile (see `forget`)."""
    path = directory / ".lock"
    try:
        file = path.open("a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{directory}: another process has just removed it; give the command again") from error
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{directory}: in use by {owner}; wait for it, stop it, or use another run_dir") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be locked ({error.strerror}); give another run_dir") from error
    if (there.st_dev, there.st_ino) != (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino):
        file.close()
        raise InputError(f"{directory}: another process has just removed it; give the command again")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    os.fsync(file.fileno())  # other hosts look for it, see check_shared_directory
    return file


def check_run_place(directory: Path) -> None:
    """Raises InputError for a path that checkpoints cannot be stored under, and for one inside a place that another run,
    pipeline or sweep keeps for itself: its retention would remove what lies there."""
    if wrong := [c for c in str(directory) if c in NOT_STORABLE or c == "\0" or "\ud800" <= c <= "\udfff"]:
        raise InputError(
            f"{str(directory)!r}: checkpoints cannot be stored under a path with {wrong[0]!r}; give another"
        )
    for place in {Path(os.path.normpath(directory)), Path(os.path.realpath(directory))}:
        for owner in place.parents:
            name = place.relative_to(owner).parts[0]
            if any(name in places and (owner / file).exists() for file, places in OWN_PLACES.items()):
                raise InputError(
                    f"{directory}: inside {owner / name}, which belongs to {owner}; give another directory"
                )


def check_shared_directory(directory: Path, owner: int) -> None:
    """Raises InputError when ``directory`` is not the one that process ``owner`` has locked: the processes of a run write
    parts of one checkpoint, which directories of their own would never hold whole."""
    file = directory / ".lock"
    if not file.is_file() or not file.read_text().startswith(f"process {owner} on "):
        raise InputError(
            f"{directory}: not the directory that the first process has opened under this name: put run_dir on a file "
            "system that all hosts share (docs/tpu.md)"
        )


def check_stage(directory: Path, stage: str) -> None:
    """Raises InputError when ``directory`` holds files and is no run of this stage: nothing is written into a mistyped
    path, and no run's record is overwritten by another program's."""
    names = names_in(directory)
    if names - {".lock"} - TEMPORARY and not names & OURS:
        raise InputError(
            f"{directory}: not empty and not a run ({min(names - {'.lock'} - TEMPORARY)} is there); give another run_dir"
        )
    theirs = (read_provenance(directory) or {}).get("stage", stage)
    if theirs != stage:
        raise InputError(f"{directory}: belongs to a run of stage {theirs!r}, this is {stage!r}; give another run_dir")


def check_steps(directory: Path, operative: str, step: int) -> None:
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


def check_changes(directory: Path, now: Mapping[str, Any], operative: str, holds: str) -> None:
    """Raises InputError by name when a resumed run is not the run that was begun.

    now: {"stage", "seed", "inputs"}; a path may move when it still holds the same content. holds: what would be lost,
    such as "is at step 3".
    """
    before = read_provenance(directory)
    stored = directory / OPERATIVE_CONFIG
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
        if changed := changed_content(old[name], new[name]):
            place = Path(new[name]["path"], changed[0]) if changed[0] else new[name]["path"]
            raise InputError(f"input {name!r}: the content of {place} is not what the run began with: {remedy}")
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


def names_in(directory: Path) -> set[str]:
    """List what lies in a directory; nothing when there is none. Raises InputError when something that is no directory is
    there, or it cannot be read."""
    try:
        return set(os.listdir(directory))
    except FileNotFoundError as error:
        if directory.is_symlink():
            raise InputError(f"{directory}: a link to a place that is not there; mount it, or give another") from error
        return set()
    except NotADirectoryError as error:
        if not os.path.lexists(directory):  # a file is where a directory above it should be
            return set()
        raise InputError(f"{directory}: not a directory; give another run_dir") from error
    except OSError as error:
        raise unreadable(directory, error) from error


def make_directory(directory: Path) -> bool:
    """Make a directory and those above it; return whether it is this call that made it. Raises InputError when it cannot be
    made."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir()
    except FileExistsError as error:
        if not os.path.isdir(directory):
            raise InputError(f"{directory}: cannot make it ({error.strerror}); give another run_dir") from error
        return False
    except OSError as error:
        raise InputError(f"{directory}: cannot make it ({error.strerror}); give another run_dir") from error
    return True


def remove_temporary(directory: Path) -> None:
    """Remove what a killed start left half-written; call it under the directory's lock."""
    for name in TEMPORARY & names_in(directory):
        (directory / name).unlink()


def forget(directory: Path) -> None:
    """Remove a run directory that this process made and in which nothing was done: no step, no file of an algorithm's
    own. What could not be used (a batch that does not divide over the mesh shows late) then leaves nothing behind.

    Call it under the directory's lock, whose file goes last: who opens it afterwards sees in `lock` that it is gone.
    """
    metrics = directory / METRICS
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    begun = any(json.loads(line)["step"] for line in lines) or list_checkpoints(directory)
    names = names_in(directory)
    if begun or not names <= MADE_ON_OPENING | TEMPORARY:
        return
    for name in names - {".lock"}:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (directory / ".lock").unlink()
    with contextlib.suppress(
        OSError
    ):  # another start has put its lock here meanwhile: then the directory is that one's
        directory.rmdir()


def _is_move(change: Change, old_cwd: str, moves: set[tuple[str, str]]) -> bool:
    """Whether a key changed only because an input (its content already compared) lies elsewhere now."""
    if not isinstance(change.old, str) or not isinstance(change.new, str):
        return False
    old, new = change.old, change.new
    before = old if is_remote(old) else str(Path(old_cwd, old))
    return (before, new if is_remote(new) else str(Path(new).absolute())) in moves
