"""One definition per algorithm: a frozen description, and one function that assembles models, state, jitted functions and
data, from arrays (a run) or from shapes (a plan)."""

from __future__ import annotations

from typing import Protocol, TypeVar

from jax.sharding import Mesh

from rlhf_jax.algorithms.build import ARRAYS, SHAPES, Build, Setting
from rlhf_jax.algorithms.dpo import DPO
from rlhf_jax.algorithms.grpo import GRPO
from rlhf_jax.algorithms.phases import Phase, Work
from rlhf_jax.algorithms.ppo import PPO
from rlhf_jax.algorithms.reward import RewardModel
from rlhf_jax.algorithms.sft import SFT

__all__ = ["ARRAYS", "DPO", "GRPO", "PPO", "SFT", "SHAPES", "Algorithm", "Phase", "RewardModel", "Work", "assemble"]


_JobT = TypeVar("_JobT")


class Algorithm(Protocol[_JobT]):
    """A description of an algorithm and its kind of job. name: of the stage. run_only: fields that a run needs and a plan does not.
    phase_names: the parts of a step that a deadline or a fault may name."""

    @property
    def name(self) -> str: ...
    @property
    def run_only(self) -> tuple[str, ...]: ...
    @property
    def phase_names(self) -> tuple[str, ...]: ...
    def assemble(self, setting: Setting) -> _JobT: ...
    def phases(self, job: _JobT) -> list[Phase]: ...


def assemble(
    algorithm: Algorithm[_JobT], *, mesh: Mesh, steps: int, seed: int, run_dir: str | None = None, build: Build = ARRAYS
) -> _JobT:
    """Return the job of an algorithm.

    steps: of the whole run, for schedules. run_dir: where a date that a chat template writes is kept. build: ARRAYS for a run,
    SHAPES for a plan, which reads neither weights nor data.
    """
    return algorithm.assemble(Setting.of(mesh, steps, seed, build, run_dir))
