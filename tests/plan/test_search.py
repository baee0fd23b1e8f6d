"""What the planner tries, and what it makes of it: programs compiled for eight CPU devices as if they were a chip's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest

from rlhf_jax import learn
from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, abstract_arrays, make_mesh, tree_shardings
from rlhf_jax.plan import (
    CHIPS,
    Candidate,
    Seconds,
    better,
    compile_phase,
    promising,
    repair,
    supervised_phases,
    variations,
    verdict,
    why,
)
from rlhf_jax.plan.search import SLACK, analytic_bytes, nearest
from rlhf_jax.testing import tiny_config

START = Candidate(MeshConfig(), rows=64, microbatches=1)
CHIP = CHIPS["v5e"]


def build(candidate: Candidate):
    mesh = make_mesh(candidate.mesh)
    model = Model(tiny_config(remat=bool(candidate.remat), num_layers=4, max_length=256), ActivationConstraint(mesh))
    params = abstract_arrays(model.abstract(), tree_shardings(model.abstract(), model.logical_axes(), mesh))
    adam = learn.make_optimizer(learn.OptimizerConfig(), 1)
    sizes = {"rows": candidate.rows, "length": 128, "microbatches": candidate.microbatches}
    return mesh, supervised_phases(model, params, adam, mesh, **sizes)[:1]


@functools.cache
def once(candidate: Candidate):
    mesh, phases = build(candidate)
    return compile_phase(phases[0], mesh, CHIP)


def compiled(candidate: Candidate, usable: float):
    return [dataclasses.replace(once(candidate), usable=usable)]


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Bytes a device of a step with all rows at once, with recomputation, with 2 microbatches as well."""
    changes = {"start": {}, "remat": {"remat": True}, "both": {"remat": True, "microbatches": 2}}
    found = {name: compiled(dataclasses.replace(START, **change), 1e12) for name, change in changes.items()}
    return {name: reports[0].memory.peak for name, reports in found.items()}


def test_recomputation_and_microbatches_need_less(peaks: dict[str, int]) -> None:
    assert peaks["both"] < peaks["remat"] < peaks["start"]


@pytest.mark.parametrize(("kept", "binding"), [("remat", "remat = True"), ("both", "BatchConfig.microbatches = 2")])
def test_the_nearest_change_that_fits(peaks: dict[str, int], kept: str, binding: str) -> None:
    chip = dataclasses.replace(CHIP, hbm_usable=peaks[kept])
    wrong = compiled(START, peaks[kept])
    assert [report.fits for report in wrong] == [False] and verdict(wrong) == "does not fit: sft step"
    assert "largest: temporaries of the program" in why(wrong[0])
    told = repair(build, START, wrong, chip, remat=False, minibatches=1, most=3)
    assert told.startswith("it fits with ") and binding in told


def test_what_no_change_helps_wants_a_larger_slice(peaks: dict[str, int]) -> None:
    resident = sum(compiled(START, 1e12)[0].memory.resident.values())
    wrong = compiled(START, resident - 1)
    chip = dataclasses.replace(CHIP, hbm_usable=resident - 1)
    assert "take a slice of at least 16 chips" in repair(build, START, wrong, chip, False, 1, 3)
    chip = dataclasses.replace(CHIP, hbm_usable=resident + 1)
    assert "(0 changes compiled" in repair(build, START, wrong, chip, False, 1, 3)


def test_nearest_changes_from_small_to_large() -> None:
    told = [one.bindings(START) for one in nearest(dataclasses.replace(START, rows=8), False, 2, sampling=True)]
    rows, deep = "BatchConfig.batch_size = ", "remat = True"
    assert told == [
        f"{rows}8, {deep}",
        f"{rows}8, BatchConfig.microbatches = 2, {deep}",
        f"{rows}8, BatchConfig.microbatches = 4, {deep}",
        f"{rows}8, {deep}, SlotConfig.slots = 4",
        f"{rows}8, {deep}, SlotConfig.slots = 2",
        f"{rows}4, {deep}",
        f"{rows}2, {deep}",
    ]


def test_variations_divide() -> None:
    """8 chips, 2 key/value heads: tensor 1 or 2; 64 or 128 rows; 1 to 8 microbatches; as configured or recomputed; all
    rows, a half or a quarter of them in slots."""
    found = variations(START, 8, 2, 1, remat=False, sampling=True)
    assert len(found) == len(set(found)) == 2 * 2 * 4 * 2 * 3
    assert {(one.mesh.fsdp, one.mesh.tensor) for one in found} == {(8, 1), (4, 2)}
    assert {one.remat for one in found} == {None, True} and {one.slots for one in found} == {0, 32, 16}
    few = variations(dataclasses.replace(START, rows=8), 8, 2, 1, remat=False)
    assert {(one.mesh.fsdp, one.rows, one.microbatches) for one in few} == {
        (8, 8, 1),
        (8, 16, 1),
        (8, 16, 2),
        (4, 8, 1),
        (4, 8, 2),
        (4, 16, 1),
        (4, 16, 2),
        (4, 16, 4),
    }


def test_promising_ones_are_of_every_kind_and_may_fit() -> None:
    found = variations(START, 8, 2, 1, remat=False)
    chosen = promising(build, found, CHIP, 4)
    assert {(one.mesh.tensor, one.remat) for one in chosen} == {(1, None), (1, True), (2, None), (2, True)}
    assert all(one.microbatches == 1 and one.rows == 128 for one in chosen)
    least = min(analytic_bytes(build(one)[1]) for one in found)
    assert promising(build, found, dataclasses.replace(CHIP, hbm_usable=least / SLACK - 1), 4) == []


def test_the_better_plan_fits_and_then_is_faster(peaks: dict[str, int]) -> None:
    slow = compiled(dataclasses.replace(START, remat=True), peaks["remat"])
    fast = [dataclasses.replace(slow[0], seconds=Seconds(0.0, slow[0].seconds.bound / 2, 0.0))]
    assert better(fast, slow) and not better(slow, fast)
    assert better(slow, [dataclasses.replace(fast[0], usable=peaks["remat"] - 1)])


def test_shapes_only() -> None:
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(build(START)[1][0].arguments))
