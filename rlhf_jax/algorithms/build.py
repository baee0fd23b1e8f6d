"""The two ways to assemble a job: from arrays for a run, from shapes for a plan."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from rlhf_jax.algorithms.models import Loaded, load_model, load_reward, plan_model, plan_reward
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Head
from rlhf_jax.parallel import init_abstract, init_sharded
from rlhf_jax.types import Rng


class LoadModel(Protocol):
    """Loads a model under a head onto its shards."""

    def __call__(self, source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None) -> Loaded: ...


class LoadReward(Protocol):
    """Loads a trained reward model."""

    def __call__(self, source: ModelSource, mesh: Mesh) -> Loaded: ...


@dataclasses.dataclass(frozen=True)
class Build:
    """load, load_reward: a model from its source. init: a state on its shards (`parallel.init_sharded`). runs: whether what
    is built can run; checks that belong to a run are not made for shapes."""

    load: LoadModel
    load_reward: LoadReward
    init: Any
    runs: bool


ARRAYS = Build(load_model, load_reward, init_sharded, True)
SHAPES = Build(plan_model, plan_reward, init_abstract, False)
PREVIEW = Build(plan_model, plan_reward, init_abstract, True)
"""Shapes with the data of a run, to look at the data without reading weights."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings with which a job is assembled.

    steps: of the whole run, for schedules. rng: the key of initialisation. train_rng: the key of the run. run_dir: keeps the date
    that
    a chat template writes.
    """

    mesh: Mesh
    steps: int
    seed: int
    build: Build
    run_dir: str | None
    rng: Rng
    train_rng: Rng

    @classmethod
    def of(cls, mesh: Mesh, steps: int, seed: int, build: Build, run_dir: str | None = None) -> Setting:
        """Draw both keys from ``seed``."""
        rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
        return cls(mesh, steps, seed, build, run_dir, rng, train_rng)
