"""Checkpoints of a run: Orbax writes the arrays, everything it leaves to its caller is done here.

What a step is on disk, how it is verified and read: `rlhf_jax.checkpoint_files.manifest`.

A save copies the arrays off the devices and returns. A thread waits for Orbax, hashes what lies on the disk, writes the
manifest, gives the step its name and removes what retention no longer wants. Saves are always drained: a failed one
stops the run (RunStopped) at the next save or at the end. Opening a run (`newest_verified`) removes what a killed
process left, sets damaged steps aside as STEP.damaged, says so, and falls back to the newest step that is whole.
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
    """Which steps stay: the ``keep`` newest (>= 1), and the ``keep_best`` best by ``metric`` (those that have it)."""

    keep: int
    keep_best: int = 0
    metric: str = ""
    best: Literal["lowest", "highest"] = "lowest"

    def kept(self, steps: Mapping[int, Mapping[str, float | None]]) -> set[int]:
        """steps: {step: metrics}. The newest always stay; a metric that is missing or not finite is never best.

        keep 1, keep_best 1, lowest: {1: 5., 2: 3., 3: nan, 4: 4.} keeps {2, 4}.
        """
        newest = sorted(steps)[-self.keep :]
        sign = 1.0 if self.best == "lowest" else -1.0
        values = {step: metrics.get(self.metric) for step, metrics in steps.items()}
        ranked = sorted((sign * v, step) for step, v in values.items() if v is not None and math.isfinite(v))
        return {*newest, *(step for _, step in ranked[: self.keep_best])}


def fingerprint(run_dir: str | Path, step: int) -> str:
    """sha256 over the sorted (relative path, sha256 of the file) of a step, and a reward run's normalisation: says which
    very files a later run read. Two saves of equal numbers differ in it (Orbax writes time stamps)."""
    return fingerprint_input(Path(run_dir), step)


def abstract(state: Any) -> Any:
    """The ShapeDtypeStruct tree of a state, with its shardings (the first device for a leaf that has none)."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first), state)


def newest_verified(run_dir: str | Path) -> int:
    """The newest step that is whole, 0 when the run saved none; call it under the run's lock, before anything is opened.

    Removes what a killed process left half-written. A damaged step becomes STEP.damaged, with a warning. Raises
    InputError when there are damaged steps only, when the checkpoints that the run's record shows are gone, and when the
    file system does not let us look: to begin again from nothing is for the user to decide.
    """
    directory = checkpoint_dir(run_dir)
    for name in list_checkpoints(run_dir):
        if name.endswith((SAVING, DELETING)):
            shutil.rmtree(directory / name)
    for step in reversed(saved_steps(run_dir)):
        place = directory / str(step)
        try:
            verify(place)
        except DamagedCheckpoint as error:
            aside = _set_aside(place)
            print(f"warning: {place}: damaged checkpoint: {error.what}; moved to {aside.name}", file=sys.stderr)
            continue
        if aside_now := _damaged_names(run_dir):
            print(f"warning: {directory}: going on from step {step}; {', '.join(aside_now)} set aside", file=sys.stderr)
        return step
    if damaged := _damaged_names(run_dir):
        raise InputError(
            f"{directory}: no checkpoint is whole ({', '.join(damaged)}): put a good copy back as its step number, or "
            f"remove {run_dir} to begin again from nothing"
        )
    if shown := _steps_shown(Path(run_dir)):
        raise InputError(
            f"{directory}: no checkpoint is there, and {shown}: put the checkpoints back (mount their disk), or remove "
            f"{run_dir} to begin again from nothing"
        )
    return 0


def _last_step(file: Path) -> int:
    """Return the largest step that a file of metrics shows, 0 for none; damaged lines are passed over."""
    steps = [0]
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            steps.append(int(json.loads(line)["step"]))
    return max(steps)


def _damaged_names(run_dir: str | Path) -> list[str]:
    return [name for name in list_checkpoints(run_dir) if DAMAGED in name]


def _steps_shown(run_dir: Path) -> str:
    """Return in words what shows that a run without checkpoints has saved some; '' when nothing does.

    A run that a kill ended before its first save has metrics of its first steps and an empty ``checkpoints``: that one
    begins again.
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


def _set_aside(place: Path) -> Path:
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
        """facts: more for the manifest (hashes of configuration and inputs, versions), JSON-able.

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
        """The newest step, None when there is none; a save still under way does not count."""
        return latest_step(self.run_dir)

    def save(
        self, step: int, state: Any, host: Mapping[str, Any], metrics: Mapping[str, float | None] | None = None
    ) -> None:
        """Copy ``state`` off the devices and write it in the background, after the save before this one has ended.

        state: may be donated as soon as this returns. step: larger than every saved step. host: JSON-able. metrics: of
        this step, for retention. Raises RunStopped when an earlier save failed (disk full).
        """
        self.drain()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise RunStopped(f"{self.directory / str(step)}: not saved: step {newest} is already there")
        finite = {name: v for name, v in (metrics or {}).items() if v is not None and math.isfinite(v)}
        body = {"step": step, "layout": layout(state), "host": dict(host), "metrics": finite, **self._facts}
        saving = self.directory / f"{step}{SAVING}"
        try:
            text = json.dumps(
                body, allow_nan=False
            )  # now: the loop changes what the host values hold while a thread writes
            saving.mkdir(exist_ok=True)
            self._at("write", step, saving)
            self._writer.save(saving / STATE, args=ocp.args.StandardSave(state))
        except Exception as error:
            raise RunStopped(f"{self.directory / str(step)}: cannot save: {first_line(error)}") from error
        self._pending = self._thread.submit(self._finish, step, text, saving)

    def _finish(self, step: int, text: str, saving: Path) -> None:
        """In the background: what follows Orbax's own writing. text: the manifest's body but for the files, as JSON."""
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        body = json.loads(text)
        check_leaves(saving, body["layout"])
        self._at("hash", step, saving)
        write_atomically(saving / MANIFEST, manifest_text(body | {"files": hash_files(saving)}))
        self._at("commit", step, saving)
        place = saving.with_name(str(step))
        saving.rename(place)
        if not self._recorded:
            record_saved(self.run_dir, step)
            self._recorded = True
        self._at("retain", step, place)
        self._retain()

    def _retain(self) -> None:
        """Remove what retention does not want; by a rename first, so that no half step ever bears a number."""
        steps = {step: self._metrics(step) for step in saved_steps(self.run_dir)}
        for step in steps.keys() - self.retention.kept(steps):
            place, doomed = self.directory / str(step), self.directory / f"{step}{DELETING}"
            with unread(place) as free:
                if free:  # else it goes with the next save
                    place.rename(doomed)
                    shutil.rmtree(doomed)

    def _metrics(self, step: int) -> dict[str, float | None]:
        if not self.retention.keep_best:
            return {}
        try:
            found: dict[str, float | None] = read_manifest(self.directory / str(step))["metrics"]
        except DamagedCheckpoint:
            return {}
        return found

    def restore(
        self, state: Any, step: int | None = None, *, verified: bool = False, donate: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """(state, host) of ``step`` (the newest when None), onto the shardings of ``state`` (arrays or their abstract).

        The mesh may differ from the one that saved. verified: its files were just hashed, don't again. donate: free the arrays of
        ``state`` before the step is read, so that the devices never hold two states.
        Raises DamagedCheckpoint, or InputError naming every leaf that is missing, extra or of another shape or dtype.
        """
        self.drain()
        place = find_step(self.run_dir, step)
        body = read_manifest(place) if verified else verify(place)
        remedy = "restore it with the configuration that saved it"
        check_layout(place, body["layout"], layout(state), remedy)
        target = abstract(state)
        if donate:
            _free(state)
        return read_state(place, target), body["host"]

    def drain(self) -> None:
        """Wait for the background save. Raises RunStopped when it failed: a lost save is never exit code 0."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise RunStopped(f"{self.directory}: a save failed: {first_line(error)}") from error

    def close(self) -> None:
        """Drain and end the thread. Raises RunStopped as `drain` does."""
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
    """Of a thread of this kind: it takes what a step leaves (hashing took a step's time from 80 to 130 ms on two cores)."""
    if sys.platform == "linux":  # elsewhere priorities belong to processes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
