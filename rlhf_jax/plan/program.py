"""Results of compiling a lowered program, and their store: a plan that is made again compiles nothing."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import sys
import tempfile
import time
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.plan.buffers import read_assigned
from rlhf_jax.storage.files import field, parse_object, read_bytes

FORMAT = 3
"""Of a program that is kept."""


@dataclasses.dataclass(frozen=True)
class Program:
    """text: of the compiled program ("" when it did not fit). arguments, outputs: bytes a chip, tiles filled up, donated
    buffers that come back included; aliased: of these. temporaries, code: bytes a chip. seconds: that it took to compile.
    problem: what the compiler said when it ran out of HBM, "" otherwise. largest: (what, bytes) of the largest temporaries,
    of a TPU."""

    text: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    seconds: float
    problem: str = ""
    largest: list[tuple[str, int]] = dataclasses.field(default_factory=list)


def digest(lowered: Any) -> str:
    """Return the sha256 of a lowered program."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compile_program(lowered: Any, keep: Path | None = None, where: str = "", *, tpu: bool = False) -> Program:
    """Compile ``jit(...).lower(...)``.

    keep: a directory of compiled programs, looked up by the lowered program, ``where`` (the slice and how its devices are
    arranged in the mesh) and the versions of the compiler; a new program is added.
    tpu: whether it is compiled for a TPU, see `plan.buffers`.
    """
    if keep is None:
        return _compile(lowered, tpu)
    versions = [str(FORMAT), jax.__version__, *(_version(name) for name in ("jaxlib", "libtpu"))]
    key = hashlib.sha256("\n".join([digest(lowered), where, *versions]).encode()).hexdigest()
    file = keep / f"{key}.json.gz"
    if os.path.lexists(file):
        try:
            return _read_stored(file)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr)
    program = _compile(lowered, tpu)
    _write_stored(file, program)
    return program


def _write_stored(file: Path, program: Program) -> None:
    """Write the program and the sha256 of its description; atomically."""
    text = json.dumps(dataclasses.asdict(program), sort_keys=True)
    content = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "program": text})
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(unfinished, "wt", compresslevel=1) as stream:
            stream.write(content)
        unfinished.rename(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _read_stored(file: Path) -> Program:
    """Read a stored program. Raises InputError for a file that `_write_stored` did not write or that is damaged."""
    again = "the program is compiled again"
    try:
        text = gzip.decompress(read_bytes(file, again)).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: damaged ({error}); {again}") from error
    content = parse_object(text, str(file), again)
    inner = field(content, "program", str, str(file), again)
    if hashlib.sha256(inner.encode()).hexdigest() != content.get("sha256"):
        raise InputError(f"{file}: not what was written; {again}")
    values = parse_object(inner, str(file), again)
    try:
        return Program(**values | {"largest": [(name, size) for name, size in values["largest"]]})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: written by another version; {again}") from error


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _compile(lowered: Any, tpu: bool) -> Program:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"compiler_options": {"xla_dump_to": folder}} if tpu else {}
        executable, problem = None, ""
        try:
            executable = lowered.compile(**options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            problem = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        seconds = time.monotonic() - began
        assigned = read_assigned(Path(folder)) if tpu else None
    largest = [] if assigned is None else assigned.largest
    if executable is None:
        return Program("", 0, 0, 0, 0, 0, seconds, problem, largest)
    stats = executable.memory_analysis()
    if stats is None or (tpu and assigned is None):
        raise InputError("plan: the compiler reports no memory for these devices")
    arguments, outputs, aliased = (getattr(stats, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias"))
    temporaries = stats.temp_size_in_bytes if assigned is None else assigned.total - arguments - (outputs - aliased)
    code = stats.generated_code_size_in_bytes
    return Program(executable.as_text(), arguments, outputs, aliased, temporaries, code, seconds, "", largest)
