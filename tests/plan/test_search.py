"""The variations that the planner tries: programs compiled for eight CPU devices as if they were a chip's."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import pytest

from rlhf_jax import learn
from rlhf_jax.algorithms import SFT, SHAPES
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, abstract_arrays, make_mesh, tree_shardings
from rlhf_jax.plan import (
    CHIPS,
    Attempt,
    Candidate,
    Keys,
    Seconds,
    as_html,
    as_json,
    better,
    compile_phase,
    parse_slice,
    planned,
    promising,
    repair,
    summary,
    tables,
    variations,
    verdict,
    why,
)
from rlhf_jax.plan.search import SLACK, analytic_bytes, nearest
from rlhf_jax.testing import byte_tokenizer, loaded_model, tiny_config

KEYS = Keys(unbound=(("slots", "run.slots = @SlotConfig()"),))
START = Candidate(MeshConfig(), rows=64, microbatches=1, keys=KEYS)
CHIP = CHIPS["v5e"]


def build(candidate: Candidate):
    mesh = make_mesh(candidate.mesh)
    config = tiny_config(remat=candidate.remat or False, num_layers=4, max_length=256)
    algorithm = SFT(
        model=ModelSource(config=config, tokenizer=byte_tokenizer()),
        batch=BatchConfig(candidate.rows, 128, candidate.microbatches),
        optimizer=learn.OptimizerConfig(),
    )
    model = Model(config, ActivationConstraint(mesh))
    params = abstract_arrays(model.abstract(), tree_shardings(model.abstract(), model.logical_axes(), mesh))
    job = algorithm.wire(Setting.of(mesh, 1, 0, SHAPES), loaded_model(model, params), None)
    return mesh, planned(algorithm.phases(job), job.models, mesh)[:1]


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
    actual = {name: compiled(dataclasses.replace(START, **change), 1e12) for name, change in changes.items()}
    return {name: reports[0].memory.peak for name, reports in actual.items()}


def test_recomputation_and_microbatches_need_less(peaks: dict[str, int]) -> None:
    assert peaks["both"] < peaks["remat"] < peaks["start"]


@pytest.mark.parametrize(
    ("remaining", "binding"), [("remat", "ModelConfig.remat = True"), ("both", "BatchConfig.microbatches = 2")]
)
def test_the_nearest_change_that_fits(peaks: dict[str, int], remaining: str, binding: str) -> None:
    chip = dataclasses.replace(CHIP, hbm_usable=peaks[remaining])
    wrong = compiled(START, peaks[remaining])
    assert [report.fits for report in wrong] == [False] and verdict(wrong) == "does not fit: sft step"
    assert "largest: temporaries of the program" in why(wrong[0])
    message = repair(build, START, wrong, chip, remat=False, minibatches=1, most=3)
    assert message.startswith("it fits with ") and binding in message


def test_changes_are_said_as_the_file_says_them() -> None:
    """Scopes of the file's own; a configurable that nothing binds yet has to be bound first."""
    start = dataclasses.replace(START, keys=Keys("train/MeshConfig", "BatchConfig", "SlotConfig", "ModelSource"))
    changed = dataclasses.replace(start, mesh=MeshConfig(fsdp=4, tensor=2), remat="cheap")
    assert (
        changed.bindings(start) == "train/MeshConfig.fsdp = 4, train/MeshConfig.tensor = 2, ModelSource.remat = 'cheap'"
    )
    unbound = dataclasses.replace(changed, keys=Keys(unbound=(("mesh", "run.mesh = @MeshConfig()"),)), remat=None)
    assert unbound.bindings(start) == "run.mesh = @MeshConfig(), MeshConfig.fsdp = 4, MeshConfig.tensor = 2"
    assert start.bindings(start) == "as configured"


def test_the_page_says_it_all(peaks: dict[str, int]) -> None:
    """Verdict, a bar a phase with the limit, and what the search tried, what fits first."""
    wrong, fitting = compiled(START, peaks["remat"]), compiled(dataclasses.replace(START, remat=True), peaks["remat"])
    slice_ = parse_slice("v5e:2x4")
    attempts = [Attempt("as configured", wrong), Attempt("ModelConfig.remat = True", fitting)]
    actual = tables(fitting, slice_, attempts)
    assert [row[:2] for row in actual[-1].rows] == [
        ("ModelConfig.remat = True", "yes"),
        ("as configured", "NO: sft step"),
    ]
    page = as_html(actual, "a < b", fitting, slice_, summary(fitting), True)
    assert "<h1>a &lt; b</h1>" in page and "It fits. Largest phase: sft step" in page
    assert page.count('<b style="left:100.00%"') == 1 and 'class="number">yes' not in page
    message = json.loads(as_json(fitting, slice_, {}, attempts, "a change"))
    assert message["tried"][1]["fits"] == "NO: sft step" and message["nearest_change"] == "a change"
    assert summary(wrong).startswith("sft step does not fit: needs ")


def test_what_no_change_helps_wants_a_larger_slice(peaks: dict[str, int]) -> None:
    resident = sum(compiled(START, 1e12)[0].memory.resident.values())
    wrong = compiled(START, resident - 1)
    chip = dataclasses.replace(CHIP, hbm_usable=resident - 1)
    assert "take a slice of at least 16 chips" in repair(build, START, wrong, chip, False, 1, 3)
    chip = dataclasses.replace(CHIP, hbm_usable=resident + 1)
    assert "(0 changes compiled" in repair(build, START, wrong, chip, False, 1, 3)


def test_nearest_changes_from_small_to_large() -> None:
    message = [one.bindings(START) for one in nearest(dataclasses.replace(START, rows=8), False, 2, sampling=True)]
    rows, deep = "BatchConfig.batch_size = ", "ModelConfig.remat = True"
    unslotted = "run.slots = @SlotConfig(), SlotConfig.slots = "
    assert message == [
        f"{rows}8, ModelConfig.remat = 'cheap'",
        f"{rows}8, {deep}",
        f"{rows}8, BatchConfig.microbatches = 2, {deep}",
        f"{rows}8, BatchConfig.microbatches = 4, {deep}",
        f"{rows}8, {deep}, {unslotted}4",
        f"{rows}8, {deep}, {unslotted}2",
        f"{rows}4, {deep}",
        f"{rows}2, {deep}",
    ]


def test_variations_divide() -> None:
    """8 chips, 2 key/value heads: tensor 1 (as configured) or 2; 64 or 128 rows; 1 to 8 microbatches; nothing, what is cheap
    or all recomputed; all rows, a half or a quarter of them in slots; without the start."""
    actual = variations(START, 8, 2, 1, remat=False, sampling=True)
    assert len(actual) == len(set(actual)) == 2 * 2 * 4 * 3 * 3 - 1 and START not in actual
    assert {(one.mesh.fsdp, one.mesh.tensor) for one in actual} == {(-1, 1), (4, 2)}
    assert {one.remat for one in actual} == {None, "cheap", True} and {one.slots for one in actual} == {0, 32, 16}
    assert {one.remat for one in variations(START, 8, 2, 1, remat="cheap")} == {None, False, True}
    few = variations(dataclasses.replace(START, rows=8), 8, 2, 1, remat=False)
    assert {(one.mesh.fsdp, one.rows, one.microbatches) for one in few} == {
        (-1, 8, 1),
        (-1, 16, 1),
        (-1, 16, 2),
        (4, 8, 1),
        (4, 8, 2),
        (4, 16, 1),
        (4, 16, 2),
        (4, 16, 4),
    }


def test_promising_ones_are_of_every_kind_and_may_fit() -> None:
    actual = variations(START, 8, 2, 1, remat=False)
    chosen = promising(build, actual, CHIP, 6)
    remats = (None, "cheap", True)
    assert {(one.mesh.tensor, one.remat) for one in chosen} == {(n, deep) for n in (1, 2) for deep in remats}
    assert all(one.microbatches == 1 and one.rows == 128 for one in chosen)
    least = min(analytic_bytes(build(one)[1]) for one in actual)
    assert promising(build, actual, dataclasses.replace(CHIP, hbm_usable=least / SLACK - 1), 4) == []


def test_the_better_plan_fits_and_then_is_faster(peaks: dict[str, int]) -> None:
    slow = compiled(dataclasses.replace(START, remat=True), peaks["remat"])
    fast = [dataclasses.replace(slow[0], seconds=Seconds(0.0, slow[0].seconds.bound / 2, 0.0))]
    assert better(fast, slow) and not better(slow, fast)
    assert better(slow, [dataclasses.replace(fast[0], usable=peaks["remat"] - 1)])
    fat = [dataclasses.replace(slow[0], memory=dataclasses.replace(slow[0].memory, code=slow[0].memory.code + 1))]
    assert better(slow, fat) and not better(fat, slow)  # equally fast to three digits, but larger by a byte


def test_shapes_only() -> None:
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(build(START)[1][0].arguments))
