"""Compiling a phase ahead of time and measuring what came out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlhf_jax.plan.chips import Chip
from rlhf_jax.plan.cost import Cost, count
from rlhf_jax.plan.hlo import Module, parse_module
from rlhf_jax.plan.memory import leaf_bytes, tree_bytes
from rlhf_jax.plan.phases import PlannedPhase
from rlhf_jax.plan.program import Program, compile_program, digest


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM a chip. resident: by kind, all that stays there during the run. batch: arguments that come and go.
    outputs: new ones (donated buffers are not). tiles: what arguments take beyond their numbers, because a chip's memory holds
    whole tiles. temporaries, code: as XLA reports them."""

    resident: dict[str, int]
    batch: int
    outputs: int
    tiles: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(self.resident.values()) + self.batch + self.outputs + self.tiles + self.temporaries + self.code


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

    phase: PlannedPhase
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


def compile_phase(phase: PlannedPhase, mesh: Mesh, chip: Chip | None, keep: Path | None = None) -> Report:
    """Lower and compile ``phase`` for the devices of ``mesh`` and measure it. chip: None = local devices. keep: see
    `compile_program`."""
    usable = None if chip is None else chip.hbm_usable
    lowered = phase.function.lower(*phase.arguments)
    where = f"{mesh.devices.flat[0].device_kind} {mesh.shape} {[device.id for device in mesh.devices.flat]}"
    program = compile_program(lowered, keep, where, tpu=mesh.devices.flat[0].platform == "tpu")
    sha256, seconds = digest(lowered), program.seconds
    if program.problem:
        largest = _largest(phase, program.largest)
        return Report(phase, mesh.size, sha256, seconds, None, None, None, usable, program.problem, largest)
    module = parse_module(program.text)
    cost = count(module, dict(mesh.shape), phase.decoding)
    memory = _memory(phase, program, module)
    times = None if chip is None else roofline(cost, chip)
    largest = _largest(phase, program.largest or [("temporaries of the program", program.temporaries)])
    return Report(phase, mesh.size, sha256, seconds, memory, cost, times, usable, "", largest)


def roofline(cost: Cost, chip: Chip) -> Seconds:
    """Return the operations, HBM bytes and sent bytes over the chip's peak rates (all links busy)."""
    return Seconds(cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, cost.moved_bytes / chip.ici_bandwidth)


def _memory(phase: PlannedPhase, program: Program, module: Module) -> Memory:
    resident = {kind: tree_bytes(tree) for kind, tree in phase.resident.items()}
    ids = {id(leaf) for leaf in jax.tree.leaves(dict(phase.resident))}
    batch = sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(phase.arguments) if id(leaf) not in ids)
    outputs = max(0, program.outputs - program.aliased)
    parameters = [one for one in module.computations[module.entry].values() if one.opcode == "parameter"]
    tiles = max(0, program.arguments - sum(array.bytes for one in parameters for array in one.arrays))
    return Memory(resident, batch, outputs, tiles, program.temporaries, program.code)


def _largest(phase: PlannedPhase, temporaries: list[tuple[str, int]], most: int = 6) -> list[tuple[str, int]]:
    """Return the largest buffers in HBM: temporaries and arrays that stay."""
    buffers = list(temporaries)
    for kind, tree in phase.resident.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            buffers.append((f"{kind} {jax.tree_util.keystr(path, simple=True, separator='/')}", leaf_bytes(leaf)))
    return sorted(buffers, key=lambda pair: -pair[1])[:most]
