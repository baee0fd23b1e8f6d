"""A supervised algorithm with a stage over the whole batch: adapters, folds, its cost in a plan, and the doctor's gradient."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.algorithms import DPO, SFT, Work
from rlhf_jax.algorithms.models import with_adapters
from rlhf_jax.algorithms.supervised import Preparation, first_state, make_step, supervised_phases
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Fold, LoraConfig, Model, sequence_logprobs
from rlhf_jax.plan import planned
from rlhf_jax.plan.analytic import model_flops
from rlhf_jax.testing import IN_MEMORY, loaded_model, mesh_of, random_params, setting_of, tiny_config, token_batch
from rlhf_jax.types import Mean, Term

ROWS, LENGTH = 4, 8
MODEL = Model(tiny_config(num_layers=1))
BATCH = token_batch([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17, 18, 19, 20], [21, 22]], length=LENGTH)
OPTIMIZER = learn.OptimizerConfig(learning_rate=1e-3)
FORWARD = Work("model", "forward", ROWS, LENGTH, LENGTH)


def logprob(model, params, tokens):
    """The mean log-probability of the tokens of a row, [B]."""
    return sequence_logprobs(model, params, tokens)[0].sum(axis=1) / tokens.loss_mask.sum(axis=1)


def baseline(model):
    """The mean of the rows' log-probabilities over the batch, repeated for every row."""

    def prepare(params, frozen, batch, rng):
        del frozen, rng
        mean = logprob(model, params, batch["tokens"]).mean()
        return batch | {"mean": jnp.full(batch["tokens"].tokens.shape[:1], mean)}, {"mean": Mean(mean, jnp.ones(()))}

    return prepare


def squares(model):
    """The squared distance of every row to the mean of the batch."""

    def loss(params, frozen, batch, rng):
        del frozen, rng
        gap = Mean.of((logprob(model, params, batch["tokens"]) - batch["mean"]) ** 2)
        return {"squares": Term(gap.total, gap.weight)}, {}

    return loss


def stepped(microbatches: int, adapters: LoraConfig | None = None, fold: Fold | None = None, prepare=baseline):
    """The metrics of one step."""
    setting, loaded = setting_of(mesh_of()), loaded_model(MODEL, random_params(MODEL, 0))
    loaded = with_adapters(dataclasses.replace(loaded, input="in memory"), adapters, setting.mesh, jax.random.key(3))
    state, optimizer = first_state(setting, loaded, OPTIMIZER)
    model, stage = loaded.model, Preparation(lambda fold: prepare(loaded.model.folded(fold)), (FORWARD,))

    def loss(fold):
        return squares(model.folded(fold))

    step = make_step(loss, model, optimizer, state, setting.mesh, microbatches, stage)
    _, metrics = step(state, loaded.frozen, {"tokens": BATCH}, fold=fold)
    return {name: float(mean.value()) for name, mean in metrics.items()}


@functools.cache
def uncut() -> dict[str, float]:
    return stepped(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"microbatches": 4},
        {"microbatches": 2, "fold": Fold(columns=13)},
        {"microbatches": 2, "adapters": LoraConfig(rank=2)},
    ],
)
def test_the_cut_changes_nothing(changes):
    """The mean is that of four rows, whatever a microbatch holds; fresh adapters compute what their base does."""
    cut, expected = stepped(**changes), uncut()
    compared = {"mean", "loss"} | (set() if "adapters" in changes else {"grad_norm"})
    assert {name: cut[name] for name in compared} == pytest.approx(
        {name: expected[name] for name in compared}, rel=1e-5
    )
    rows = logprob(MODEL, random_params(MODEL, 0), BATCH)
    assert cut["mean"] == pytest.approx(float(rows.mean()), rel=1e-5)
    assert cut["loss"] == pytest.approx(float(np.var(rows)), rel=1e-4) and cut["loss"] > 1e-3


@pytest.mark.parametrize("adapters", [None, LoraConfig(rank=2, dropout=0.5)])
def test_the_stage_sees_whole_parameters_and_the_fold(adapters):
    """With adapters too, and without the keys of their dropout."""
    observed = []

    def prepare(model):
        def look(params, frozen, batch, rng):
            observed.append((model.fold, jax.tree.map(jnp.shape, params)))
            return baseline(model)(params, frozen, batch, rng)

        return look

    fold = Fold(columns=12)
    stepped(1, adapters, fold, prepare)
    whole = dataclasses.replace(MODEL, lora=adapters).init(jax.random.key(0))
    assert observed == [(fold, jax.tree.map(jnp.shape, whole))]


def job_of(**changes):
    """The job of SFT with this stage ahead of it."""
    algorithm = SFT(model=IN_MEMORY, batch=BatchConfig(ROWS, LENGTH, microbatches=2), optimizer=OPTIMIZER)
    job = algorithm.wire(setting_of(mesh_of()), loaded_model(MODEL, random_params(MODEL, 0)), None)
    return dataclasses.replace(job, **changes)


def costs(job, sequences: int = ROWS):
    phases = supervised_phases(job, BATCH, sequences, BatchConfig(ROWS, LENGTH, microbatches=2))
    return planned(phases, job.models, job.mesh)


def test_a_plan_counts_the_stage_in_step_and_evaluation():
    """One forward pass more in each. It reads all rows at once, a microbatch half of them: what is gathered may be more."""
    plain, staged = costs(job_of()), costs(job_of(preparation=Preparation(baseline, (FORWARD,))))
    more = model_flops(MODEL, ROWS, LENGTH, LENGTH)
    assert [b.flops - a.flops for a, b in zip(plain, staged, strict=True)] == [more, more]
    assert staged[0].analytic >= plain[0].analytic
    free = costs(job_of(preparation=Preparation(baseline, ())))
    assert [phase.flops for phase in free] == [phase.flops for phase in plain]


def test_a_stage_over_many_more_rows_needs_more_memory():
    """Rows of a thousand microbatches at once are more than gradients and activations of one."""
    wide = dataclasses.replace(FORWARD, rows=1000 * ROWS)
    small, large = (costs(job_of(preparation=Preparation(baseline, (work,))))[0].analytic for work in (FORWARD, wide))
    assert large > 2 * small


def test_a_frozen_model_of_the_stage_is_counted_once():
    """A reference that the stage reads is not read by the loss again."""
    algorithm = DPO(model=IN_MEMORY, batch=BatchConfig(ROWS, LENGTH, microbatches=2), optimizer=OPTIMIZER)
    loaded = loaded_model(MODEL, random_params(MODEL, 0))
    job = algorithm.wire(setting_of(mesh_of()), loaded, loaded, None)
    reference = Work("reference", "forward", 2 * ROWS, LENGTH, LENGTH)
    staged = dataclasses.replace(job, preparation=Preparation(baseline, (reference,)))
    assert [phase.flops for phase in costs(staged, 2 * ROWS)] == [phase.flops for phase in costs(job, 2 * ROWS)]


def test_the_doctor_compares_gradients_of_the_prepared_batch():
    """The loss reads what the stage adds: on a batch as it comes there is nothing to compare."""
    stage = Preparation(lambda fold: baseline(MODEL.folded(fold)), (FORWARD,))
    batches = types.SimpleNamespace(batches=iter([{"tokens": BATCH}]))
    rehearsal = job_of(preparation=stage, loss=squares(MODEL), data=batches).rehearse(0)
    loss, params, batch, frozen, _ = rehearsal.gradient
    assert batch["mean"].shape == (ROWS,)
    whole, parts = (learn.gradients(loss, params, frozen, batch, jax.random.key(0), n)[0] for n in (1, 2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))
