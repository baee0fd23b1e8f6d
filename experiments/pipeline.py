"""Run stages one after another, each in a process and a run directory of its own.

    python experiments/pipeline.py --gin_file=configs/pipeline/quickstart.gin

The same command continues after a stop: a finished stage is skipped while its configuration and inputs are unchanged, and every
experiment resumes its own run directory. SIGTERM and Ctrl-C are passed on to the running stage, which saves first. The
provenance.json of a stage names the run directories, configurations and checkpoint fingerprints that it started from;
RUN_DIR/pipeline.json holds the command of each stage and the time when it finished. --sync=URL is passed to every stage as
URL/STAGE: on another machine each stage is fetched and found complete.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin

from rlhf_jax.config import bound_config, fingerprint_bindings, key_to_bind, scan
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.launch import STOPPED, launch, run_child
from rlhf_jax.launch.check_bindings import Command
from rlhf_jax.launch.check_bindings import check as check_bindings
from rlhf_jax.loop.cold_start import cache_environment
from rlhf_jax.reports.pipeline_page import write_report
from rlhf_jax.rundir import lock, make_directory
from rlhf_jax.rundir.outputs import changed_outputs
from rlhf_jax.rundir.provenance import changed_inputs
from rlhf_jax.rundir.resume import RESERVED_DIRECTORIES, check_run_place, names_in
from rlhf_jax.storage.files import field, json_text, read_object, write_atomically
from rlhf_jax.storage.names import PROVENANCE
from rlhf_jax.storage.remote import sync_url
from rlhf_jax.storage.shipped import experiments, script_path

RECORD = "pipeline.json"


@gin.register
@dataclasses.dataclass(frozen=True)
class Stage:
    """name: sub-directory of run_dir. experiment: script name. gin_file: its configuration. macros: gin macros of that
    file with paths of earlier stages, relative to run_dir: ('BASE', 'base'). bindings: more gin bindings."""

    name: str
    experiment: str
    gin_file: str
    macros: tuple[tuple[str, str], ...] = ()
    bindings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.experiment not in experiments():
            raise InputError(f"Stage.experiment = {self.experiment!r}: no experiments/{self.experiment}.py")
        if self.name in RESERVED_DIRECTORIES[RECORD]:
            raise InputError(
                f"Stage.name = {self.name!r}: the pipeline keeps files of its own there; give another name"
            )
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"Stage.name = {self.name!r}: letters, digits, - and _ only; it names a directory")


@gin.configurable
def run(run_dir: str, stages: Sequence[Stage], seed: int = 0) -> None:
    """Run the stages.

    stages: in order; the first that fails ends the pipeline with its exit code. seed: of every stage.
    """
    bound = bound_config()
    directory = Path(run_dir).expanduser().absolute()
    check(stages, seed)
    check_run_place(directory)
    _check_not_foreign(directory, [stage.name for stage in stages])
    make_directory(directory)
    with lock(directory):
        record = _read_record(directory) | {"config": bound.config}
        _write_record(
            directory, record
        )  # before the first stage, so that a directory that a kill leaves is known as a pipeline's
        # All stages and later starts share compiled programs; a cache of the user's own takes precedence.
        environment = cache_environment(directory)
        for number, stage in enumerate(stages, 1):
            print(f"[{number}/{len(stages)}] {stage.name}", file=sys.stderr, flush=True)
            fingerprint = fingerprint_bindings(scan([stage.gin_file], bindings(stage, Path(), seed)))
            if _is_finished(directory / stage.name, record["stages"].get(stage.name), fingerprint):
                print("    finished before", file=sys.stderr, flush=True)
                continue
            began = time.monotonic()
            code = run_child(command(stage, directory, seed), environment)
            if code:
                _fail(stage, code)
            seconds = time.monotonic() - began
            print(f"    {seconds:.0f} s", file=sys.stderr, flush=True)
            entry = {"experiment": stage.experiment, "gin_file": stage.gin_file, "asked": fingerprint}
            record["stages"][stage.name] = entry | {"seconds": round(seconds, 1), "finished": _utc_time()}
            _write_record(directory, record)
        report = write_report(directory, [stage.name for stage in stages])
    print(f"report: {report}")


def bindings(stage: Stage, directory: Path, seed: int) -> list[str]:
    """Return the gin bindings of a stage whose pipeline lives in ``directory``."""
    scanned = scan([stage.gin_file], [])
    values = {
        key_to_bind(scanned, "run.run_dir"): str(directory / stage.name),
        key_to_bind(scanned, "run.seed"): seed,
        **{name: str(directory / path) for name, path in stage.macros},
    }
    return [f"{name} = {value!r}" for name, value in values.items()] + list(stage.bindings)


def command(stage: Stage, directory: Path, seed: int) -> list[str]:
    """Return the command line of a stage."""
    flags = [f"--gin_file={stage.gin_file}", *(f"--gin_bindings={text}" for text in bindings(stage, directory, seed))]
    if (url := sync_url()) is not None:
        flags.append(f"--sync={url.rstrip('/')}/{stage.name}")
    return [sys.executable, str(script_path(stage.experiment)), *flags]


def check(stages: Sequence[Stage], seed: int) -> None:
    """Check the stages before the first one starts: files, macros, order, and the names and types of all bindings.

    Raises InputError for the first problem.
    """
    before: list[str] = []
    for stage in stages:
        if stage.name in before:
            raise InputError(f"run.stages: two are named {stage.name!r}; give each a name of its own")
        scanned = scan([stage.gin_file], list(stage.bindings))
        defined = {binding.selector for binding in scanned if not binding.argument}
        for name, path in stage.macros:
            if name not in defined:
                macros = ", ".join(sorted(defined)) or "none"
                raise InputError(
                    f"{stage.name}/Stage.macros: {stage.gin_file} has no macro {name}; it defines {macros}"
                )
            if path.split("/")[0] not in before:
                raise InputError(
                    f"{stage.name}/Stage.macros: {name} = {path!r} is not below a stage before it "
                    f"({', '.join(before) or 'there is none'})"
                )
        before.append(stage.name)
    check_bindings(
        [
            Command(stage.experiment, (stage.gin_file,), tuple(bindings(stage, Path(), seed)), f"stage {stage.name}")
            for stage in stages
        ]
    )


def _check_not_foreign(directory: Path, names: Sequence[str]) -> None:
    files = names_in(directory) - {".lock", f"{RECORD}.tmp"}
    if files and not files & {RECORD, *names}:
        raise InputError(f"{directory}: not empty and not a pipeline's ({min(files)} is there); give another run_dir")


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    write_atomically(directory / RECORD, json_text(record, indent=2))


def _read_record(directory: Path) -> dict[str, Any]:
    file, remedy = directory / RECORD, "delete it: finished stages are then looked at again"
    if not os.path.lexists(file):
        return {"stages": {}}
    record = read_object(file, remedy)
    for name, entry in field(record, "stages", dict, str(file), remedy).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("asked"), str):
            raise InputError(f"{file}: the entry of stage {name!r} is not what was written; {remedy}")
    return record


def _is_finished(run_dir: Path, entry: dict[str, Any] | None, fingerprint: str) -> bool:
    """Return whether a stage finished with this configuration and its inputs have not changed.

    Raises InputError when its outputs have changed.
    """
    if entry is None or entry["asked"] != fingerprint or not (run_dir / PROVENANCE).is_file():
        return False
    if changed := changed_outputs(run_dir):
        raise InputError(
            f"{run_dir / changed[0]}: not what stage {run_dir.name} wrote: put it back, or remove {run_dir} and the stages "
            "after it to run them again"
        )
    return not changed_inputs(run_dir)


def _fail(stage: Stage, code: int) -> None:
    """Exit with the exit code of the stage."""
    if code in STOPPED:
        print(f"stopped in stage {stage.name}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(code)
    killed = " (killed; out of memory?)" if code == 137 else ""
    message = f"stage {stage.name} ended with exit code {code}{killed}; its message is above"
    if code == 2:
        raise InputError(message)
    if code == 3:
        raise RunStopped(message)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _utc_time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    launch(run)
