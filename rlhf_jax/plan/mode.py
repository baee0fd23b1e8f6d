"""The plan of a run: compile every phase ahead of time, say whether it fits a slice and what it costs, look for what would fit."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algorithms import SHAPES, Algorithm, assemble
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.io.source import ModelSource
from rlhf_jax.parallel import MeshConfig, make_mesh, remake_mesh
from rlhf_jax.plan.chips import Chip, Slice, parse_slice
from rlhf_jax.plan.compiled import Report, compile_phase
from rlhf_jax.plan.page import as_html
from rlhf_jax.plan.phases import PlannedPhase, planned
from rlhf_jax.plan.report import Attempt, as_json, as_markdown, as_text, tables
from rlhf_jax.plan.search import (
    Build,
    Candidate,
    Keys,
    Remat,
    better,
    promising,
    repair,
    summary,
    variations,
    verdict,
)
from rlhf_jax.plan.sharding import sharding_tables, strategies

LOCAL = "local"
"""The devices of this machine instead of a slice, without a verdict."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of a plan.

    slice: CHIP:AxB or CHIP:AxBxC, *2 appended for two slices; or `LOCAL`.
    json, html, markdown: files to write the plan to.
    search: how many variations to compile.
    repairs: how many changes to compile when a phase does not fit.
    keep: a directory where compiled programs are stored and looked up.
    show_sharding: print the rules and the sharding of every parameter; compile nothing.
    inputs: the files and bindings, for the title.
    keys: the names in the file of the configs that a search may change.
    """

    slice: str
    json: str | None = None
    html: str | None = None
    markdown: str | None = None
    search: int = 0
    repairs: int = 4
    keep: str | None = None
    show_sharding: bool = False
    inputs: Sequence[str] = ()
    keys: Keys = dataclasses.field(default_factory=Keys)


def plan_run(algorithm: Algorithm[Any], mesh: MeshConfig, steps: int, options: PlanOptions) -> None:
    """Print the plan of a run, and write it where the options say. Raises RunStopped when a phase does not fit."""
    where = None if options.slice == LOCAL else parse_slice(options.slice)
    if where is not None:
        # Programs for a slice that is not there can be written to JAX's cache, but not read: --plan_keep is theirs.
        jax.config.update("jax_enable_compilation_cache", False)
    chip, devices = (None, jax.devices()) if where is None else (where.chip, where.devices())
    if options.search and chip is None:
        raise InputError("--plan_search: needs a slice; local devices have no roofline")
    build = _build(algorithm, steps, devices)
    fields: Any = algorithm
    slots = getattr(fields, "slots", None)
    keys = dataclasses.replace(options.keys, remat=_remat_key(algorithm))
    start = Candidate(
        mesh, fields.batch.batch_size, fields.batch.microbatches, slots=slots.slots if slots else 0, keys=keys
    )
    job = assemble(algorithm, mesh=make_mesh(mesh, devices), steps=steps, seed=0, build=SHAPES)
    grid, phases = job.mesh, planned(algorithm.phases(job), job.models, job.mesh)
    model = next(iter(job.models.values()))
    if options.show_sharding:
        _print_sharding(phases[-1], model.with_head("lm"), grid, getattr(fields, "rollout_mesh", None))
        return
    result = SearchResult(start, grid, _compile(phases, grid, chip, options.keep), [])
    minibatches = getattr(getattr(job, "limits", None), "minibatches", 1)
    if options.search and chip is not None:
        candidates = variations(
            start,
            grid.size,
            model.config.num_kv_heads,
            minibatches,
            remat=model.config.remat,
            sampling=slots is not None,
        )
        result = _search(build, candidates, chip, result, options)
    wrong = [report for report in result.reports if not report.fits] if chip is not None else []
    change = ""
    if wrong and chip is not None:
        change = repair(build, start, wrong, chip, model.config.remat, minibatches, options.repairs)
    _write_plan(result, where, change, bool(wrong), options)


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The candidate that is reported, on its mesh, and every attempt."""

    candidate: Candidate
    grid: Mesh
    reports: list[Report]
    attempts: list[Attempt]


def _build(algorithm: Algorithm[Any], steps: int, devices: list[jax.Device]) -> Build:
    def build(candidate: Candidate) -> tuple[Mesh, list[PlannedPhase]]:
        grid = make_mesh(candidate.mesh, devices)
        changed = _changed(algorithm, candidate)
        job = assemble(changed, mesh=grid, steps=steps, seed=0, build=SHAPES)
        return grid, planned(changed.phases(job), job.models, grid)

    return build


def _changed(algorithm: Algorithm[Any], candidate: Candidate) -> Algorithm[Any]:
    """Return the description with what the candidate changes: rows, microbatches, slots, recomputation."""
    fields: Any = algorithm
    sizes = {"batch_size": candidate.rows, "microbatches": candidate.microbatches}
    changes: dict[str, Any] = {"batch": dataclasses.replace(fields.batch, **sizes)}
    if hasattr(fields, "slots"):
        changes["slots"] = dataclasses.replace(fields.slots, slots=candidate.slots)
    for name, source in _sources(algorithm).items():
        changes[name] = _with_remat(source, candidate.remat)
    changed: Algorithm[Any] = dataclasses.replace(fields, **changes)
    return changed


def _sources(algorithm: Algorithm[Any]) -> dict[str, ModelSource]:
    fields: Any = algorithm
    values = {field.name: getattr(algorithm, field.name) for field in dataclasses.fields(fields)}
    return {name: value for name, value in values.items() if isinstance(value, ModelSource)}


def _remat_key(algorithm: Algorithm[Any]) -> str:
    """Return the name of the config that says what is recomputed: that of the first model."""
    first = next(iter(_sources(algorithm).values()))
    return "ModelConfig" if first.config is not None else "ModelSource"


def _with_remat(source: ModelSource, remat: Remat | None) -> ModelSource:
    if remat is None:
        return source
    if source.config is not None:
        return dataclasses.replace(source, config=source.config.replace(remat=remat))
    return dataclasses.replace(source, remat=remat)


def _print_sharding(phase: PlannedPhase, model: Any, grid: Mesh, rollout_mesh: MeshConfig | None) -> None:
    meshes: dict[str, Any] = {"as configured": grid}
    if rollout_mesh is not None:
        meshes["as configured for sampling"] = remake_mesh(rollout_mesh, grid)
    meshes |= strategies(grid.size, model.config)
    print(as_text(sharding_tables(phase, model, meshes)))


def _compile(phases: list[PlannedPhase], grid: Mesh, chip: Chip | None, keep: str | None) -> list[Report]:
    reports = []
    for phase in phases:
        print(f"compiling {phase.name} ...", end="", file=sys.stderr, flush=True)
        reports.append(compile_phase(phase, grid, chip, None if keep is None else Path(keep)))
        print(f" {reports[-1].compile_seconds:.0f} s", file=sys.stderr, flush=True)
    return reports


def _search(
    build: Build, candidates: list[Candidate], chip: Chip, first: SearchResult, options: PlanOptions
) -> SearchResult:
    """Return the best candidate that fits (the first when none does); report each on stderr."""
    start = first.candidate
    best, attempts = first, [Attempt(start.bindings(start), first.reports)]
    for candidate in promising(build, candidates, chip, options.search):
        changed = candidate.bindings(start)
        print(f"trying {changed}", file=sys.stderr)
        grid, phases = build(candidate)
        reports = _compile(phases, grid, chip, options.keep)
        attempts.append(Attempt(changed, reports))
        print(f"  {verdict(reports)}", file=sys.stderr)
        if better(reports, best.reports):
            best = SearchResult(candidate, grid, reports, [])
    print(f"best: {best.candidate.bindings(start)}", file=sys.stderr)
    return dataclasses.replace(best, attempts=attempts)


def _write_plan(result: SearchResult, where: Slice | None, change: str, wrong: bool, options: PlanOptions) -> None:
    sections = tables(result.reports, where, result.attempts)
    print(as_text(sections))
    title = f"{', '.join(options.inputs)} on {options.slice}"
    words = summary(result.reports) + (f" Nearest change: {change}" if change else "")
    settings = {name: value for name, value in dataclasses.asdict(result.candidate).items() if name != "keys"}
    settings["mesh"] = dict(result.grid.shape)
    _write(options.json, as_json(result.reports, where, settings, result.attempts, change))
    _write(options.html, as_html(sections, title, result.reports, where, words, not wrong))
    _write(options.markdown, as_markdown(sections, title))
    if wrong:
        raise RunStopped(f"{title}: {words}")


def _write(path: str | None, text: str) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
