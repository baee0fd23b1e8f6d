"""Costs of the phases of a run: operations and bytes by analysis, from the work that each phase does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algorithms.phases import Phase, Work
from rlhf_jax.algorithms.rollout_copy import rollout_copy
from rlhf_jax.models import Model, lora
from rlhf_jax.parallel import ActivationConstraint, abstract_arrays, tree_shardings
from rlhf_jax.plan import analytic, memory

PASSING = "gathered weights, one block, logits or head"


@dataclasses.dataclass(frozen=True)
class PlannedPhase:
    """A phase with what it costs. tokens: that the phase reads or writes in one call, padding included. flops: of the model, all
    chips together, by `plan.analytic`. inside: bytes a chip within the temporaries, by kind, by `plan.analytic`. decoding: the
    most that a sampling loop runs."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident: Mapping[str, Any]
    tokens: int
    flops: int
    inside: Mapping[str, int | None]
    decoding: int = 1

    @property
    def analytic(self) -> int:
        """Bytes a chip, without compiling: what stays, and what is known of the temporaries."""
        return memory.tree_bytes(dict(self.resident)) + sum(size for size in self.inside.values() if size)


def planned(phases: Iterable[Phase], models: Mapping[str, Model], mesh: Mesh) -> list[PlannedPhase]:
    """Return phases with their costs. models: by role, as the work names them."""
    return [_planned(phase, models, mesh) for phase in phases]


def _planned(phase: Phase, models: Mapping[str, Model], mesh: Mesh) -> PlannedPhase:
    by_kind = {kind: [work for work in phase.work if work.kind == kind] for kind in ("forward", "train", "decode")}
    flops = sum(_flops(work, models[work.role]) for work in phase.work) * phase.passes
    inside: dict[str, int | None] = {}
    if by_kind["train"]:
        inside = _training(phase, by_kind["train"], models, mesh)
    elif by_kind["forward"]:
        read = [(models[work.role], work.read) for work in by_kind["forward"]]
        first = by_kind["forward"][0]
        inside[PASSING] = memory.scoring_bytes(read, _sequences_per_chip(first, mesh), first.columns, mesh.shape)
    for work in by_kind["decode"]:
        inside |= _decoding(phase, work, models[work.role], mesh)
    decoding = max((work.read for work in by_kind["decode"]), default=1)
    tokens = phase.tokens * phase.passes
    return PlannedPhase(phase.name, phase.function, phase.arguments, phase.resident, tokens, flops, inside, decoding)


def _shards(mesh: Mesh) -> int:
    return ActivationConstraint(mesh).parts("act_batch")


def _sequences_per_chip(work: Work, mesh: Mesh) -> int:
    """Return the number of sequences that a chip holds at a time."""
    return max(1, work.rows // _shards(mesh) // work.parts)


def _flops(work: Work, model: Model) -> int:
    if work.kind == "train":
        return analytic.training_flops(model, work.rows, work.columns, work.read)
    if work.kind == "forward":
        return analytic.model_flops(model, work.rows, work.columns, work.read)
    attention = analytic.attention_of(model)
    sampled = analytic.generate_flops(model.config, work.rows, work.columns, work.read, attention)
    return sampled + 2 * work.rows * (work.columns + work.read) * analytic.adapter_weights(model)


def _training(phase: Phase, works: list[Work], models: Mapping[str, Model], mesh: Mesh) -> dict[str, int | None]:
    first, trained = works[0], [models[work.role] for work in works]
    params, optimizer = phase.resident["parameters"], phase.resident["optimizer"][0]
    microbatches = 2 if first.summed else 1
    needed = memory.learning(
        trained, params, mesh.shape, microbatches, _sequences_per_chip(first, mesh), first.columns, first.read
    )
    copied = memory.copied_bytes((params, optimizer)) if phase.looped else 0
    read = (work for work in phase.work if work.kind == "forward")
    forward = max((_forward(work, models, mesh) for work in read), default=0)
    beyond = max(0, forward - (needed.total - needed.casts))  # gradients and activations are not there meanwhile
    parts: dict[str, int | None] = {"gradients": needed.gradients, "activations": needed.activations}
    return parts | {"casts and copies": needed.casts + copied, PASSING: needed.passing + beyond}


def _forward(work: Work, models: Mapping[str, Model], mesh: Mesh) -> int:
    return memory.scoring_bytes(
        [(models[work.role], work.read)], _sequences_per_chip(work, mesh), work.columns, mesh.shape
    )


def _decoding(phase: Phase, work: Work, model: Model, mesh: Mesh) -> dict[str, int | None]:
    config, sampled_on = model.config, work.mesh or mesh
    tensor = sampled_on.shape["tensor"]
    heads, sampled = tensor if config.num_kv_heads % tensor == 0 else 1, _shards(sampled_on)
    length, rows = work.columns + work.read, max(1, work.rows // sampled)
    inside: dict[str, int | None] = {
        "KV cache": memory.cache_bytes(config, work.slots or work.rows, length) // (sampled * heads),
        PASSING: memory.block_bytes(model, rows, work.columns, sampled_on.shape, backward=False),
    }
    if work.mesh is not None:
        params, frozen = phase.arguments[:2]

        def copy(params: Any, frozen: Any) -> Any:
            return rollout_copy(model, lora.whole(params, frozen)[work.role], sampled_on)[1]

        where = tree_shardings(model.abstract(), model.logical_axes(), sampled_on)
        inside["rollout copy"] = memory.tree_bytes(abstract_arrays(jax.eval_shape(copy, params, frozen), where))
    return inside
