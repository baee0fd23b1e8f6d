"""Checkpoints of a run: Orbax underneath, strict on top.

A step is a directory ``RUN_DIR/checkpoints/STEP`` with two items: ``state`` (a pytree of jax arrays, typed PRNG keys
included) and ``host`` (JSON: what the loop keeps on the host, such as the data position, and the layout of the state).

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
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhf_jax.run.provenance import fingerprint_path, is_complete_step
from rlhf_jax.types import InputError, Params, RunStopped

Layout = dict[str, list[Any]]
"""{'params/embed/embedding': [[V, D], 'float32']}: every leaf of a state by its path."""


def checkpoint_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir).absolute() / "checkpoints"


def saved_steps(run_dir: str | Path) -> list[int]:
    """The complete steps of a run, ascending; [] when there is none. Reads directory names only."""
    directory = checkpoint_dir(run_dir)
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and is_complete_step(directory / name))


def latest_step(run_dir: str | Path) -> int | None:
    """The newest complete step, None when there is none."""
    steps = saved_steps(run_dir)
    return steps[-1] if steps else None


def fingerprint(run_dir: str | Path, step: int) -> str:
    """sha256 over the sorted (relative path, sha256 of the file) of a step: says which very files a later run read.

    Two saves of equal numbers differ in it (Orbax writes time stamps).
    """
    return fingerprint_path(checkpoint_dir(run_dir) / str(step))


def layout(state: Any) -> Layout:
    """Shape and dtype of every leaf by its path: fields, keys and indices joined by '/'."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for path, x in leaves}


def abstract(state: Any) -> Any:
    """The ShapeDtypeStruct tree of a state, with its shardings (the first device for a leaf that has none)."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first), state)


def _refuse_other_layout(place: Path, saved: Layout, wanted: Layout) -> None:
    """Raises InputError naming every missing, extra, reshaped or re-typed leaf (the first eight of them)."""
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - saved.keys())]
    wrong += [f"{name} is not part of this run's state" for name in sorted(saved.keys() - wanted.keys())]
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name] != wanted[name]:
            wrong.append(f"{name} is {_words(saved[name])}, this run has {_words(wanted[name])}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{place}: {'; '.join(wrong[:8])}{more}; restore it with the configuration that saved it")


def _words(entry: list[Any]) -> str:
    return f"{entry[1]}[{','.join(map(str, entry[0]))}]"


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
            raise RunStopped(f"{self.directory / str(step)}: cannot save: {_first_line(error)}") from error
        if not saved:
            raise RunStopped(
                f"{self.directory / str(step)}: not saved: step {self._manager.latest_step()} is already there"
            )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, host) of ``step`` (the newest when None), onto the shardings of ``state`` (arrays or their abstract).

        The mesh may differ from the one that saved. Raises InputError naming every leaf that is missing, extra or of
        another shape or dtype.
        """
        step, place = _resolve(self.run_dir, step)
        saved = _read_host(place)
        _refuse_other_layout(place, saved["layout"], layout(state))
        return _read_state(place, abstract(state)), saved["host"]

    def close(self) -> None:
        """Wait for the background saves. Raises RunStopped when one failed: a lost save is never exit code 0."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise RunStopped(f"{self.directory}: a save failed: {_first_line(error)}") from error
        finally:
            self._manager.close()


def restore_params(
    run_dir: str | Path, step: int | None = None, *, subtree: str = "params", like: Any = None
) -> Params:
    """One subtree of a saved state, for the next stage; the rest (optimizer, keys) is not read.

    step: the newest when None. subtree: where it lives in the state, 'params' or for instance 'policy/params'.
    like: the tree to restore onto (arrays or ShapeDtypeStructs with shardings), checked leaf by leaf; None: every
    array whole on the first device, with its saved shape and dtype, as a nested dict.
    Raises InputError when there is no such checkpoint or subtree, or when ``like`` does not fit.
    """
    step, place = _resolve(run_dir, step)
    saved = {k[len(subtree) + 1 :]: v for k, v in _read_host(place)["layout"].items() if k.startswith(subtree + "/")}
    if not saved:
        raise InputError(f"{place}: the saved state has no {subtree!r}; name the subtree that holds the parameters")
    if like is None:
        like = _as_dict(saved)
    _refuse_other_layout(place, saved, layout(like))
    target: Any = abstract(like)
    for key in reversed(subtree.split("/")):
        target = {key: target}
    read = _read_state(place, target)
    for key in subtree.split("/"):
        read = read[key]
    params: Params = read
    return params


def _as_dict(saved: Layout) -> Params:
    """{'a/b': [[2], 'float32']} -> {'a': {'b': ShapeDtypeStruct([2], float32)}} on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct: Any = jax.ShapeDtypeStruct
    tree: Params = {}
    for path, (shape, dtype) in saved.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = struct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
    return tree


def _resolve(run_dir: str | Path, step: int | None) -> tuple[int, Path]:
    steps = saved_steps(run_dir)
    if not steps:
        raise InputError(f"{checkpoint_dir(run_dir)}: no complete checkpoint here; give a run directory that saved one")
    if step is not None and step not in steps:
        raise InputError(f"{checkpoint_dir(run_dir)}: no checkpoint of step {step}; there are {steps}")
    step = steps[-1] if step is None else step
    return step, checkpoint_dir(run_dir) / str(step)


def _read_host(place: Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        saved: dict[str, Any] = reader.restore(place / "host", args=ocp.args.JsonRestore())
    return saved


def _read_state(place: Path, target: Any) -> Any:
    """The part of the saved state that ``target`` (abstract) names. Raises InputError when the files are damaged."""
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(place / "state", args=arguments)
    except Exception as error:
        raise InputError(
            f"{place}: damaged checkpoint ({_first_line(error)}); delete this directory to go on from an older one"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
