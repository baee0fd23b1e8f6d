"""Costs of a compiled program on one chip: operations, HBM traffic, collectives by kind and mesh axis.

XLA's own `cost_analysis` counts the body of a loop once. Here every loop counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter

import numpy as np

from rlhf_jax.plan.hlo import Array, Computation, Instruction, Module, trips
from rlhf_jax.plan.kernels import splash_cost

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BETWEEN = "between slices"
"""What stands for the mesh axes where a chip hands something to its host for the other slices."""
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "add-dependency", "custom-call", "domain"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass
class Cost:
    """The cost of a program on one chip.

    flops: operations of matrix products and kernels.
    hbm_bytes: bytes that instructions read and write.
    moved: bytes sent per (kind, mesh axes) of collective.
    counts: how many collectives ran, by the same keys.
    bounded, unknown: loops counted at their upper bound, and loops counted once because nothing bounds them.
    kernels: custom kernels that ran, by name.
    silent: those of the kernels that give no cost.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    moved: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    counts: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    bounded: Counter[int] = dataclasses.field(default_factory=Counter)
    unknown: int = 0
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    silent: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def moved_bytes(self) -> float:
        """Over the links between the chips of a slice."""
        return float(sum(sent for (_, axes), sent in self.moved.items() if axes != BETWEEN))


@dataclasses.dataclass(frozen=True)
class _Walk:
    module: Module
    axes: dict[str, int]
    cost: Cost
    channels: set[tuple[str, str, str, str]]
    decoding: int

    def computation(self, name: str, times: float, runners: tuple[str, ...] = (), fused: bool = False) -> None:
        """Count one computation.

        runners: the computations that are running, fusions left out; this one last.
        """
        runners = runners if fused else (*runners, name)
        body = self.module.computations[name]
        for instruction in body.values():
            self.instruction(name, body, instruction, times, runners, fused)

    def instruction(
        self, name: str, body: Computation, one: Instruction, times: float, runners: tuple[str, ...], fused: bool
    ) -> None:
        inner, inside = times, fused
        if one.opcode == "while":
            loop_trips = trips(self.module, body, one)
            inner = times * loop_trips.count
            if loop_trips.exact is None and not loop_trips.counted and not self.holds_another(one):
                inner = times * self.decoding
                self.cost.bounded[self.decoding] += 1
                loop_trips = dataclasses.replace(loop_trips, exact=True)
            if loop_trips.exact is False:
                self.cost.bounded[loop_trips.count] += 1
            self.cost.unknown += loop_trips.exact is None
        elif one.opcode == "fusion":
            inside = True
        for called in one.called():
            self.computation(called, inner, runners, inside)
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES and not (fused and self.again(runners, one, kind)):
            self.collective(name, body, one, kind, times)
        if one.opcode == "send":
            self.between(body, one, times)
        if one.opcode == "convolution":
            self.cost.flops += times * convolution_flops(body, one)
        elif one.opcode == "dot":
            self.cost.flops += times * dot_flops(body, one)
        elif one.opcode == "custom-call" and "tpu_custom_call" in one.attributes:
            self.kernel(body, one, times)
        if not fused:
            self.cost.hbm_bytes += times * hbm_bytes(self.module, body, one)

    def holds_another(self, loop: Instruction) -> bool:
        """Return whether a loop that nothing bounds has another of its kind in its body."""
        for name in loop.called():
            body = self.module.computations[name]
            for one in body.values():
                if (
                    one.opcode == "while"
                    and (loop_trips := trips(self.module, body, one)).exact is None
                    and not loop_trips.counted
                ):
                    return True
                if one.opcode != "fusion" and one.called() and self.holds_another(one):
                    return True
        return False

    def kernel(self, body: Computation, one: Instruction, times: float) -> None:
        """Count a Pallas kernel, which XLA cannot see into: `splash_cost` or the kernel itself gives its cost."""
        name = re.sub(r"[.\d]+$", "", one.name)
        self.cost.kernels[name] += int(times)
        operands = [array for operand in one.operands for array in body[operand].arrays]
        if (splash := splash_cost(name, operands, one.arrays)) is not None:
            self.cost.flops += times * splash[0]
            self.cost.hbm_bytes += times * splash[1]
            return
        match = re.search(r'"cost_estimate":(\{[^}]*\})', one.attributes)
        if match is None:
            self.cost.silent[name] += int(times)
            self.cost.hbm_bytes += times * sum(array.hbm for array in (*operands, *one.arrays))
            return
        estimate = json.loads(match[1])
        self.cost.flops += times * float(estimate.get("flops", 0))
        self.cost.hbm_bytes += times * float(estimate.get("bytes_accessed", 0))

    def again(self, runners: tuple[str, ...], one: Instruction, kind: str) -> bool:
        """Return whether a fusion has a collective that another fusion was counted for.

        The TPU compiler writes an overlapped collective as several fusions of one computation, with a copy in each: a fusion that
        starts it, those that compute meanwhile (perhaps in a loop), and one that ends it. The channel alone does not identify
        the collective: all late ones have channel 1.
        """
        channel = one.attribute("channel_id")
        if channel is None:
            return False
        same = (channel, kind, str(sorted((array.dtype, array.dims) for array in one.arrays)))
        if any((runner, *same) in self.channels for runner in runners):
            return True
        self.channels.add((runners[-1], *same))
        return False

    def collective(self, name: str, body: Computation, one: Instruction, kind: str, times: float) -> None:
        groups = group_of(one, self.axes)
        size = groups.size
        if size < 2:
            return
        operand_bytes = sum(array.bytes for operand in one.operands for array in body[operand].arrays)
        if kind == "all-reduce" and "all-reduce-scatter" in name:  # how the TPU compiler writes a reduce-scatter
            kind = "reduce-scatter"
        sent = {
            "all-gather": operand_bytes * (size - 1),
            "all-reduce": 2 * operand_bytes * (size - 1) / size,
            "collective-permute": operand_bytes,
        }.get(kind, operand_bytes * (size - 1) / size)
        self.count((kind, groups.axes), sent, times)

    def between(self, body: Computation, one: Instruction, times: float) -> None:
        """Count a transfer between slices: the TPU compiler writes such collectives as transfers to the host."""
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
        if match is None:
            return
        kind = match[1].lower().replace("_", "-")
        self.count((kind, BETWEEN), body[one.operands[0]].arrays[0].bytes, times)

    def count(self, key: tuple[str, str], sent: float, times: float) -> None:
        """Return the cost of a run of the program on one chip.

        axes: names and sizes of the mesh it was compiled for, in order.
        decoding: the most iterations of a loop whose end depends on computed values (until every row has ended).
        """
        self.cost.moved[key] = self.cost.moved.get(key, 0.0) + times * sent
        self.cost.counts[key] += int(times)


def count(module: Module, axes: dict[str, int], decoding: int = 1) -> Cost:
    """Return the cost of a run of the program on one chip.

    axes: names and sizes of the mesh it was compiled for, in order.
    decoding: the most iterations of a loop whose end depends on computed values (until every row has ended).
    """
    walk = _Walk(module, axes, Cost(), set(), decoding)
    walk.computation(module.entry, 1.0)
    return walk.cost


# ---- operations


def dot_flops(body: Computation, dot: Instruction) -> int:
    """Return 2 x elements of the result x contracted elements: [4, 8] x [8, 16] is 2 x 64 x 8 = 1024."""
    lhs = body[dot.operands[0]].arrays[0]
    contracted = [int(i) for i in re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")]
    return 2 * dot.arrays[0].elements * math.prod(lhs.dims[i] for i in contracted)


def convolution_flops(body: Computation, one: Instruction) -> int:
    """Return 2 x multiplications of real elements; a TPU writes every matrix product as a convolution.

    Along a spatial dimension only pairs (output, kernel position) that meet an element of the input count: a batched
    product is written with a dilated input, where most positions are holes.
    """
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", one.attribute("dim_labels") or "")
    assert labels is not None, f"convolution {one.name} without dim_labels"
    lhs, rhs = (body[operand].arrays[0].dims for operand in one.operands[:2])
    out = one.arrays[0].dims
    window = _window(one.attribute("window") or "", sum(label.isdigit() for label in labels[1]))
    pairs = 1
    for index, (size, stride, low, spread, kernel_spread, reverse) in enumerate(window):
        del reverse
        length, results = lhs[labels[1].index(str(index))], out[labels[3].index(str(index))]
        at = np.arange(results)[:, None] * stride + np.arange(size)[None] * kernel_spread - low
        pairs *= int(((at >= 0) & (at <= (length - 1) * spread) & (at % spread == 0)).sum())
    features = rhs[labels[2].index("i")] * out[labels[3].index("f")]
    batch = out[labels[3].index("b")]
    return 2 * pairs * features * batch


def _window(text: str, dimensions: int) -> list[tuple[int, int, int, int, int, bool]]:
    """Return (size, stride, padding before, input dilation, kernel dilation, reversed) of each spatial dimension."""

    def numbers(name: str, otherwise: str) -> list[str]:
        match = re.search(rf"{name}=([\d_x\-]+)", text)
        return match[1].split("x") if match else [otherwise] * dimensions

    sizes, strides, pads = numbers("size", "1"), numbers("stride", "1"), numbers("pad", "0_0")
    spread, kernel = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
    rows = zip(sizes, strides, pads, spread, kernel, strict=True)
    return [(int(s), int(t), int(p.split("_")[0]), int(a), int(b), False) for s, t, p, a, b in rows][:dimensions]


# ---- memory traffic


def hbm_bytes(module: Module, body: Computation, one: Instruction) -> int:
    """Return the bytes that an instruction reads from and writes to HBM.

    A slice reads the part that it takes, an update in place writes the part that it changes, and so does a fusion of them.
    """
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0
    operands = [body[name].arrays for name in one.operands if name in body]
    output_bytes = _hbm(one.arrays[:1] if one.opcode.endswith("-start") else one.arrays)
    if one.opcode == "dynamic-update-slice":
        return 2 * _hbm(operands[1])
    if one.opcode in _SLICES:
        return 2 * output_bytes
    if one.opcode == "fusion":
        inner = module.computations[one.called()[0]]
        return _fusion_reads(module, inner, operands) + _fusion_writes(inner, one)
    return output_bytes + sum(_hbm(arrays) for arrays in operands)


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.hbm for array in arrays)


def _fusion_reads(module: Module, inner: Computation, operands: list[tuple[Array, ...]]) -> int:
    total = 0
    for parameter in inner.values():
        if parameter.opcode != "parameter" or int(parameter.text) >= len(operands):
            continue
        whole = _hbm(operands[int(parameter.text)])
        total += min(whole, _read_of(module, inner, parameter)) if whole else 0
    return total


def _read_of(module: Module, inner: Computation, value: Instruction) -> int:
    """Return how many bytes of a value its users inside a fusion read."""
    total = 0
    for user in inner.values():
        if value.name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == value.name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _read_of(module, inner, user)
        elif user.opcode == "fusion":
            nested = module.computations[user.called()[0]]
            position = user.operands.index(value.name)
            inside = [
                parameter
                for parameter in nested.values()
                if parameter.opcode == "parameter" and int(parameter.text) == position
            ]
            total += sum(_read_of(module, nested, parameter) for parameter in inside)
        else:
            return sum(array.bytes for array in value.arrays)
    return total


def _fusion_writes(inner: Computation, one: Instruction) -> int:
    root = next(instruction for instruction in inner.values() if instruction.root)
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for output, array in zip(outputs, one.arrays, strict=False):
        while output.opcode == "bitcast" and output.operands[0] in inner:
            output = inner[output.operands[0]]
        if output.opcode == "dynamic-update-slice" and not array.near:
            total += sum(update.bytes for update in inner[output.operands[1]].arrays)
        else:
            total += array.hbm
    return total


# ---- who talks to whom


@dataclasses.dataclass(frozen=True)
class Group:
    """size: chips that take part in one collective. axes: the mesh axes along which they differ, "fsdp" or "data+fsdp"."""

    size: int
    axes: str


def group_of(one: Instruction, axes: dict[str, int]) -> Group:
    """Return the group of a collective instruction on a mesh with these axes."""
    if pairs := one.attribute("source_target_pairs"):
        ends = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs), int)
        return Group(2 if len(ends) else 1, _differing(ends, axes)) if len(ends) else Group(1, "")
    members = replica_groups(one.attributes, math.prod(axes.values()))
    return Group(members.shape[1], _differing(members, axes))


def _differing(members: np.ndarray, axes: dict[str, int]) -> str:
    """Return the mesh axes along which the members differ.

    members: int [groups, size], places in the mesh.
    """
    places = np.stack(np.unravel_index(members, tuple(axes.values())))  # [axes, groups, size]
    apart = (places != places[:, :, :1]).any(axis=(1, 2))
    return "+".join(name for name, differs in zip(axes, apart, strict=True) if differs) or "none"


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Read the attribute as int [groups, size], in any of XLA's three spellings.

    The spellings: '{{0,1},{2,3}}', '[2,2]<=[2,2]T(1,0)' and "mesh['a'=2,'b'=2] {'b'}" (groups along b).
    """
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", match[1])])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _permuted(match[2]).reshape(_numbers(match[1]))
    if match := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        order = match[2] or f"[{math.prod(sizes.values())}]"
        return _along(sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[3]), _permuted(order))
    return np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _permuted(text: str) -> np.ndarray:
    """Read '[2,4]T(1,0)' as 0 ... 7 in shape [2, 4], transposed, flat; or a plain list '0,2,1,3'."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        return np.array(_numbers(text))
    grid = _numbers(match[1])
    order = _numbers(match[2]) if match[2] else range(len(grid))
    return np.arange(math.prod(grid)).reshape(grid).transpose(order).reshape(-1)


def _along(sizes: dict[str, int], chosen: list[tuple[str, str, str]], ids: np.ndarray) -> np.ndarray:
    """Return groups along some axes of a mesh; 'a':(2)4 is the part of size 4 of axis a after a part of size 2."""
    dims: list[int] = []
    positions: list[int] = []
    for name, size in sizes.items():
        parts = [(int(before), int(part)) for axis, before, part in chosen if axis == name and part]
        if parts:
            before, part = parts[0]
            positions.append(len(dims) + 1)
            dims += [before, part, size // (before * part)]
        else:
            if any(axis == name for axis, _, _ in chosen):
                positions.append(len(dims))
            dims.append(size)
    order = [i for i in range(len(dims)) if i not in positions] + positions
    return ids.reshape(dims).transpose(order).reshape(-1, math.prod(dims[i] for i in positions))
