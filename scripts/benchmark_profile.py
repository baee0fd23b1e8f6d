"""A profile of a row of benchmark.py on this CPU, operation by operation of the compiled programs.

    python scripts/benchmark_profile.py --row=sft
    python scripts/benchmark_profile.py --row=ppo_ragged --program=jit_update --top=40

Runs our side of the row once under JAX's profiler, after it is warm, and prints for each program of at least a hundredth of
the time: seconds from its first operation to its last, in matrix products, in other operations, and with none under way
(products that XLA hands to Eigen do not show while they run); then its operations of one shape together, the longest first.
Of operations that run at the same time each gets an equal part.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from benchmark import FOLDER, MALLOC, NAMES
from benchmark_rows import SHAPES
from jax.profiler import ProfileData

from rlhf_jax.errors import InputError
from rlhf_jax.launch.command import run_command
from rlhf_jax.plan import hlo
from rlhf_jax.plan.cost import dot_flops

RUNNERS = ("while", "call", "conditional")
"""Their events span those of what they run."""


@dataclass(frozen=True)
class Event:
    """An operation that ran. program: number of the compiled one; times in seconds."""

    program: int
    module: str
    operation: str
    begin: float
    end: float


@dataclass
class Line:
    """Operations of one kind and shape: seconds, how often, operations of matrix products."""

    seconds: float = 0.0
    calls: int = 0
    flops: float = 0.0


def shares(spans: Sequence[tuple[float, float]]) -> tuple[list[float], float]:
    """Return (the time of each span, shared equally with those that run beside it; the time when none runs).

    (0, 2) and (1, 4), then (5, 6): 1.5, 2.5, 1 and 1.
    """
    edges = sorted(
        [(begin, 1, index) for index, (begin, _) in enumerate(spans)]
        + [(end, 0, index) for index, (_, end) in enumerate(spans)]
    )
    actual, idle, running, before = [0.0] * len(spans), 0.0, set[int](), edges[0][0]
    for current, begins, index in edges:
        for value in running:
            actual[value] += (current - before) / len(running)
        idle += 0.0 if running else current - before
        before = current
        if begins:
            running.add(index)
        else:
            running.discard(index)
    return actual, idle


def events(trace: Path) -> Iterator[Event]:
    """Read the events of a directory that jax.profiler wrote."""
    for plane in ProfileData.from_file(str(next(trace.rglob("*.xplane.pb")))).planes:
        for line in plane.lines:
            for one in line.events:
                stats = dict(one.stats)
                if "hlo_op" in stats and not one.name.startswith("end:"):
                    names = (stats["program_id"], stats["hlo_module"], stats["hlo_op"])
                    yield Event(*names, one.start_ns / 1e9, (one.start_ns + one.duration_ns) / 1e9)


def described(module: hlo.Module, body: hlo.Computation, one: hlo.Instruction) -> tuple[str, float]:
    """Return (name without its number, result and operands; operations of the matrix products in it)."""
    flops = float(dot_flops(body, one)) if one.opcode == "dot" else 0.0
    if one.opcode == "fusion":
        inner = [module.computations[name] for name in one.called()]
        flops += sum(dot_flops(body, value) for body in inner for value in body.values() if value.opcode == "dot")
    operands = [array for name in one.operands if name in body for array in body[name].arrays]
    result, settings = (", ".join(str(list(a.dims)) for a in arrays) for arrays in (one.arrays, operands))
    return f"{re.sub(r'[.0-9]+$', '', one.name)} {result} <- {settings}"[:110], flops


def summary(actual: Sequence[Event], text: str, top: int) -> Iterator[str]:
    """Return the printed lines of one program, given its compiled text."""
    module = hlo.parse_module(text)
    where = {one.name: (body, one) for body in module.computations.values() for one in body.values()}
    reference_values = [e for e in actual if e.operation in where and where[e.operation][1].opcode not in RUNNERS]
    parts, idle = shares([(e.begin, e.end) for e in reference_values])
    table: dict[str, Line] = {}
    for event, part in zip(reference_values, parts, strict=True):
        name, flops = described(module, *where[event.operation])
        line = table.setdefault(name, Line())
        line.seconds, line.calls, line.flops = line.seconds + part, line.calls + 1, line.flops + flops
    products = sum(line.seconds for line in table.values() if line.flops)
    total, flops = sum(parts) + idle, sum(line.flops for line in table.values())
    yield (
        f"{actual[0].module}: {total:.2f} s, {products:.2f} in matrix products, {sum(parts) - products:.2f} in others, "
        f"{idle:.2f} between; {flops / total / 1e9:.0f} GFLOP/s over all"
    )
    for name, line in sorted(table.items(), key=lambda item: -item[1].seconds)[:top]:
        rate = f"{line.flops / line.seconds / 1e9:5.0f} GFLOP/s" if line.flops and line.seconds else " " * 13
        yield f"  {line.seconds:7.3f} s {line.calls:6d} x {rate}  {name}"


def profile() -> int:
    """Run a row under the profiler and print where its time goes. Raises InputError when the row does not run."""
    settings = flags.FLAGS
    with tempfile.TemporaryDirectory() as directory:
        trace, dump = Path(directory, "trace"), Path(directory, "dump")
        message = os.environ.get("XLA_FLAGS", "")
        options = {"XLA_FLAGS": f"{message} --xla_dump_to={dump} --xla_dump_hlo_as_text", "GLIBC_TUNABLES": MALLOC}
        arguments = [sys.executable, str(FOLDER / "benchmark_jax.py"), settings.row, settings.shape, str(trace)]
        completions = subprocess.run(arguments, env=os.environ | options, stdout=subprocess.DEVNULL, check=False)
        if completions.returncode:
            raise InputError(
                f"--row={settings.row}: ended with code {completions.returncode} (its own message is above)"
            )
        programs: dict[int, list[Event]] = {}
        for event in events(trace):
            programs.setdefault(event.program, []).append(event)
        spent = {number: sum(e.end - e.begin for e in ran) for number, ran in programs.items()}
        for number, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            if seconds < 0.01 * sum(spent.values()) or settings.program not in ("", programs[number][0].module):
                continue
            text = next(dump.glob(f"module_{number:04d}.*cpu_after_optimizations.txt")).read_text()
            print("\n".join(summary(programs[number], text, settings.top)), flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_enum("row", "sft", NAMES, "Of benchmark.py.")
    flags.DEFINE_enum("shape", "smollm2", list(SHAPES), "Of the model.")
    flags.DEFINE_string("program", "", "Of this name alone, as jit_update.")
    flags.DEFINE_integer("top", 25, "Lines a program.", lower_bound=1)
    sys.exit(run_command(profile, sys.argv, __doc__ or "", ("row", "shape", "program", "top")))
