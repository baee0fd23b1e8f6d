"""Compiling a phase ahead of time and measuring what came out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlhf_jax.plan.analytic import leaf_bytes, tree_bytes
from rlhf_jax.plan.chips import Chip
from rlhf_jax.plan.cost import Cost, count
from rlhf_jax.plan.hlo import parse_module
from rlhf_jax.plan.phases import Phase
from rlhf_jax.plan.program import Program, compile_program, digest


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM a chip. resident: by kind, all that stays there during the run. batch: arguments that come and go.
    outputs: new ones (donated buffers are not). temporaries, code: as XLA reports them."""

    resident: dict[str, int]
    batch: int
    outputs: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(self.resident.values()) + self.batch + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Seconds:
    """The least time that a chip needs for its operations, its memory traffic, its share of the communication."""

    compute: float
    hbm: float
    ici: float

    @property
    def bound(self) -> float:
        """The longest of the three: they may overlap, none can be shortened."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def limit(self) -> str:
        """Which one that is."""
        return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Report:
    """A phase on a slice. memory, cost, seconds: None when the compiler itself ran out of HBM; ``problem`` says so then.
    largest: (what, bytes) of the largest buffers a chip. sha256: of the lowered program. chips: in the slice."""

    phase: Phase
    chips: int
    sha256: str
    compile_seconds: float
    memory: Memory | None
    cost: Cost | None
    seconds: Seconds | None
    usable: float | None
    problem: str
    largest: list[tuple[str, int]]

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a program may use; True for local devices, whose memory is not known."""
        return self.memory is not None and (self.usable is None or self.memory.peak <= self.usable)

    @property
    def utilisation(self) -> float | None:
        """ESTIMATE: model FLOPs over what the chips could do in ``seconds.bound``."""
        if self.seconds is None or not self.seconds.bound or self.cost is None or not self.cost.flops:
            return None
        return self.phase.flops / self.chips / self.cost.flops * self.seconds.compute / self.seconds.bound

    @property
    def tokens_per_second(self) -> float | None:
        """ESTIMATE, a chip: if the longest of the three times were all."""
        if self.seconds is None or not self.seconds.bound:
            return None
        return self.phase.tokens / self.chips / self.seconds.bound


def compile_phase(phase: Phase, mesh: Mesh, chip: Chip | None, keep: Path | None = None) -> Report:
    """Lower and compile ``phase`` for the devices of ``mesh`` and measure it. chip: None = local devices. keep: see
    `compile_program`."""
    usable = None if chip is None else chip.hbm_usable
    lowered = phase.function.lower(*phase.arguments)
    where = f"{mesh.devices.flat[0].device_kind} {mesh.shape} {[device.id for device in mesh.devices.flat]}"
    program = compile_program(lowered, keep, where)
    sha256, seconds = digest(lowered), program.seconds
    if program.problem:
        problem, buffers = out_of_memory(program.problem)
        known = buffers + _largest(phase)
        return Report(phase, mesh.size, sha256, seconds, None, None, None, usable, problem, known)
    cost = count(parse_module(program.text), dict(mesh.shape), phase.decoding)
    memory = _memory(phase, program)
    times = None if chip is None else roofline(cost, chip)
    return Report(phase, mesh.size, sha256, seconds, memory, cost, times, usable, "", _largest(phase, memory))


def roofline(cost: Cost, chip: Chip) -> Seconds:
    """Operations, HBM bytes and sent bytes over the chip's peak rates (all links busy)."""
    return Seconds(cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, cost.moved_bytes / chip.ici_bandwidth)


def _memory(phase: Phase, program: Program) -> Memory:
    resident = {kind: tree_bytes(tree) for kind, tree in phase.resident.items()}
    ids = {id(leaf) for leaf in jax.tree.leaves(dict(phase.resident))}
    batch = sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(phase.arguments) if id(leaf) not in ids)
    outputs = max(0, program.outputs - program.aliased)
    return Memory(resident, batch, outputs, program.temporaries, program.code)


def _largest(phase: Phase, memory: Memory | None = None, most: int = 6) -> list[tuple[str, int]]:
    """The largest things in HBM: temporaries as one, and arrays that stay."""
    found = [] if memory is None else [("temporaries of the program", memory.temporaries)]
    for kind, tree in phase.resident.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found.append((f"{kind} {jax.tree_util.keystr(path, simple=True, separator='/')}", leaf_bytes(leaf)))
    return sorted(found, key=lambda pair: -pair[1])[:most]


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> tuple[str, list[tuple[str, int]]]:
    """(the first line, [(operation and shape, bytes)]) of XLA's report that a program needs more HBM than there is. When it
    lists no buffers, how large the temporaries are together."""
    lines = message.strip().splitlines()
    first = lines[0].removeprefix("RESOURCE_EXHAUSTED: ")
    buffers = []
    if whole := re.search(r"HLO temporaries \(([\d.]+)([BKMGT])\)", first):
        buffers.append(("temporaries of the program", int(float(whole[1]) * _UNITS[whole[2]])))
    for block in re.split(r"\n\s*(?=\d+\. Size: )", message)[1:]:
        size = re.match(r"\d+\. Size: ([\d.]+)([BKMGT])", block)
        shape, operation = re.search(r"Shape: (\S+)", block), re.search(r'op_name="([^"]*)"', block)
        if size:
            named = f"{operation[1] if operation else 'unnamed'} {shape[1].split('{')[0] if shape else ''}".strip()
            buffers.append((named, int(float(size[1]) * _UNITS[size[2]])))
    return first, buffers[:6]
