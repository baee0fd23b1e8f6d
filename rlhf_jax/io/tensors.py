"""Named tensors on disk that are read a part at a time, and the safetensors reader."""

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
    """A tensor as it lies on disk. dtype: as the format calls it (F32, BF16, Q4_1). file: where it lies."""

    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A checkpoint's tensors under Hugging Face's names and layouts.

    where: the file or directory, for messages. read: (name, window) -> the window as float16, bfloat16 or float32.
    readable: the stored dtypes that ``read`` understands.
    """

    where: str
    stored: Mapping[str, Stored]
    read: Callable[[str, Window], np.ndarray]
    readable: frozenset[str]


def open_safetensors(directory: Path) -> Tensors:
    """The tensors of a directory with model.safetensors, or with several files and an index.

    Nothing but headers is read here. Raises InputError: no such files, files and index disagree, damaged file.
    """
    places = _places(directory)
    files = {name: _open(directory / name) for name in sorted(set(places.values()))} if places else {}
    if not places:
        files = {SINGLE: _open(directory / SINGLE)}
    stored: dict[str, Stored] = {}
    for name, file in files.items():
        for tensor in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = file.get_slice(tensor)
            if tensor in stored:
                raise InputError(f"{directory}: {tensor} is in {stored[tensor].file} and in {name}; keep one")
            stored[tensor] = Stored(tuple(part.get_shape()), part.get_dtype(), name)
    if places and (wrong := sorted(n for n in places.keys() | stored.keys() if places.get(n) != _file(stored, n))):
        raise InputError(f"{directory / INDEX}: does not agree with the files on {listed(wrong)}; download both again")

    def read(name: str, window: Window) -> np.ndarray:
        part: np.ndarray = files[stored[name].file].get_slice(name)[window]
        return part

    return Tensors(str(directory), stored, read, frozenset({"F32", "F16", "BF16"}))


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file. Raises InputError: no such file, damaged file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    file = _open(path)
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    stored = {name: Stored(tuple(part.get_shape()), part.get_dtype(), path.name) for name, part in parts.items()}

    def read(name: str, window: Window) -> np.ndarray:
        part: np.ndarray = parts[name][window]
        return part

    return Tensors(str(path), stored, read, frozenset({"F32", "F16", "BF16"}))


def listed(names: list[str], most: int = 8) -> str:
    """Names for a message, at most ``most`` of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def wrong_kinds(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What to say of stored tensors whose shape is another than ``expected`` or whose dtype is not read; [] for none."""
    stored, wrong = tensors.stored, []
    both = sorted(expected.keys() & stored.keys())
    if reshaped := [
        f"{n} {_words(stored[n].shape)}, not {_words(expected[n])}" for n in both if stored[n].shape != expected[n]
    ]:
        wrong.append(f"of another shape than the configuration says: {listed(reshaped)}")
    if retyped := [f"{n} ({stored[n].dtype})" for n in both if stored[n].dtype not in tensors.readable]:
        wrong.append(f"of a dtype that is not read: {listed(retyped)} (read: {', '.join(sorted(tensors.readable))})")
    return wrong


def _words(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _file(stored: Mapping[str, Stored], name: str) -> str | None:
    return stored[name].file if name in stored else None


def _places(directory: Path) -> dict[str, str]:
    """{tensor: file} of the index; {} when one file holds everything."""
    if (directory / INDEX).is_file():
        places = read_json(directory / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
            raise InputError(f"{directory / INDEX}: weight_map must map tensor names to file names")
        if outside := sorted({f for f in places.values() if Path(f).name != f}):
            raise InputError(f"{directory / INDEX}: weight_map names {listed(outside)}, which is not in this directory")
        if absent := sorted({f for f in places.values() if not (directory / f).is_file()}):
            raise InputError(f"{directory}: {listed(absent)} of {INDEX} is not there; download the missing files")
        return places
    if (directory / SINGLE).is_file():
        return {}
    names = sorted(path.name for path in directory.iterdir())
    if "adapter_model.safetensors" in names:
        raise InputError(f"{directory}: holds adapter weights without adapter_config.json; give the whole adapter")
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        raise InputError(
            f"{directory}: only pickled weights ({listed(pickled, 3)}), which can run code and are never read; convert: "
            "transformers' from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} here; give a directory with safetensors weights")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download it again") from error
