"""The fields that PPO and GRPO have in common."""

from __future__ import annotations

from typing import Protocol

from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.learn import ImportanceConfig
from rlhf_jax.learn.epochs import EpochsConfig
from rlhf_jax.learn.guards import GapLimits
from rlhf_jax.parallel import MeshConfig
from rlhf_jax.rollout import SamplingConfig, SlotConfig


class Limits(GapLimits, EpochsConfig, Protocol):
    """The fields that PPOConfig and GRPOConfig have in common."""

    @property
    def importance(self) -> ImportanceConfig | None: ...


class RolloutAlgorithm(Protocol):
    """A protocol: the fields that `PPO` and `GRPO`, the classes that describe a run, have in common."""

    @property
    def name(self) -> str: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def sampling(self) -> SamplingConfig: ...
    @property
    def slots(self) -> SlotConfig: ...
    @property
    def rollout_mesh(self) -> MeshConfig | None: ...
    @property
    def prompts(self) -> RecordSource | Records | None: ...
    @property
    def offload_optimizer(self) -> bool: ...
    @property
    def one_step_off(self) -> bool: ...
