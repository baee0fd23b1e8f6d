"""The held-out loss is what training minimises: every term with its coefficient, margins and label smoothing included."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import data, learn
from rlhf_jax.algorithms import DPO, SFT, RewardModel
from rlhf_jax.algorithms.heldout import heldout_metrics, heldout_scores, heldout_terms, loss_metrics
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.supervised import no_heldout
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Model
from rlhf_jax.parallel import to_global
from rlhf_jax.testing import IN_MEMORY, loaded_model, mesh_of, random_params, setting_of, tiny_config
from rlhf_jax.types import Term

MESH = mesh_of()
SHAPE = {"batch_size": 4, "length": 8, "pad_id": 0}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 8, "router_coefficient": 0.5}


def document(rng: np.random.Generator, tokens: int) -> data.Encoded:
    return data.Encoded(rng.integers(3, 60, tokens).tolist(), [False, False] + [True] * (tokens - 2), 2)


def pairs(count: int) -> list[data.EncodedPair]:
    rng = np.random.default_rng(0)
    sides = [[document(rng, int(rng.integers(3, 9))) for _ in range(2)] for _ in range(count)]
    return [data.EncodedPair(*pair, margin=0.5 * place) for place, pair in enumerate(sides)]


def parts(rows: int) -> dict[str, Any]:
    """What every description has: rows of 8 columns, a learning rate of 0."""
    optimizer = learn.OptimizerConfig(learning_rate=0.0)
    return {"model": IN_MEMORY, "batch": BatchConfig(rows, 8), "optimizer": optimizer}


def in_memory(model: Model, seed: int = 0) -> Loaded:
    return loaded_model(model, random_params(model, seed))


def trained(step, state, frozen, batch) -> dict[str, float]:
    """The losses of a training step over ``batch``."""
    metrics = step(jax.tree.map(jnp.copy, state), frozen, to_global(batch, MESH))[1]
    return {name: float(mean.value()) for name, mean in metrics.items() if name.startswith("loss")}


def compared(states: dict, losses: dict[str, float]) -> None:
    actual = {name.removeprefix("heldout/"): value for name, value in states.items() if "loss" in name}
    assert (
        actual == pytest.approx(losses, rel=1e-5)
        if len(losses) > 2
        else actual["loss"] == pytest.approx(losses["loss"])
    )


@pytest.mark.parametrize("centring", [0.0, 0.3])
def test_of_a_reward_model(centring):
    """Six pairs in batches of four against one step over six, and a float64 loop over their scores."""
    model = Model(tiny_config(head="scalar", num_layers=1))
    job = RewardModel(**parts(6), centring=centring).wire(setting_of(MESH), in_memory(model), None)
    step, evaluate, state = job.train_step, job.evaluate, job.state
    states = pairs(6)
    scores, terms = heldout_scores(evaluate, state.params, {}, states, MESH, **SHAPE)
    metrics = heldout_metrics(scores, terms)
    compared(
        metrics, trained(step, state, {}, next(iter(data.evaluation_pair_batches(states, **SHAPE | {"batch_size": 6}))))
    )
    total = 0.0
    for pair, chosen, rejected in zip(states, *scores.astype(np.float64), strict=True):
        total += np.log1p(np.exp(rejected - chosen + pair.margin)) + centring * (chosen + rejected) ** 2
    assert metrics["heldout/loss"] == pytest.approx(total / 6, rel=1e-5)
    assert metrics["heldout/accuracy"] == (scores[0] > scores[1]).mean()


def test_of_dpo():
    """Label smoothing .1 and the chosen replies' cross-entropy with weight .3; the loop is over the implicit rewards."""
    model, config = (
        Model(tiny_config(num_layers=1)),
        learn.DPOConfig(beta=0.5, label_smoothing=0.1, sft_coefficient=0.3),
    )
    job = DPO(**parts(6), dpo=config).wire(setting_of(MESH), in_memory(model), in_memory(model, 7), None)
    step, evaluate, state, frozen = job.train_step, job.evaluate, job.state, job.frozen
    states = pairs(6)
    scores, terms = heldout_scores(evaluate, state.params, frozen, states, MESH, **SHAPE)
    metrics = heldout_metrics(scores, terms)
    whole = next(iter(data.evaluation_pair_batches(states, **SHAPE | {"batch_size": 6})))
    compared(metrics, trained(step, state, frozen, whole))
    gaps = scores[0].astype(np.float64) - scores[1]
    preference = np.mean([0.9 * np.log1p(np.exp(-gap)) + 0.1 * np.log1p(np.exp(gap)) for gap in gaps])
    assert metrics["heldout/loss/preference"] == pytest.approx(preference, rel=1e-5)
    assert metrics["heldout/loss"] == pytest.approx(preference + 0.3 * metrics["heldout/loss/nll"], rel=1e-5)


def test_of_demonstrations_to_a_mixture_of_experts():
    """The loss of the routers counts, as it does in training."""
    model = Model(tiny_config(num_layers=1, **EXPERTS))
    job = SFT(**parts(4)).wire(setting_of(MESH), in_memory(model), None)
    step, evaluate, state = job.train_step, job.evaluate, job.state
    rng = np.random.default_rng(1)
    states = [document(rng, 8) for _ in range(4)]
    metrics = loss_metrics(heldout_terms(evaluate, state.params, {}, data.evaluation_batches(states, **SHAPE), MESH))
    losses = trained(step, state, {}, next(data.evaluation_batches(states, **SHAPE)))
    compared(metrics, losses)
    assert metrics["heldout/loss"] - metrics["heldout/loss/nll"] == pytest.approx(losses["loss/router"], rel=1e-4)
    assert losses["loss/router"] > 0.5  # equal loads would give .5 x 2 picks per token


def test_terms_by_hand():
    """6 / 3 + .5 x 8 / 2 = 4; a term that nothing counts for adds nothing and has no value."""
    terms = {"nll": Term(6.0, 3.0), "centring": Term(8.0, 2.0, 0.5), "router": Term(0.0, 0.0)}
    assert loss_metrics(terms) == {
        "heldout/loss": 4.0,
        "heldout/loss/nll": 2.0,
        "heldout/loss/centring": 4.0,
        "heldout/loss/router": None,
    }
    assert loss_metrics({"nll": Term(0.0, 0.0)}) == {"heldout/loss": None}


def test_a_job_without_a_heldout_function_says_so() -> None:
    with pytest.raises(NotImplementedError, match="give its job a function `heldout`"):
        no_heldout({})
