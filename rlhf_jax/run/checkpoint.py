"""Checkpoints of a run: Orbax underneath, strict on top.

What a step is on disk and how it is read: `rlhf_jax.saved`.

What Orbax leaves to its caller and is done here: an empty or half directory does not count as a step; a leaf of
another dtype is refused (Orbax casts it silently); a save that Orbax would skip is an error; saves run in the
background and are always drained before the program ends (an undrained save is lost with exit code 0).
What is NOT done: Orbax keeps no content checksums, so a flipped bit on disk goes unseen; compare ``fingerprint`` with
a recorded one where that matters.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhf_jax.run.provenance import fingerprint_path
from rlhf_jax.saved import (
    checkpoint_dir,
    find_step,
    first_line,
    is_complete_step,
    latest_step,
    layout,
    read_host,
    read_state,
    refuse_other_layout,
)
from rlhf_jax.types import RunStopped


def fingerprint(run_dir: str | Path, step: int) -> str:
    """sha256 over the sorted (relative path, sha256 of the file) of a step: says which very files a later run read.

    Two saves of equal numbers differ in it (Orbax writes time stamps).
    """
    return fingerprint_path(checkpoint_dir(run_dir) / str(step))


def abstract(state: Any) -> Any:
    """The ShapeDtypeStruct tree of a state, with its shardings (the first device for a leaf that has none)."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first), state)


def _set_aside(step_dir: Path) -> None:
    """Get an incomplete step out of Orbax's way (it would skip every save up to that step), losing nothing."""
    if not any(step_dir.iterdir()):
        step_dir.rmdir()
        return
    aside = step_dir.with_name(f"{step_dir.name}.incomplete")
    step_dir.rename(aside)
    print(f"warning: {step_dir}: not a complete checkpoint; moved to {aside.name}", file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run, open for saving: a context manager that drains the background saves when it closes.

    Opening tidies what a killed process left: temporary directories, and step directories that were never completed.
    """

    def __init__(self, run_dir: str | Path, keep: int) -> None:
        """keep: how many of the newest steps stay on disk, >= 1."""
        self.run_dir = Path(run_dir).absolute()
        self.directory = checkpoint_dir(run_dir)
        if jax.process_index() == 0 and self.directory.is_dir():
            for entry in self.directory.iterdir():
                if entry.name.isdigit() and not is_complete_step(entry):
                    _set_aside(entry)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest complete step, None when there is none; a save still under way does not count."""
        return latest_step(self.run_dir)

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Copy ``state`` off the devices and write it in the background.

        state: may be donated as soon as this returns. step: larger than every saved step. host: JSON-able.
        Raises RunStopped when an earlier save failed (disk full).
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), host=ocp.args.JsonSave({"host": dict(host), "layout": layout(state)})
        )
        try:
            saved = self._manager.save(step, args=arguments)
        except Exception as error:
            raise RunStopped(f"{self.directory / str(step)}: cannot save: {first_line(error)}") from error
        if not saved:
            raise RunStopped(
                f"{self.directory / str(step)}: not saved: step {self._manager.latest_step()} is already there"
            )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, host) of ``step`` (the newest when None), onto the shardings of ``state`` (arrays or their abstract).

        The mesh may differ from the one that saved. Raises InputError naming every leaf that is missing, extra or of
        another shape or dtype.
        """
        place = find_step(self.run_dir, step)
        saved = read_host(place)
        remedy = "restore it with the configuration that saved it"
        refuse_other_layout(place, saved["layout"], layout(state), remedy)
        return read_state(place, abstract(state)), saved["host"]

    def close(self) -> None:
        """Wait for the background saves. Raises RunStopped when one failed: a lost save is never exit code 0."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise RunStopped(f"{self.directory}: a save failed: {first_line(error)}") from error
        finally:
            self._manager.close()
