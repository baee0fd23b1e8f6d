"""Opening of a run directory: checks, lock, choice of the checkpoint to resume, provenance; and closing in order.

A start continues from the first of these that exists:

1. with --sync=URL, the newest complete step at the URL, when the directory has none that is newer (`rundir.mirror`);
2. the newest complete step in RUN_DIR/checkpoints (`rundir.checkpoints.newest_verified`);
3. the model of ModelSource.path;
4. a new model of ModelSource.config, initialized from the seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from rlhf_jax.checkpoint_files.manifest import latest_step
from rlhf_jax.config.parsing import BoundConfig
from rlhf_jax.errors import InputError
from rlhf_jax.loop.faults import Faults
from rlhf_jax.loop.loop_config import LoopConfig
from rlhf_jax.loop.profile import Profile
from rlhf_jax.loop.run import Run
from rlhf_jax.loop.signals import Signals
from rlhf_jax.loop.status import Status
from rlhf_jax.loop.watchdog import Watchdog
from rlhf_jax.parallel.distributed import broadcast_from_first
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention, newest_verified
from rlhf_jax.rundir.mirror import Mirror, open_mirror
from rlhf_jax.rundir.outputs import record_outputs
from rlhf_jax.rundir.provenance import describe, versions, write_provenance
from rlhf_jax.rundir.resume import (
    check_changes,
    check_run_place,
    check_shared_directory,
    check_stage,
    check_steps,
    lock,
    make_directory,
    remove_temporary,
    remove_unused,
)
from rlhf_jax.rundir.tracking import Tracker
from rlhf_jax.storage.files import write_atomically
from rlhf_jax.storage.inputs import Input
from rlhf_jax.storage.names import CONFIG, OPERATIVE_CONFIG
from rlhf_jax.storage.remote import is_remote


class Job(Protocol):
    """An algorithm assembled for a run (`rlhf_jax.algorithms`)."""

    @property
    def name(self) -> str: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def inputs(self) -> Sequence[Input]: ...
    @property
    def phase_names(self) -> Sequence[str]: ...
    def check(self, evaluate_every: int) -> None: ...
    def begin(self, directory: Path) -> str: ...


@contextlib.contextmanager
def open_job(run_dir: str | Path, *, bound: BoundConfig, job: Job, seed: int, loop: LoopConfig) -> Iterator[Run]:
    """Open the run directory of an assembled algorithm (`open_run`); the algorithm writes its model card and tokenizer there."""
    job.check(loop.evaluate_every)
    settings: dict[str, Any] = {"bound": bound, "seed": seed, "loop": loop, "mesh": job.mesh, "inputs": job.inputs}
    with open_run(run_dir, stage=job.name, phases=job.phase_names, **settings) as run:
        run.overview = job.begin(run.directory)
        yield run


@contextlib.contextmanager
def open_run(
    run_dir: str | Path,
    *,
    stage: str,
    bound: BoundConfig,
    seed: int,
    loop: LoopConfig,
    inputs: Sequence[Input] = (),
    mesh: Mesh | None = None,
    output: str | None = None,
    phases: Sequence[str] = ("train",),
) -> Iterator[Run]:
    """Open a run directory, new or to be resumed: lock, check, record; close drains the saves and the logs.

    run_dir: a local directory, created when missing; with --sync downloaded first (`rundir.mirror`).
    stage: 'sft', 'ppo', ...
    mesh: only recorded.
    output: the file that a run without checkpoints writes at its end.
    phases: the phases of a step.
    Raises InputError, before the first write, when the directory holds other files, is in use, or was started with another
    configuration. The configuration may change freely while there is no checkpoint or output. An InputError before the first
    step of a new run removes its directory again.
    """
    if is_remote(run_dir):
        raise InputError(f"run_dir = {str(run_dir)!r}: a run lives in a local directory; --sync=URL keeps a copy of it")
    loop.check_phases(phases)
    directory = Path(run_dir).expanduser().absolute()
    profile = Profile.from_flags(directory)
    check_run_place(directory)
    mirror = open_mirror(directory, stage, output)
    check_stage(directory, stage)
    check_steps(directory, bound.operative, latest_step(directory) or 0)
    identity: dict[str, Any] = {"stage": stage, "seed": seed, "inputs": [describe(entry) for entry in inputs]}
    first = jax.process_index() == 0
    with _hold_lock(directory), contextlib.ExitStack() as stack:
        if first and mirror is not None:
            stack.enter_context(mirror)
        finish = stack.enter_context(_record_outputs_at_end(directory))
        signals = stack.enter_context(Signals())
        _check_same_run(directory, identity, bound, output)
        resumed = broadcast_from_first(newest_verified(directory) if first else 0)
        if first and mirror is not None:
            mirror.claim(stage, seed, bound.operative)
        if first:
            write_provenance(directory, **identity, resumed_step=resumed, mesh=mesh)
            write_atomically(directory / CONFIG, bound.config)
            write_atomically(directory / OPERATIVE_CONFIG, bound.operative)
        run = _assemble_run(stack, directory, identity, bound, loop, resumed, signals, profile, mirror, tuple(phases))
        stack.callback(run.close_display)
        yield run
        finish()


def _check_same_run(directory: Path, identity: Mapping[str, Any], bound: BoundConfig, output: str | None) -> None:
    """Check that a run with a checkpoint or output has the same identity, and that all processes share its directory.

    Raises InputError otherwise.
    """
    step = latest_step(directory) or 0
    if step or (output is not None and (directory / output).is_file()):
        content = f"is at step {step}" if step else f"holds {output}"
        check_changes(directory, identity, bound.operative, content)
    check_shared_directory(directory, broadcast_from_first(os.getpid()))


def _assemble_run(
    stack: contextlib.ExitStack,
    directory: Path,
    identity: Mapping[str, Any],
    bound: BoundConfig,
    loop: LoopConfig,
    resumed: int,
    signals: Signals,
    profile: Profile,
    mirror: Mirror | None,
    phases: tuple[str, ...],
) -> Run:
    """Return the run with its logs, watchdog and checkpoints, which ``stack`` closes in the opposite order."""
    tracker = Tracker(directory, identity["stage"], resumed_step=resumed, tensorboard=loop.tensorboard)
    stack.callback(tracker.close)
    status, faults = Status(directory), Faults(loop.faults)
    stack.callback(status.close)
    watchdog = Watchdog(directory, dict(loop.deadlines), loop.stop_within, lambda: signals.since)
    stack.enter_context(watchdog)

    def at(point: str, step: int, place: Path) -> None:
        status.update(saving="" if point == "retain" else f"{point} {step}")
        faults.at(point, step, place)
        if mirror is not None and point == "retain":
            mirror.start()

    facts = {
        "config": hashlib.sha256(bound.operative.encode()).hexdigest(),
        "inputs": {entry["name"]: entry["fingerprint"] for entry in identity["inputs"]},
        "versions": versions(),
    }
    retention = Retention(loop.keep, loop.keep_best, loop.best_metric, loop.best)
    checkpoints = stack.enter_context(Checkpoints(directory, retention, facts=facts, at=at))
    return Run(
        directory=directory,
        stage=identity["stage"],
        loop=loop,
        resumed_step=resumed,
        tracker=tracker,
        checkpoints=checkpoints,
        signals=signals,
        watchdog=watchdog,
        faults=faults,
        status=status,
        profile=profile,
        phases=phases,
    )


@contextlib.contextmanager
def _record_outputs_at_end(directory: Path) -> Iterator[Callable[[], None]]:
    """Record the outputs of a run after its saves have ended, if the function that this yields was called."""
    finished: list[bool] = []
    yield lambda: finished.append(True)
    if finished and jax.process_index() == 0:
        record_outputs(directory)


@contextlib.contextmanager
def _hold_lock(directory: Path) -> Iterator[None]:
    """Make the run directory and hold its lock.

    After an InputError, a directory that this call made is removed if it is unused, while the lock is held.
    """
    if jax.process_index() != 0:
        broadcast_from_first(0)  # the first process makes it
        make_directory(directory)
        yield
        return
    fresh = make_directory(directory)
    broadcast_from_first(0)
    with lock(directory):
        remove_temporary(directory)
        try:
            yield
        except InputError:
            if fresh:
                remove_unused(directory)
            raise
