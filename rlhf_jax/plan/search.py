"""The search of a plan: the nearest change that makes a phase fit, and the best of many settings."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import AXES, ActivationConstraint, MeshConfig
from rlhf_jax.plan.chips import GIB, Chip
from rlhf_jax.plan.compiled import Report, compile_phase
from rlhf_jax.plan.memory import tree_bytes
from rlhf_jax.plan.phases import PlannedPhase
from rlhf_jax.plan.report import rank, seconds_a_token

Remat = bool | Literal["cheap"]


@dataclasses.dataclass(frozen=True)
class Keys:
    """The names of the configs in the planned file, with their scopes.

    remat: name of the config that has it.
    unbound: the binding that a key needs before it has an effect, by its name here.
    """

    mesh: str = "MeshConfig"
    batch: str = "BatchConfig"
    slots: str = "SlotConfig"
    remat: str = "ModelConfig"
    unbound: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The settings that a search may change.

    rows: of a batch (PPO: prompts in flight).
    slots: completions that are decoded at a time, 0 = all.
    remat: as in ModelConfig, None = as configured.
    """

    mesh: MeshConfig
    rows: int
    microbatches: int
    remat: Remat | None = None
    slots: int = 0
    keys: Keys = dataclasses.field(default=Keys(), compare=False, repr=False)

    def bindings(self, than: Candidate) -> str:
        """Return the bindings that lead from ``than`` to this candidate, as gin text."""
        keys, first = self.keys, dict(self.keys.unbound)
        axes = ("data", "fsdp", "tensor")
        mesh = {axis: getattr(self.mesh, axis) for axis in axes if getattr(self.mesh, axis) != getattr(than.mesh, axis)}
        changes: dict[str, dict[str, Any]] = {"mesh": mesh, "batch": {}, "remat": {}, "slots": {}}
        if self.rows != than.rows:
            changes["batch"]["batch_size"] = self.rows
        if self.microbatches != than.microbatches:
            changes["batch"]["microbatches"] = self.microbatches
        if self.remat != than.remat:
            changes["remat"]["remat"] = self.remat
        if self.slots != than.slots:
            changes["slots"]["slots"] = self.slots
        lines = []
        for of, values in changes.items():
            lines += [first[of]] if values and of in first else []
            lines += [f"{getattr(keys, of)}.{name} = {value!r}" for name, value in values.items()]
        return ", ".join(lines) or "as configured"


REMATS: tuple[Remat, ...] = (False, "cheap", True)
"""From none to all."""


Build = Callable[[Candidate], tuple[Mesh, list[PlannedPhase]]]
"""A candidate as a mesh and its phases. Raises InputError for one that does not divide."""


def nearest(
    start: Candidate, remat: Remat, minibatches: int, sampling: bool = False, shards: int = 1
) -> Iterable[Candidate]:
    """Yield changes from small to large: recompute cheap operations, recompute blocks, more microbatches, fewer slots, fewer rows.

    remat: the recomputation in use.
    minibatches: into which rows divide before microbatches.
    sampling: whether slots would help.
    shards: over which the rows of a microbatch, and slots, must still divide.
    """
    for more in REMATS[REMATS.index(remat) + 1 :]:
        start = dataclasses.replace(start, remat=more)
        yield start
    fewest = start.rows // minibatches
    microbatches = start.microbatches
    while microbatches * 2 <= fewest and fewest % (microbatches * 2 * shards) == 0:
        microbatches *= 2
        yield dataclasses.replace(start, microbatches=microbatches)
    if sampling:
        for slots in (fewer for fewer in _fewer_slots(start) if fewer % shards == 0):
            yield dataclasses.replace(start, slots=slots)
    rows = start.rows
    while rows % 2 == 0 and (rows // 2) % (start.microbatches * minibatches * shards) == 0:
        rows //= 2
        yield dataclasses.replace(start, rows=rows)


def _fewer_slots(start: Candidate) -> list[int]:
    """Return a half and a quarter of the slots in use."""
    current = start.slots or start.rows
    return [current // part for part in (2, 4) if current % part == 0]


def variations(
    start: Candidate, chips: int, heads: int, minibatches: int, *, remat: Remat, sampling: bool = False
) -> list[Candidate]:
    """Return the variations of ``start``, without itself: mesh shapes x microbatches x rows x recomputation x slots.

    In mesh shapes tensor is a power of two that divides the key/value heads, and fsdp takes the remaining chips.
    remat: the recomputation as configured. sampling: whether to vary slots.
    """
    tensors = [2**i for i in range(6) if heads % 2**i == 0 and chips % 2**i == 0]
    splits = sorted({int(start.microbatches * 2.0**i) for i in range(-2, 4) if start.microbatches * 2.0**i >= 1})
    slots = [start.slots, *(_fewer_slots(start) if sampling else [])]
    candidates = []
    remats = (start.remat, *(other for other in REMATS if other != remat))
    for tensor, microbatches, rows, deep, slot in itertools.product(
        tensors, splits, (start.rows, start.rows * 2), remats, slots
    ):
        mesh = dataclasses.replace(start.mesh, data=1, fsdp=chips // tensor, tensor=tensor)
        mesh = start.mesh if _same(mesh, start.mesh, chips) else mesh
        shards = chips // tensor
        divides = rows % shards == 0 and rows % (microbatches * minibatches) == 0 and (slot or rows) % shards == 0
        if divides and rows // minibatches // microbatches >= shards:
            changed: dict[str, Any] = {
                "mesh": mesh,
                "rows": rows,
                "microbatches": microbatches,
                "remat": deep,
                "slots": slot,
            }
            candidates.append(dataclasses.replace(start, **changed))
    return [one for one in candidates if one != start]


def _same(mesh: MeshConfig, configured: MeshConfig, chips: int) -> bool:
    """Return whether ``configured`` is ``mesh`` with one axis to be filled up (-1)."""
    sizes = {axis: getattr(configured, axis) for axis in AXES}
    remaining = chips // math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: remaining if size == -1 else size for axis, size in sizes.items()}
    return all(getattr(mesh, axis) == size for axis, size in filled.items())


SLACK = 1.2
"""A candidate whose `analytic_bytes` are more than this times what there is is not compiled."""


def analytic_bytes(phases: Iterable[PlannedPhase]) -> int:
    """Estimate the bytes that the phases need, a chip, without compiling (docs/tpu.md gives the accuracy)."""
    return max(phase.analytic for phase in phases)


def repair(
    build: Build, start: Candidate, wrong: list[Report], chip: Chip, remat: Remat, minibatches: int, most: int
) -> str:
    """Describe in a sentence the nearest change that makes all phases fit. Compiles at most ``most`` candidates."""
    names = {report.phase.name for report in wrong}
    mesh, phases = build(start)
    resident = max(tree_bytes(dict(phase.resident)) for phase in phases)
    if resident > chip.hbm_usable:
        chips = wrong[0].chips * resident / chip.hbm_usable
        return f"what stays in HBM alone is more than a chip has: take a slice of at least {2 ** math.ceil(math.log2(chips))} chips"
    if most < 1:
        return "not looked for (--plan_repairs)"
    attempts = 0
    shards = ActivationConstraint(mesh).parts("act_batch")
    for candidate in nearest(start, remat, minibatches, "generate" in names, shards):
        if attempts == most:
            break
        try:
            mesh, phases = build(candidate)
        except InputError:  # rows that are not a multiple of GRPO's samples
            continue
        if analytic_bytes(phases) > SLACK * chip.hbm_usable:
            continue
        attempts += 1
        if all(compile_phase(phase, mesh, chip).fits for phase in phases if phase.name in names):
            return f"it fits with {candidate.bindings(start)}"
    return (
        f"none of recomputation, microbatches and rows makes it fit ({attempts} changes compiled, the others need too much by "
        "the analytic sum): take a larger slice"
    )


def promising(build: Build, candidates: Iterable[Candidate], chip: Chip, most: int) -> list[Candidate]:
    """Select the first ``most`` candidates that may fit by `analytic_bytes`.

    Fewer microbatches a row come first (weights are read less often); each kind (mesh, recomputation, slots) gets one
    candidate before any gets a second.
    """
    ranked = sorted(candidates, key=lambda one: (one.microbatches / one.rows, one.mesh.tensor, one.remat is True))
    turn: Counter[Any] = Counter()
    queue = []
    for place, candidate in enumerate(ranked):
        kind = (candidate.mesh, candidate.remat, candidate.slots)
        queue.append((turn[kind], place, candidate))
        turn[kind] += 1
    possible: list[Candidate] = []
    for _, _, candidate in sorted(queue, key=lambda entry: entry[:2]):
        if len(possible) == most:
            break
        try:
            _, phases = build(candidate)
        except InputError:  # a mesh that the model does not divide over
            continue
        if analytic_bytes(phases) <= SLACK * chip.hbm_usable:
            possible.append(candidate)
    return possible


def better(reports: list[Report], than: list[Report]) -> bool:
    """Compare two plans: fitting comes before not fitting, then the shorter time a token, then the smaller peak."""
    return rank(reports) < rank(than)


def verdict(reports: list[Report]) -> str:
    """Return the result in one line."""
    wrong = [r.phase.name for r in reports if not r.fits]
    if wrong:
        return f"does not fit: {', '.join(wrong)}"
    return f"fits; {1 / seconds_a_token(reports) / reports[0].chips:,.0f} tokens/s/chip (ESTIMATE)"


def summary(reports: list[Report]) -> str:
    """Return the result in a sentence or two."""
    wrong = [r for r in reports if not r.fits]
    if wrong:
        return "; ".join(map(why, wrong)) + "."
    largest = max(reports, key=lambda r: r.memory.peak if r.memory is not None else 0)
    assert largest.memory is not None
    size = f"{largest.memory.peak / GIB:.2f}"
    if largest.usable is None:
        return f"Largest phase: {largest.phase.name}, {size} GiB a device."
    return f"It fits. Largest phase: {largest.phase.name}, {size} of {largest.usable / GIB:.2f} GiB a chip."


def why(report: Report) -> str:
    """Explain why a phase does not fit: how much it needs, and its largest buffers."""
    largest = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in report.largest[:4])
    needed = report.problem
    if report.memory is not None and report.usable is not None:
        needed = f"needs {report.memory.peak / GIB:.2f} of {report.usable / GIB:.2f} GiB a chip"
    return f"{report.phase.name} does not fit: {needed}; largest: {largest}"
