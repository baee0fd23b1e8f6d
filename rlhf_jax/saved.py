"""What a checkpoint of ours is on disk, and how it is read. `run` writes them, `io` loads models from them.

``RUN_DIR/checkpoints/STEP`` has two items: ``state``, a pytree of arrays (Orbax), and ``host``, JSON with what the loop
keeps on the host and the ``layout`` of the state: shape and dtype of every leaf by its path. Reading is strict: Orbax
counts an empty directory as a step and casts a leaf of another dtype silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhf_jax.types import InputError

Layout = dict[str, list[Any]]
"""{'params/embed/embedding': [[V, D], 'float32']}: every leaf of a state by its path."""


def checkpoint_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir).absolute() / "checkpoints"


def is_complete_step(step_dir: Path) -> bool:
    """Whether both items were committed."""
    parts = (step_dir / "state" / "_METADATA", step_dir / "host" / "metadata")
    return all(part.is_file() and part.stat().st_size > 0 for part in parts)


def saved_steps(run_dir: str | Path) -> list[int]:
    """The complete steps of a run, ascending; [] when there is none. Reads directory names only."""
    directory = checkpoint_dir(run_dir)
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and is_complete_step(directory / name))


def latest_step(run_dir: str | Path) -> int | None:
    """The newest complete step, None when there is none."""
    steps = saved_steps(run_dir)
    return steps[-1] if steps else None


def find_step(run_dir: str | Path, step: int | None = None) -> Path:
    """The directory of a complete step, the newest when None. Raises InputError when there is no such step."""
    steps = saved_steps(run_dir)
    if not steps:
        raise InputError(f"{checkpoint_dir(run_dir)}: no complete checkpoint here; give a run directory that saved one")
    if step is not None and step not in steps:
        raise InputError(f"{checkpoint_dir(run_dir)}: no checkpoint of step {step}; there are {steps}")
    return checkpoint_dir(run_dir) / str(steps[-1] if step is None else step)


def layout(state: Any) -> Layout:
    """Shape and dtype of every leaf by its path: fields, keys and indices joined by '/'."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for path, x in leaves}


def refuse_other_layout(place: Path, saved: Layout, wanted: Layout, remedy: str) -> None:
    """Raises InputError naming every missing, extra, reshaped or re-typed leaf (the first eight of them)."""
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - saved.keys())]
    wrong += [f"{name} is not expected" for name in sorted(saved.keys() - wanted.keys())]
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name] != wanted[name]:
            wrong.append(f"{name} is {_words(saved[name])}, expected {_words(wanted[name])}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{place}: {'; '.join(wrong[:8])}{more}; {remedy}")


def read_host(place: Path) -> dict[str, Any]:
    """The ``host`` item of a step: {"host": ..., "layout": Layout}. Raises InputError when it is damaged."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            found: dict[str, Any] = reader.restore(place / "host", args=ocp.args.JsonRestore())
    except Exception as error:
        raise InputError(_damaged(place, error)) from error
    if not isinstance(found, dict) or "layout" not in found:
        raise InputError(_damaged(place, KeyError("layout")))
    return found


def read_state(place: Path, target: Any) -> Any:
    """The part of the ``state`` item that ``target`` (abstract, with shardings) names. Raises InputError when damaged."""
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(place / "state", args=arguments)
    except Exception as error:
        raise InputError(_damaged(place, error)) from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _damaged(place: Path, error: BaseException) -> str:
    return f"{place}: damaged checkpoint ({first_line(error)}); delete this directory to use an older one"


def _words(entry: list[Any]) -> str:
    return f"{entry[1]}[{','.join(map(str, entry[0]))}]"
