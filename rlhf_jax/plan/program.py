"""What the compiler made of a lowered program, and keeping it: a plan that is made again compiles nothing."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Program:
    """text: of the compiled program ("" when it did not fit). outputs: bytes a chip, donated buffers that come back
    included; aliased: of these. temporaries, code: bytes a chip. seconds: that it took to compile. problem: what the
    compiler said when it ran out of HBM, "" otherwise."""

    text: str
    outputs: int
    aliased: int
    temporaries: int
    code: int
    seconds: float
    problem: str = ""


def digest(lowered: Any) -> str:
    """sha256 of a lowered program."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compile_program(lowered: Any, keep: Path | None = None, where: str = "") -> Program:
    """Of ``jit(...).lower(...)``. keep: a directory of programs that were compiled before, by what was lowered, ``where``
    (the slice and how its devices lie in the mesh) and the versions of the compiler; a new one is added."""
    if keep is None:
        return _compile(lowered)
    versions = [jax.__version__, *(_version(name) for name in ("jaxlib", "libtpu"))]
    key = hashlib.sha256("\n".join([digest(lowered), where, *versions]).encode()).hexdigest()
    file = keep / f"{key}.json.gz"
    if file.exists():
        with gzip.open(file, "rt") as stream:
            return Program(**json.load(stream))
    program = _compile(lowered)
    keep.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    with gzip.open(unfinished, "wt", compresslevel=1) as stream:
        json.dump(dataclasses.asdict(program), stream)
    unfinished.rename(file)
    return program


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _compile(lowered: Any) -> Program:
    began = time.monotonic()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program("", 0, 0, 0, 0, time.monotonic() - began, str(error))
    seconds = time.monotonic() - began
    stats = executable.memory_analysis()
    if stats is None:
        raise InputError("plan: the compiler reports no memory for these devices")
    sizes = (stats.output_size_in_bytes, stats.alias_size_in_bytes, stats.temp_size_in_bytes)
    return Program(executable.as_text(), *sizes, stats.generated_code_size_in_bytes, seconds)
