"""The phases of an iteration of PPO and GRPO, as a plan compiles them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algorithms import scoring
from rlhf_jax.algorithms.phases import Phase, Work, prompt_batch_shape, rng_shape, row_shape, shapes_of_rows
from rlhf_jax.algorithms.rollout_job import RolloutJob
from rlhf_jax.parallel import abstract_arrays, remake_mesh, replicated
from rlhf_jax.types import Completions, Scored


def text_score_shapes(mesh: Mesh, rows: int, names: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """Return the shapes that `RolloutJob.place` returns: scores by name, and which responses have one."""
    return {name: row_shape(mesh, np.float32, rows) for name in names}, row_shape(mesh, np.bool_, rows)


def rollout_phases(job: RolloutJob, score_names: Sequence[str]) -> list[Phase]:
    """Return the four phases of an iteration, for shapes. score_names: the names of the scores of texts."""
    algorithm, mesh, limits = job.algorithm, job.mesh, job.limits
    extra = job.view.extra(job.state)
    batch, sampling, frozen = algorithm.batch, algorithm.sampling, job.frozen
    rows, prompt, new = batch.batch_size, batch.length, sampling.max_new_tokens
    train = job.view.train(job.state)
    params, rng, prompts = train.params, rng_shape(), prompt_batch_shape(mesh, rows, prompt)
    completions: Completions = shapes_of_rows(mesh, job.generate, params, frozen, prompts, rng)
    scored: Scored = shapes_of_rows(mesh, job.score, params, frozen, completions)
    texts = text_score_shapes(mesh, rows, score_names)
    prepare = (scored, *texts, *extra)
    prepared = shapes_of_rows(mesh, lambda *arguments: job.prepare(*arguments)[0], *prepare)
    metrics = jax.eval_shape(job.prepare, *prepare)[1]
    measured = abstract_arrays(metrics, jax.tree.map(lambda _: replicated(mesh), metrics))

    resident: dict[str, Any] = {
        "parameters": params,
        "optimizer": (train.opt_state, train.step, train.rng, *extra),
        "frozen models": frozen,
    }
    if algorithm.one_step_off:
        # Arrays of its own, beside those that a phase reads: memory is counted by identity.
        resident["other rollout"] = jax.tree.map(copy.copy, completions)
    still = {kind: tree for kind, tree in resident.items() if not (algorithm.offload_optimizer and kind == "optimizer")}
    while_sampling = still | {"other rollout": scored} if algorithm.one_step_off else still
    length = prompt + new
    sampler_mesh = None if algorithm.rollout_mesh is None else remake_mesh(algorithm.rollout_mesh, mesh)
    decode = Work("policy", "decode", rows, prompt, new, slots=algorithm.slots.slots, mesh=sampler_mesh)
    columns = {"reward": length}
    forward = [
        Work(role, "forward", rows, length, columns.get(role, new)) for role in scoring.ROLES if role in job.models
    ]
    parts: dict[str, Any] = {"parts": limits.minibatches * batch.microbatches, "summed": batch.microbatches > 1}
    trained = [Work(role, "train", rows, length, new, **parts) for role in job.roles.trainable]
    update = (job.state, frozen, prepared, rng, measured)
    tokens = rows * length
    return [
        Phase("generate", job.generate, (params, frozen, prompts, rng), while_sampling, tokens, (decode,)),
        Phase("score", job.score, (params, frozen, completions), still, tokens, tuple(forward)),
        Phase("prepare", job.prepare, prepare, still, tokens),
        Phase("update", job.update, update, resident, tokens, tuple(trained), passes=limits.epochs, looped=True),
    ]
