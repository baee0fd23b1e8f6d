"""What lies in HBM while a program runs, as the TPU compiler has assigned it.

``Compiled.memory_analysis().temp_size_in_bytes`` of a TPU program is no measure of it: libtpu 0.0.42 was seen to say 20.0 GiB
of temporaries and 1.4 GiB of arguments of a program that it had just accepted for a chip with 15.75 GiB. What it compares
with its limit, and names in the message when there is too little, is the total of its memory usage report, one of the files
that it writes where ``xla_dump_to`` says.
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
    """From the files that the compiler left in ``folder`` for one program; None when it gave up before it assigned anything.
    Raises InputError for a report that reads otherwise than libtpu 0.0.42's."""
    report, buffers = _only(folder, "memory-usage-report"), _only(folder, "buffer-assignment")
    if report is None or buffers is None:
        return None
    total = re.search(r"^Memory Space: default \(color=0\)\nTotal bytes: (\d+)", report, re.MULTILINE)
    if total is None:
        raise InputError("plan: libtpu's memory usage report names no total; is it libtpu 0.0.42?")
    return Assigned(int(total[1]), _largest(buffers, _only(folder, "") or ""))


def _only(folder: Path, what: str) -> str | None:
    """The newest such file. They are called module_0881.jit_update.cl_933746096.after_optimizations-WHAT.txt."""
    ending = f".after_optimizations{what and '-'}{what}.txt"
    found = sorted(file for file in folder.iterdir() if file.name.endswith(ending))
    return found[-1].read_text() if found else None


def _largest(buffers: str, program: str) -> list[tuple[str, int]]:
    """Of the temporaries' allocation in HBM, whose values share places one after another; the first in a place names it."""
    block = re.search(r"^allocation \d+: size \d+, preallocated-temp:\n((?: value: .*\n)*)", buffers, re.MULTILINE)
    if block is None:
        return []
    value = r" value: <\d+ ([^ {]+)\S* .*\(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])"
    places: dict[tuple[int, int], tuple[str, str]] = {}
    for name, size, offset, shape in re.findall(value, block[1]):
        places.setdefault((int(size), int(offset)), (name, shape))
    taken = sorted(places.items(), reverse=True)[:LARGEST]
    return [(f"temporary {_operation(name, program)} {shape}", size) for (size, _), (name, shape) in taken]


def _operation(name: str, program: str) -> str:
    """The end of the path that JAX gave the instruction; XLA's name for it when it has none."""
    found = re.search(rf'^ *(?:ROOT )?%?{re.escape(name)} = .*op_name="([^"]*)"', program, re.MULTILINE)
    return name if found is None else "/".join(found[1].split("/")[-2:])
