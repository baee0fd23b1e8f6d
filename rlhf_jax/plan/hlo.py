"""Reading the text of a compiled program: computations, instructions, shapes, how often a loop runs.

The text is XLA's HLO (https://openxla.org/xla/operation_semantics); shapes in it are those of one device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type. near: kept in the chip's on-core memory (memory space 1), not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    near: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Unpadded; 0 for tokens and other types that hold no numbers."""
        width = 1 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0)
        return math.ceil(self.elements * width)

    @property
    def hbm(self) -> int:
        """``bytes`` that are in HBM."""
        return 0 if self.near else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = type opcode(operands), attributes. arrays: of the type, tuples flattened. text: what is in the brackets."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    text: str
    root: bool

    def called(self) -> list[str]:
        """Return the computations that the instruction runs (``to_apply`` of a reduction is not one of them)."""
        names = re.findall(r"(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)", self.attributes)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return names

    def attribute(self, name: str) -> str | None:
        """Return the value of ``name=value`` up to the next comma outside brackets."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if match is None:
            return None
        return next(_split(self.attributes[match.end() :]), "")


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """computations by name; entry: the name of the one that runs. partitions: devices of the program."""

    computations: Mapping[str, Computation]
    entry: str
    partitions: int


def arrays_of(text: str) -> tuple[Array, ...]:
    """Return the arrays of a type: 'f32[2,3]{1,0:T(8,128)S(1)}' or a tuple of such."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        near = re.search(r"S\((\d+)\)", layout or "")
        arrays.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), near is not None and near[1] != "0"))
    return tuple(arrays)


def _split(text: str) -> Iterator[str]:
    """Split at the commas that are outside of every bracket and string."""
    depth, start, quoted = 0, 0, False
    for at, char in enumerate(text):
        if char == '"' and text[at - 1] != "\\":
            quoted = not quoted
        elif not quoted and char in "([{":
            depth += 1
        elif not quoted and char in ")]}":
            depth -= 1
            if depth < 0:
                yield text[start:at].strip()
                return
        elif not quoted and char == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    if text[start:].strip():
        yield text[start:].strip()


def _closing(text: str, opening: int) -> int:
    """Find where the bracket at ``opening`` closes."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced brackets in HLO: {text[opening : opening + 80]}")


_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    source = match[3]
    end = _closing(source, 0) + 1 if source.startswith("(") else source.index(" ")
    kind, source = source[:end], source[end:].lstrip()
    opening = source.index("(")
    closing = _closing(source, opening)
    inside = source[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    attributes = source[closing + 1 :].lstrip(", ")
    return Instruction(match[2], source[:opening], arrays_of(kind), operands, attributes, inside, match[1] is not None)


def parse_module(text: str) -> Module:
    """Parse the text of an HLO module. Raises ValueError for text that is no HLO module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    partitions = re.search(r"num_partitions=(\d+)", text[:20000])
    # The attributes of a kernel may go on over several lines, at the margin: instructions are indented.
    joined = re.sub(r"\n(?=\"|\}\}, )", "", re.sub(r"/\*.*?\*/", "", text))
    for line in joined.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> ", line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


@dataclasses.dataclass(frozen=True)
class Trips:
    """The number of times that a loop runs.

    exact: False when it may stop earlier (``count`` is then the most), None when not known.
    counted: whether a counter ends it (its limit a number of the run), and not a value that the body computes.
    """

    count: int
    exact: bool | None
    counted: bool = True


def trips(module: Module, computation: Computation, loop: Instruction) -> Trips:
    """Return the trips of a ``while``: XLA's number, else the bound in its condition "counter < constant" with a constant start.

    Loops of `jax.lax.scan` are exact; a condition that asks for more than the counter (have all rows ended?) gives an
    upper bound; any other loop counts once and is reported as unknown.
    """
    if match := re.search(r'known_trip_count["=:{\s]+n["\s:]+"?(\d+)', loop.attributes):
        return Trips(int(match[1]), True)
    condition = module.computations[_one(loop, "condition")]
    start = computation[loop.operands[0]]
    counted = False
    for owner, compare in _within(module, condition):
        if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "GT"):
            continue
        sides = compare.operands if compare.attribute("direction") == "LT" else compare.operands[::-1]
        counter, bound = (_origin(module, owner, side, condition) for side in sides)
        limit = _constant(bound) if bound else None
        if limit is None and bound is not None and bound.opcode == "get-tuple-element":
            limit = _constant(_element(computation, start, bound))
        if counter is None or counter.opcode != "get-tuple-element" or limit is None:
            sides_given = [side for side in (counter, bound) if side is not None and side.opcode == "get-tuple-element"]
            counted = counted or (len(sides_given) == 2 and all(side.arrays[0].dims == () for side in sides_given))
            continue
        first = _constant(_element(computation, start, counter)) or 0
        step = _step(module, module.computations[_one(loop, "body")], counter)
        callers = [one for one in condition.values() if any(module.computations[c] is owner for c in one.called())]
        exact = compare.root and all(caller.root for caller in callers)
        return Trips(max(0, math.ceil((limit - first) / step)), exact)
    return Trips(1, None, counted)


def _one(loop: Instruction, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.\-]+)", loop.attributes)
    assert match is not None, f"a while without {key}"
    return match[1]


def _within(module: Module, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Yield every instruction of a computation and of the fusions inside it."""
    for instruction in computation.values():
        yield computation, instruction
        if instruction.opcode in ("fusion", "call"):
            for name in instruction.called():
                yield from _within(module, module.computations[name])


def _origin(module: Module, owner: Computation, name: str, outer: Computation) -> Instruction | None:
    """Trace where a value comes from: through copies and through the parameter of a fusion of ``outer``."""
    source = owner.get(name)
    while source is not None and source.opcode in ("copy", "bitcast", "convert") and source.operands:
        source = owner.get(source.operands[0])
    if source is not None and source.opcode == "parameter" and owner is not outer:
        for caller in outer.values():
            if any(module.computations[called] is owner for called in caller.called()):
                return _origin(module, outer, caller.operands[int(source.text)], outer)
    return source


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.text):
        return None
    return int(instruction.text)


def _element(computation: Computation, start: Instruction, element: Instruction) -> Instruction | None:
    """Return the initial value of the loop's tuple at the index of a get-tuple-element."""
    index = int(element.attribute("index") or 0)
    if start.opcode != "tuple" or index >= len(start.operands):
        return None
    source = computation.get(start.operands[index])
    while source is not None and source.opcode in ("copy", "bitcast") and source.operands:
        source = computation.get(source.operands[0])
    return source


def _step(module: Module, body: Computation, counter: Instruction) -> int:
    """Return by how much the body advances the counter; 1 when that cannot be read (`jax.lax` loops count by one)."""
    root = next(instruction for instruction in body.values() if instruction.root)
    index = int(counter.attribute("index") or 0)
    if root.opcode != "tuple" or index >= len(root.operands):
        return 1
    added = _origin(module, body, root.operands[index], body)
    if added is None or added.opcode != "add":
        return 1
    return next((value for name in added.operands if (value := _constant(body.get(name)))), 1)
