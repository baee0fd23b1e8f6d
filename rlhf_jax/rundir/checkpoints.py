"""Checkpoints of a run: background saves, retention, verification and restoring. Orbax writes the arrays.

`rlhf_jax.checkpoint_files.manifest` defines the files of a step and how they are verified and read.

A save copies the arrays off the devices and returns. A thread waits for Orbax, hashes the files on disk, writes the
manifest, renames the directory to the step number and removes the steps that retention does not keep. Saves are always
drained: a failed save stops the run (RunStopped) at the next save or at the end. Opening a run (`newest_verified`)
removes the half-written files of a killed process, renames damaged steps to STEP.damaged with a warning, and falls back
to the newest step that passes verification.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from rlhf_jax.checkpoint_files.manifest import (
    DamagedCheckpoint,
    check_layout,
    check_leaves,
    checkpoint_dir,
    find_step,
    first_line,
    hash_files,
    latest_step,
    layout,
    list_checkpoints,
    manifest_text,
    read_manifest,
    read_state,
    saved_steps,
    verify,
)
from rlhf_jax.checkpoint_files.reading import unread
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.rundir.provenance import fingerprint_input, read_provenance, record_saved
from rlhf_jax.storage.files import write_atomically
from rlhf_jax.storage.names import MANIFEST, METRICS, PROVENANCE, SAVED_STEP, STATE

SAVING, DELETING, DAMAGED = ".saving", ".deleting", ".damaged"


@dataclass(frozen=True)
class Retention:
    """The rule for keeping steps: the ``keep`` newest (>= 1), and the ``keep_best`` best by ``metric``."""

    keep: int
    keep_best: int = 0
    metric: str = ""
    best: Literal["lowest", "highest"] = "lowest"

    def steps_to_keep(self, steps: Mapping[int, Mapping[str, float | None]]) -> set[int]:
        """Return the steps that stay. The newest always stay; a step whose metric is missing or not finite is never best.

        steps: {step: metrics}.
        Example: keep 1, keep_best 1, lowest: {1: 5., 2: 3., 3: nan, 4: 4.} keeps {2, 4}.
        """
        newest = sorted(steps)[-self.keep :]
        sign = 1.0 if self.best == "lowest" else -1.0
        values = {step: metrics.get(self.metric) for step, metrics in steps.items()}
        ranked = sorted((sign * v, step) for step, v in values.items() if v is not None and math.isfinite(v))
        return {*newest, *(step for _, step in ranked[: self.keep_best])}


def fingerprint(run_dir: str | Path, step: int) -> str:
    """Return the sha256 over the sorted (relative path, sha256 of the file) of a step and a reward run's normalisation.

    It identifies the files that a later run read. Two saves of equal numbers have different fingerprints (Orbax writes
    time stamps).
    """
    return fingerprint_input(Path(run_dir), step)


def abstract(state: Any) -> Any:
    """Return the ShapeDtypeStruct tree of a state, with its shardings (the first device for a leaf without one)."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first), state)


def newest_verified(run_dir: str | Path) -> int:
    """Return the newest step that passes verification, 0 when the run saved none.

    Call it under the run's lock, before any file of the run is opened. It removes the half-written files of a killed
    process and renames a damaged step to STEP.damaged, with a warning.
    Raises InputError when all steps are damaged, when checkpoints that the run recorded are missing, and when the
    directory cannot be read: the user decides whether to start from nothing.
    """
    directory = checkpoint_dir(run_dir)
    for name in list_checkpoints(run_dir):
        if name.endswith((SAVING, DELETING)):
            shutil.rmtree(directory / name)
    for step in reversed(saved_steps(run_dir)):
        step_dir = directory / str(step)
        try:
            verify(step_dir)
        except DamagedCheckpoint as error:
            renamed = _rename_damaged(step_dir)
            print(f"warning: {step_dir}: damaged checkpoint: {error.problem}; moved to {renamed.name}", file=sys.stderr)
            continue
        if damaged_names := _damaged_names(run_dir):
            print(
                f"warning: {directory}: going on from step {step}; {', '.join(damaged_names)} set aside",
                file=sys.stderr,
            )
        return step
    if damaged := _damaged_names(run_dir):
        raise InputError(
            f"{directory}: no checkpoint is whole ({', '.join(damaged)}): put a good copy back as its step number, or "
            f"remove {run_dir} to begin again from nothing"
        )
    if reason := _evidence_of_steps(Path(run_dir)):
        raise InputError(
            f"{directory}: no checkpoint is there, and {reason}: put the checkpoints back (mount their disk), or remove "
            f"{run_dir} to begin again from nothing"
        )
    return 0


def _last_step(file: Path) -> int:
    """Return the largest step in a file of metrics, 0 when there is none; damaged lines are skipped."""
    steps = [0]
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            steps.append(int(json.loads(line)["step"]))
    return max(steps)


def _damaged_names(run_dir: str | Path) -> list[str]:
    return [name for name in list_checkpoints(run_dir) if DAMAGED in name]


def _evidence_of_steps(run_dir: Path) -> str:
    """Return a clause that says why a run without checkpoints must have saved some, '' when there is no evidence.

    A run that was killed before its first save has metrics of its first steps and an empty ``checkpoints``: it starts
    again.
    """
    record = read_provenance(run_dir) or {}
    steps = [record.get(SAVED_STEP, 0), *(launch.get("resumed_step", 0) for launch in record.get("launches", []))]
    if last := max(steps):
        return f"{PROVENANCE} says that the run has saved step {last}"
    if checkpoint_dir(run_dir).exists():
        return ""
    if last := _last_step(run_dir / METRICS):
        return f"{METRICS} shows steps up to {last}"
    return ""


def _rename_damaged(place: Path) -> Path:
    names = (f"{place.name}{DAMAGED}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(path for path in map(place.with_name, names) if not path.exists())
    place.rename(aside)
    return aside


class Checkpoints:
    """The checkpoints of one run, open for saving: a context manager that drains the background save when it closes."""

    def __init__(
        self,
        run_dir: str | Path,
        retention: Retention,
        *,
        facts: Mapping[str, Any] | None = None,
        at: Callable[[str, int, Path], None] = lambda point, step, place: None,
    ) -> None:
        """Open the checkpoints of ``run_dir`` for saving.

        facts: more entries for the manifest (hashes of configuration and inputs, versions), JSON-able.
        at(point, step, directory): called at 'write', 'hash', 'commit' and 'retain', for injected faults.
        """
        self.run_dir, self.retention = Path(run_dir).absolute(), retention
        self.directory = checkpoint_dir(run_dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._facts, self._at = dict(facts or {}), at
        self._writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_yield_the_cores)
        self._pending: Future[None] | None = None
        self._recorded = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Return the newest step, None when there is none; a save in progress does not count."""
        return latest_step(self.run_dir)

    def save(
        self, step: int, state: Any, host: Mapping[str, Any], metrics: Mapping[str, float | None] | None = None
    ) -> None:
        """Copy ``state`` off the devices and write it in the background, after the previous save has ended.

        step: larger than every saved step.
        state: may be donated as soon as this returns.
        host: values of the host, JSON-able.
        metrics: those of this step, for retention.
        Raises RunStopped when an earlier save failed (disk full).
        """
        self.drain()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise RunStopped(f"{self.directory / str(step)}: not saved: step {newest} is already there")
        finite = {name: v for name, v in (metrics or {}).items() if v is not None and math.isfinite(v)}
        body = {"step": step, "layout": layout(state), "host": dict(host), "metrics": finite, **self._facts}
        saving = self.directory / f"{step}{SAVING}"
        try:
            # Serialise now: the loop changes the host values while the thread writes.
            text = json.dumps(body, allow_nan=False)
            saving.mkdir(exist_ok=True)
            self._at("write", step, saving)
            self._writer.save(saving / STATE, args=ocp.args.StandardSave(state))
        except Exception as error:
            raise RunStopped(f"{self.directory / str(step)}: cannot save: {first_line(error)}") from error
        self._pending = self._thread.submit(self._finish, step, text, saving)

    def _finish(self, step: int, text: str, saving: Path) -> None:
        """Complete a save in the background once Orbax has written the arrays: hash, manifest, rename, retention.

        text: the manifest's body without the files, as JSON.
        """
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        body = json.loads(text)
        check_leaves(saving, body["layout"])
        self._at("hash", step, saving)
        write_atomically(saving / MANIFEST, manifest_text(body | {"files": hash_files(saving)}))
        self._at("commit", step, saving)
        step_dir = saving.with_name(str(step))
        saving.rename(step_dir)
        if not self._recorded:
            record_saved(self.run_dir, step)
            self._recorded = True
        self._at("retain", step, step_dir)
        self._retain()

    def _retain(self) -> None:
        """Remove the steps that retention does not keep; each is renamed first, so that a step number is never partial."""
        steps = {step: self._metrics(step) for step in saved_steps(self.run_dir)}
        for step in steps.keys() - self.retention.steps_to_keep(steps):
            step_dir, deleting = self.directory / str(step), self.directory / f"{step}{DELETING}"
            with unread(step_dir) as free:
                if free:  # a step that is being read is removed at a later save
                    step_dir.rename(deleting)
                    shutil.rmtree(deleting)

    def _metrics(self, step: int) -> dict[str, float | None]:
        if not self.retention.keep_best:
            return {}
        try:
            metrics: dict[str, float | None] = read_manifest(self.directory / str(step))["metrics"]
        except DamagedCheckpoint:
            return {}
        return metrics

    def restore(
        self, state: Any, step: int | None = None, *, verified: bool = False, donate: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Return (state, host) of ``step`` (None: the newest), with the shardings of ``state`` (arrays or ShapeDtypeStructs).

        The mesh may differ from that of the run that saved.
        verified: the files were just hashed and are not hashed again.
        donate: free the arrays of ``state`` before the step is read, so that the devices never hold two states.
        Raises DamagedCheckpoint, or InputError that names every leaf that is missing, extra or of another shape or dtype.
        """
        self.drain()
        step_dir = find_step(self.run_dir, step)
        body = read_manifest(step_dir) if verified else verify(step_dir)
        remedy = "restore it with the configuration that saved it"
        check_layout(step_dir, body["layout"], layout(state), remedy)
        target = abstract(state)
        if donate:
            _free(state)
        return read_state(step_dir, target), body["host"]

    def drain(self) -> None:
        """Wait for the background save. Raises RunStopped when it failed: a program that lost a save must not exit with 0."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise RunStopped(f"{self.directory}: a save failed: {first_line(error)}") from error

    def close(self) -> None:
        """Wait for the background save and end the thread. Raises RunStopped when the save failed."""
        try:
            self.drain()
        finally:
            self._thread.shutdown()
            self._writer.close()


def _free(state: Any) -> None:
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()


def _yield_the_cores() -> None:
    """Lower the priority of the calling thread (hashing raised the time of a step from 80 to 130 ms on two cores)."""
    if sys.platform == "linux":  # on other systems a priority belongs to a process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
