"""Named tensors on disk that are read window by window, and the safetensors reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.errors import InputError
from rlhf_jax.io.json_files import read_json
from rlhf_jax.io.layout import Window

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Shape, dtype and file of a tensor on disk. dtype: the format's name (F32, BF16, Q4_1)."""

    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint under Hugging Face's names and layouts.

    where: the file or directory, for messages. read: (name, window) -> the window as float16, bfloat16 or float32.
    readable: the stored dtypes that ``read`` supports.

    """

    where: str
    stored: Mapping[str, Stored]
    read: Callable[[str, Window], np.ndarray]
    readable: frozenset[str]


def open_safetensors(directory: Path) -> Tensors:
    """Open the tensors of a directory with model.safetensors, or with several files and an index; only headers are read.

    Raises InputError for missing or damaged files, and when files and index disagree.

    """
    file_names = _read_index(directory)
    files = {name: _open(directory / name) for name in sorted(set(file_names.values()))} if file_names else {}
    if not file_names:
        files = {SINGLE: _open(directory / SINGLE)}
    stored: dict[str, Stored] = {}
    for name, file in files.items():
        for tensor in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = file.get_slice(tensor)
            if tensor in stored:
                raise InputError(f"{directory}: {tensor} is in {stored[tensor].file} and in {name}; keep one")
            stored[tensor] = Stored(tuple(part.get_shape()), part.get_dtype(), name)
    if file_names and (
        wrong := sorted(n for n in file_names.keys() | stored.keys() if file_names.get(n) != _file(stored, n))
    ):
        raise InputError(
            f"{directory / INDEX}: does not agree with the files on {join_names(wrong)}; download both again"
        )

    def read(name: str, window: Window) -> np.ndarray:
        part: np.ndarray = files[stored[name].file].get_slice(name)[window]
        return part

    return Tensors(str(directory), stored, read, frozenset({"F32", "F16", "BF16"}))


def open_file(path: Path) -> Tensors:
    """Open the tensors of one safetensors file. Raises InputError for a missing or damaged file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    file = _open(path)
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    stored = {name: Stored(tuple(part.get_shape()), part.get_dtype(), path.name) for name, part in parts.items()}

    def read(name: str, window: Window) -> np.ndarray:
        part: np.ndarray = parts[name][window]
        return part

    return Tensors(str(path), stored, read, frozenset({"F32", "F16", "BF16"}))


def join_names(names: list[str], most: int = 8) -> str:
    """Join names for a message, at most ``most`` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def describe_mismatches(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describe stored tensors of another shape than ``expected`` or of an unsupported dtype; [] when there are none."""
    stored, wrong = tensors.stored, []
    shared = sorted(expected.keys() & stored.keys())
    if reshaped := [
        f"{n} {_format_shape(stored[n].shape)}, not {_format_shape(expected[n])}"
        for n in shared
        if stored[n].shape != expected[n]
    ]:
        wrong.append(f"of another shape than the configuration says: {join_names(reshaped)}")
    if retyped := [f"{n} ({stored[n].dtype})" for n in shared if stored[n].dtype not in tensors.readable]:
        wrong.append(
            f"of a dtype that is not read: {join_names(retyped)} (read: {', '.join(sorted(tensors.readable))})"
        )
    return wrong


def _format_shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _file(stored: Mapping[str, Stored], name: str) -> str | None:
    return stored[name].file if name in stored else None


def _read_index(directory: Path) -> dict[str, str]:
    """Read {tensor: file} from the index; {} when there is a single file.

    Raises InputError for a damaged index and for missing files.

    """
    if (directory / INDEX).is_file():
        file_names = read_json(directory / INDEX).get("weight_map")
        if (
            not isinstance(file_names, dict)
            or not file_names
            or not all(isinstance(f, str) for f in file_names.values())
        ):
            raise InputError(f"{directory / INDEX}: weight_map must map tensor names to file names")
        if outside := sorted({f for f in file_names.values() if Path(f).name != f}):
            raise InputError(
                f"{directory / INDEX}: weight_map names {join_names(outside)}, which is not in this directory"
            )
        if absent := sorted({f for f in file_names.values() if not (directory / f).is_file()}):
            raise InputError(f"{directory}: {join_names(absent)} of {INDEX} is not there; download the missing files")
        return file_names
    if (directory / SINGLE).is_file():
        return {}
    names = sorted(path.name for path in directory.iterdir())
    if "adapter_model.safetensors" in names:
        raise InputError(f"{directory}: holds adapter weights without adapter_config.json; give the whole adapter")
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        raise InputError(
            f"{directory}: only pickled weights ({join_names(pickled, 3)}), which can run code and are never read; convert: "
            "transformers' from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} here; give a directory with safetensors weights")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download it again") from error
