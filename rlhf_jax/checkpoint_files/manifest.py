"""The format of checkpoints on disk, with verification and reading. `rundir` writes them, `io` loads models from them.

``RUN_DIR/checkpoints/STEP`` contains ``state/``, a pytree of arrays (Orbax), and ``manifest.json``: size and sha256 of
every file, ``layout`` (shape and dtype of every leaf by its path), ``host`` (the loop's state on the host), metrics,
hashes of configuration and inputs, versions, and a sha256 of the manifest itself. A step is written as ``STEP.saving`` and
renamed last: a directory called STEP was complete once, so any difference from its manifest is damage. Orbax alone restores
a flipped bit, counts an empty directory as a step and casts dtypes silently.

"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.storage.files import parse_object
from rlhf_jax.storage.hashing import hash_file
from rlhf_jax.storage.names import CHECKPOINTS, MANIFEST, STATE

Layout = dict[str, list[Any]]
"""{'params/embed/embedding': [[V, D], 'float32']}: every leaf of a state by its path."""


class DamagedCheckpoint(InputError):
    """A checkpoint differs from what was saved: a flipped bit, or a truncated, empty or missing file."""

    def __init__(self, place: Path, problem: str) -> None:
        remedy = "give the command of that run again (it falls back to an older step), or put a copy back"
        super().__init__(f"{place}: damaged checkpoint: {problem}; {remedy}")
        self.problem = problem


def checkpoint_dir(run_dir: str | Path) -> Path:
    """Return the directory of the checkpoints of a run."""
    return Path(run_dir).absolute() / CHECKPOINTS


def list_checkpoints(run_dir: str | Path) -> list[str]:
    """List the names in ``RUN_DIR/checkpoints``; [] when nothing of that name exists.

    Raises InputError when something exists there and cannot be listed (no permission, a link to a disk that is not
    mounted): steps that cannot be seen are not steps that do not exist.
    """
    directory = checkpoint_dir(run_dir)
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError as error:
        if not directory.is_symlink():
            return []
        raise _dangling_link(directory) from error
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not os.path.lexists(directory):
            return []  # a file is where a directory above it should be
        raise unreadable(directory, error) from error


def _dangling_link(link: Path) -> InputError:
    return InputError(
        f"{link}: a link to {os.readlink(link)}, which is not there; mount that disk, or put the link right"
    )


def unreadable(place: Path, error: OSError) -> InputError:
    """Make the error for a file or directory of a run that exists and that the file system cannot read."""
    return InputError(
        f"{place}: cannot be read ({error.strerror}); make it readable (permissions, mounted disks), or use another run_dir"
    )


def saved_steps(run_dir: str | Path) -> list[int]:
    """List the steps of a run, ascending; [] when there is none. Reads directory names only: `verify` looks inside.

    Raises InputError as `list_checkpoints` does.
    """
    return sorted(int(name) for name in list_checkpoints(run_dir) if is_step(name))


def is_step(name: str) -> bool:
    """Return whether a name below ``checkpoints`` is that of a step: plain digits as Python writes them."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def steps_among(names: Collection[str]) -> list[int]:
    """List the complete steps of a run, ascending, from its file names: those with a manifest, which is copied last."""
    parts = [name.split("/") for name in names]
    return sorted(int(p[1]) for p in parts if len(p) == 3 and (p[0], p[2]) == (CHECKPOINTS, MANIFEST) and is_step(p[1]))


def latest_step(run_dir: str | Path) -> int | None:
    """Return the newest step, None when there is none."""
    steps = saved_steps(run_dir)
    return steps[-1] if steps else None


def find_step(run_dir: str | Path, step: int | None = None) -> Path:
    """Return the directory of a step, the newest when None. Raises InputError when there is no such step."""
    steps = saved_steps(run_dir)
    if not steps:
        raise InputError(f"{checkpoint_dir(run_dir)}: no complete checkpoint here; give a run directory that saved one")
    if step is not None and step not in steps:
        raise InputError(f"{checkpoint_dir(run_dir)}: no checkpoint of step {step}; there are {steps}")
    return checkpoint_dir(run_dir) / str(steps[-1] if step is None else step)


def layout(state: Any) -> Layout:
    """Return shape and dtype of every leaf by its path: fields, keys and indices joined by '/'."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for path, x in leaves}


def check_layout(place: Path, saved: Layout, expected: Layout, remedy: str) -> None:
    """Check the leaves of a saved state. Raises InputError naming missing, extra, reshaped or re-typed ones (the first eight)."""
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - saved.keys())]
    wrong += [f"{name} is not expected" for name in sorted(saved.keys() - expected.keys())]
    for name in sorted(saved.keys() & expected.keys()):
        if saved[name] != expected[name]:
            wrong.append(f"{name} is {_format_leaf(saved[name])}, expected {_format_leaf(expected[name])}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{place}: {'; '.join(wrong[:8])}{more}; {remedy}")


# ---- the manifest


def hash_files(place: Path) -> dict[str, dict[str, Any]]:
    """Return {path relative to ``place``: {"bytes", "sha256"}} of every file below it but the manifest."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path != place / MANIFEST)
    return {
        path.relative_to(place).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files
    }


def manifest_text(body: Mapping[str, Any]) -> str:
    """Format ``manifest.json``: the body and the sha256 of the body, so that damage to the manifest is detected too."""
    return json.dumps({"sha256": _hash_body(body), "manifest": body}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(place: Path) -> dict[str, Any]:
    """Read the body of a step's manifest: step, files, layout, host, metrics, config, inputs, versions.

    Raises DamagedCheckpoint when it is missing or differs from what was written, InputError when the file system cannot
    read it. The other files are not checked.

    """
    file = place / MANIFEST
    if _size(place, MANIFEST) is None:
        raise DamagedCheckpoint(place, f"{MANIFEST} is missing")
    with _reading(file):
        stored = file.read_bytes()
    try:
        content = parse_object(stored.decode("utf-8"), MANIFEST)
        body: dict[str, Any] = content["manifest"]
        same = content["sha256"] == _hash_body(body) and str(body["step"]) == place.name
        usable = _is_complete(body)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # InputError and UnicodeDecodeError are ValueErrors
        raise DamagedCheckpoint(place, f"{MANIFEST} is not readable ({first_line(error)})") from error
    if not same or not usable:
        raise DamagedCheckpoint(place, f"{MANIFEST} is not what was written")
    return body


def _is_complete(body: dict[str, Any]) -> bool:
    """Return whether a manifest with a valid hash has the fields that its readers need."""
    files_valid = all(
        "\0" not in name and type(entry["bytes"]) is int and type(entry["sha256"]) is str
        for name, entry in body["files"].items()
    )
    leaves_valid = all(
        type(dtype) is str and all(type(size) is int and size >= 0 for size in shape)
        for shape, dtype in body["layout"].values()
    )
    return files_valid and leaves_valid and isinstance(body["host"], dict) and isinstance(body.get("metrics", {}), dict)


def verify(place: Path) -> dict[str, Any]:
    """Hash every file of a step again and return the body of its manifest.

    Raises DamagedCheckpoint naming the first bad file, InputError when the file system cannot read one.
    Paths of a manifest never leave ``place``: '..' and absolute ones count as damage.

    """
    body = read_manifest(place)
    for name, expected in body["files"].items():
        file = place / name
        if ".." in Path(name).parts or not file.resolve().is_relative_to(place.resolve()):
            raise DamagedCheckpoint(place, f"{MANIFEST} names {name!r}, which lies elsewhere")
        size = _size(place, name)
        if size is None:
            raise DamagedCheckpoint(place, f"{name} is missing")
        if size != expected["bytes"]:
            raise DamagedCheckpoint(place, f"{name} has {size} bytes, {expected['bytes']} were written")
        with _reading(file):
            same = hash_file(file) == expected["sha256"]
        if not same:
            raise DamagedCheckpoint(place, f"{name} has another sha256 than what was written")
    return body


def _size(place: Path, name: str) -> int | None:
    """Return the bytes of a file of a step; None when there is no such file. Raises InputError when that cannot be seen."""
    if place.is_symlink() and not place.exists():
        raise _dangling_link(place)
    try:
        status = (place / name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(place / name, error) from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise InputError when the file system fails while a file is read: that is not damage."""
    try:
        yield
    except OSError as error:
        raise unreadable(file, error) from error


def _hash_body(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


# ---- the arrays


def read_state(place: Path, target: Any) -> Any:
    """Read the part of ``state`` that ``target`` (abstract, with shardings) names. Raises InputError when Orbax cannot."""
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(place / STATE, args=arguments)
    except Exception as error:
        raise InputError(f"{place}: cannot read the arrays ({first_line(error)}); use an older step") from error


def check_leaves(place: Path, expected: Layout) -> None:
    """Check that the arrays in ``state`` are those of ``expected``, by opening each as a reader does.

    Orbax reports success when it has written to another place or has not merged its files. A random key is stored as its
    bits, so only its presence is checked. Raises RunStopped naming the leaves.

    """
    try:
        tree: Any = ocp.PyTreeCheckpointHandler().metadata(place / STATE).tree
    except Exception as error:
        raise RunStopped(f"{place}: the arrays are not there after saving ({first_line(error)})") from error
    stored = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(entry.shape), str(entry.dtype)]
        for path, entry in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(entry, "shape")
    }
    wrong = [
        name
        for name, entry in expected.items()
        if name not in stored or (stored[name] != entry and not entry[1].startswith("key<"))
    ]
    if wrong:
        raise RunStopped(
            f"{place}: {len(wrong)} of {len(expected)} arrays are not there after saving ({wrong[0]}, ...)"
        )


def read_arrays(place: Path) -> dict[str, np.ndarray]:
    """Read every array of a step onto the host, by its path; a random key as its bits.

    For comparisons of runs: the devices that saved the step need not be available.

    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved: Any = reader.metadata(place / STATE).item_metadata
        onto_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.tree)
        tree = reader.restore(place / STATE, args=ocp.args.PyTreeRestore(restore_args=onto_host))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(_unwrap_key(x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _unwrap_key(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def first_line(error: BaseException) -> str:
    """Return the first line of the text of an exception, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _format_leaf(entry: list[Any]) -> str:
    return f"{entry[1]}[{','.join(map(str, entry[0]))}]"
