"""Memory in HBM while a program runs, as the TPU compiler has assigned it.

``Compiled.memory_analysis().temp_size_in_bytes`` of a TPU program does not measure it: libtpu 0.0.42 reported 20.0 GiB
of temporaries and 1.4 GiB of arguments for a program that it had just accepted for a chip with 15.75 GiB. The number that
the compiler compares with its limit, and names in the message when memory is short, is the total of its memory usage
report, one of the files that it writes to the directory of ``xla_dump_to``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from rlhf_jax.errors import InputError

LARGEST = 6
"""How many temporaries are named."""


@dataclasses.dataclass(frozen=True)
class Assigned:
    """total: bytes of HBM a chip for arguments, new outputs, constants and temporaries, tiles filled up. largest: (operation
    and shape, bytes) of the temporaries that take the largest places; not all of them need be there at the same time."""

    total: int
    largest: list[tuple[str, int]]


def read_assigned(folder: Path) -> Assigned | None:
    """Read the files that the compiler wrote to ``folder`` for one program; return None when it stopped before it assigned memory.

    Raises InputError for a report whose format is not that of libtpu 0.0.42.
    """
    report, buffers = _only(folder, "memory-usage-report"), _only(folder, "buffer-assignment")
    if report is None or buffers is None:
        return None
    total = re.search(r"^Memory Space: default \(color=0\)\nTotal bytes: (\d+)", report, re.MULTILINE)
    if total is None:
        raise InputError("plan: libtpu's memory usage report names no total; is it libtpu 0.0.42?")
    return Assigned(int(total[1]), _largest(buffers, _only(folder, "") or ""))


def _only(folder: Path, kind: str) -> str | None:
    """Return the text of the newest file of a kind, named module_0881.jit_update.cl_933746096.after_optimizations-KIND.txt."""
    ending = f".after_optimizations{kind and '-'}{kind}.txt"
    files = sorted(file for file in folder.iterdir() if file.name.endswith(ending))
    return files[-1].read_text() if files else None


def _largest(buffers: str, program: str) -> list[tuple[str, int]]:
    """Return the largest temporaries in HBM. Values share places one after another; the first value in a place names it."""
    block = re.search(r"^allocation \d+: size \d+, preallocated-temp:\n((?: value: .*\n)*)", buffers, re.MULTILINE)
    if block is None:
        return []
    value = r" value: <\d+ ([^ {]+)\S* .*\(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])"
    places: dict[tuple[int, int], tuple[str, str]] = {}
    for name, size, offset, shape in re.findall(value, block[1]):
        places.setdefault((int(size), int(offset)), (name, shape))
    largest = sorted(places.items(), reverse=True)[:LARGEST]
    return [(f"temporary {_operation(name, program)} {shape}", size) for (size, _), (name, shape) in largest]


def _operation(name: str, program: str) -> str:
    """Return the end of the path that JAX gave the instruction; XLA's name for it when it has none."""
    match = re.search(rf'^ *(?:ROOT )?%?{re.escape(name)} = .*op_name="([^"]*)"', program, re.MULTILINE)
    return name if match is None else "/".join(match[1].split("/")[-2:])
