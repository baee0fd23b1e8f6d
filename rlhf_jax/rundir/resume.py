"""Checks of a run directory before a run opens it, and of changes on resume. All checks come before the first write."""

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

RUN_RECORDS = {CONFIG, OPERATIVE_CONFIG, PROVENANCE}
MADE_ON_OPENING = {
    *RUN_RECORDS,
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
"""Temporary files that a killed `write_atomically` leaves."""
NOT_STORABLE = "*?[]\\"
"""Characters that Orbax treats as a pattern or a separator: with one in a path it writes to another place, finds no files, or
finds those of another run."""
RESERVED_DIRECTORIES = {
    PROVENANCE: {CHECKPOINTS, "tensorboard", TOKENIZER, BAD_STEPS, PROFILE},
    CARD: {CHECKPOINTS, TOKENIZER},
    "pipeline.json": {"compilation_cache"},
    "sweep.json": {"compilation_cache", "logs"},
}
"""{file of an owner: directories below it that the owner (run, model, pipeline, sweep) manages, and removes files from}."""
STEPS = ("run.steps", "run.iterations")
"""Parameters that may hold the number of steps of an experiment."""


def lock(directory: Path) -> IO[str]:
    """Hold DIRECTORY/.lock until the returned file is closed or this process ends.

    Raises InputError when another process holds it, or has removed the directory meanwhile (see `remove_unused`).
    """
    path = directory / ".lock"
    try:
        file = path.open("a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stat = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{directory}: another process has just removed it; give the command again") from error
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{directory}: in use by {owner}; wait for it, stop it, or use another run_dir") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be locked ({error.strerror}); give another run_dir") from error
    if (stat.st_dev, stat.st_ino) != (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino):
        file.close()
        raise InputError(f"{directory}: another process has just removed it; give the command again")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    os.fsync(file.fileno())  # other hosts read it, see check_shared_directory
    return file


def check_run_place(directory: Path) -> None:
    """Check that checkpoints can be stored in ``directory``.

    Raises InputError for a path with characters that Orbax cannot store, and for one inside a directory that another run,
    pipeline or sweep manages: its retention would remove the files.
    """
    if characters := [c for c in str(directory) if c in NOT_STORABLE or c == "\0" or "\ud800" <= c <= "\udfff"]:
        raise InputError(
            f"{str(directory)!r}: checkpoints cannot be stored under a path with {characters[0]!r}; give another"
        )
    for path in {Path(os.path.normpath(directory)), Path(os.path.realpath(directory))}:
        for owner in path.parents:
            name = path.relative_to(owner).parts[0]
            if any(name in reserved and (owner / file).exists() for file, reserved in RESERVED_DIRECTORIES.items()):
                raise InputError(
                    f"{directory}: inside {owner / name}, which belongs to {owner}; give another directory"
                )


def check_shared_directory(directory: Path, owner: int) -> None:
    """Check that all processes of a run share ``directory``, since they write parts of one checkpoint.

    Raises InputError when ``directory`` is not the one that process ``owner`` has locked.
    """
    file = directory / ".lock"
    if not file.is_file() or not file.read_text().startswith(f"process {owner} on "):
        raise InputError(
            f"{directory}: not the directory that the first process has opened under this name: put run_dir on a file "
            "system that all hosts share (docs/tpu.md)"
        )


def check_stage(directory: Path, stage: str) -> None:
    """Check that ``directory`` is empty or a run of ``stage``, so that no other files are overwritten.

    Raises InputError otherwise.
    """
    names = names_in(directory)
    if names - {".lock"} - TEMPORARY and not names & RUN_RECORDS:
        raise InputError(
            f"{directory}: not empty and not a run ({min(names - {'.lock'} - TEMPORARY)} is there); give another run_dir"
        )
    recorded_stage = (read_provenance(directory) or {}).get("stage", stage)
    if recorded_stage != stage:
        raise InputError(
            f"{directory}: belongs to a run of stage {recorded_stage!r}, this is {stage!r}; give another run_dir"
        )


def check_steps(directory: Path, operative: str, step: int) -> None:
    """Check the number of steps that the configuration sets.

    step: the newest checkpoint by its name; one without a manifest does not count (opening the run renames it).
    Raises InputError when the number is below 1, or below the steps that the run has completed.
    """
    for key, steps in bound_values(operative).items():
        if key not in STEPS or not isinstance(steps, int):
            continue
        if steps < 1:
            raise InputError(f"{key} = {steps}: give a whole number >= 1")
        if steps < step and os.path.lexists(checkpoint_dir(directory) / str(step) / MANIFEST):
            raise InputError(
                f"{directory}: already at step {step}, asked for {steps} ({key}): ask for more, or a new run_dir"
            )


def check_changes(directory: Path, identity: Mapping[str, Any], operative: str, holds: str) -> None:
    """Check that a resumed run has the stage, seed, inputs and configuration that it was started with.

    identity: {"stage", "seed", "inputs"}; the path of an input may change when its content is the same.
    holds: the progress that would be lost, such as "is at step 3".
    Raises InputError that names each change.
    """
    record = read_provenance(directory)
    stored = directory / OPERATIVE_CONFIG
    if record is None or not stored.is_file():
        raise InputError(
            f"{directory}: {holds} but has no provenance.json or operative_config.gin; use another run_dir"
        )
    remedy = f"put it back, or use a new run_dir ({directory} {holds})"
    for key in ("stage", "seed"):
        if record[key] != identity[key]:
            raise InputError(f"{key} changed from {record[key]!r} to {identity[key]!r}: {remedy}")
    old, new = ({entry["name"]: entry for entry in entries} for entries in (record["inputs"], identity["inputs"]))
    if old.keys() != new.keys():
        raise InputError(f"inputs changed from {sorted(old)} to {sorted(new)}: {remedy}")
    for name in sorted(old):
        if changed := changed_content(old[name], new[name]):
            path = Path(new[name]["path"], changed[0]) if changed[0] else new[name]["path"]
            raise InputError(f"input {name!r}: the content of {path} is not what the run began with: {remedy}")
    cwd = record["launches"][-1]["working_directory"]
    moves = {(old[name]["path"], new[name]["path"]) for name in old}
    differences = changes(stored.read_text(), operative)
    schedules = {
        key: value for key, value in bound_values(operative).items() if key.endswith("OptimizerConfig.schedule")
    }
    decaying = [f"{key} = {value!r}" for key, value in schedules.items() if value != "constant"]
    if decaying and any(change.key in STEPS for change in differences):
        raise InputError(
            f"run.steps: changed, and {decaying[0]} decays over run.steps: the steps already done had another learning "
            f"rate; {remedy}"
        )
    refused = [
        f"{change.key} changed from {change.old!r} to {change.new!r}"
        for change in differences
        if not change.allowed and not _is_move(change, cwd, moves)
    ]
    if refused:
        raise InputError(f"{'; '.join(refused)}: may not change on resume; {remedy}")


def names_in(directory: Path) -> set[str]:
    """Return the names in a directory; an empty set when it does not exist.

    Raises InputError when it is not a directory, or cannot be read.
    """
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
    """Make a directory and its parents; return whether this call made it. Raises InputError when it cannot be made."""
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
    """Remove the temporary files of a killed start; call it under the directory's lock."""
    for name in TEMPORARY & names_in(directory):
        (directory / name).unlink()


def remove_unused(directory: Path) -> None:
    """Remove a run directory that this process made when it holds no step and no file of an algorithm.

    A configuration error that is detected late (a batch that does not divide over the mesh) then leaves no directory.
    Call it under the directory's lock. The lock file is removed last, so that `lock` detects the removal.
    """
    metrics = directory / METRICS
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    has_steps = any(json.loads(line)["step"] for line in lines) or list_checkpoints(directory)
    names = names_in(directory)
    if has_steps or not names <= MADE_ON_OPENING | TEMPORARY:
        return
    for name in names - {".lock"}:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (directory / ".lock").unlink()
    with contextlib.suppress(OSError):  # another start has made its lock file here meanwhile
        directory.rmdir()


def _is_move(change: Change, old_cwd: str, moves: set[tuple[str, str]]) -> bool:
    """Return whether a key changed only because an input, whose content is the same, has moved."""
    if not isinstance(change.old, str) or not isinstance(change.new, str):
        return False
    old, new = change.old, change.new
    old_path = old if is_remote(old) else str(Path(old_cwd, old))
    return (old_path, new if is_remote(new) else str(Path(new).absolute())) in moves
