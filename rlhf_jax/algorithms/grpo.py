"""GRPO and its relatives (DAPO, Dr. GRPO, GSPO, RLOO): the other responses of a prompt are the baseline (Shao et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms import scoring
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.phases import Phase
from rlhf_jax.algorithms.prompts import PromptData, read_prompts
from rlhf_jax.algorithms.roles import Roles, load_roles
from rlhf_jax.algorithms.rollout_job import PHASES, Iteration, RolloutJob, StateView, make_rollout_job
from rlhf_jax.algorithms.rollout_phases import rollout_phases
from rlhf_jax.algorithms.rollouts import check_one_step_off
from rlhf_jax.algorithms.text_rewards import TextRewards
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.errors import InputError, check_unused, require_whole
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold, LoraConfig, Model, lora, policy_logprobs
from rlhf_jax.parallel import MeshConfig
from rlhf_jax.rewards import Reward, RewardSource
from rlhf_jax.types import LossFn, Mean, Params, Rng, Rollout, Scored, TrainState

VIEW = StateView(subtree="params/policy", train=lambda state: state, with_train=lambda state, train: train)
"""Where `TrainState` keeps its parts."""


@dataclasses.dataclass(frozen=True)
class GRPO:
    """A description of GRPO: the parameters of `train_grpo`.

    batch.batch_size: responses of an iteration, ``samples`` of each prompt. The other fields are those of `PPO`.
    """

    policy: ModelSource
    batch: BatchConfig
    samples: int
    sampling: rollout.SamplingConfig
    grpo: learn.GRPOConfig
    optimizer: learn.OptimizerConfig
    prompts: RecordSource | Records | None = None
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE
    rollout_mesh: MeshConfig | None = None
    reward: ModelSource | None = None
    reward_texts: Reward | RewardSource | None = None
    reward_key: str = "gold"
    monitor: Reward | RewardSource | None = None
    lora: LoraConfig | None = None
    offload_optimizer: bool = False
    one_step_off: bool = False

    name: ClassVar[str] = "grpo"
    run_only: ClassVar[tuple[str, ...]] = ("prompts",)
    phase_names: ClassVar[tuple[str, ...]] = PHASES

    def __post_init__(self) -> None:
        check_unused(self.batch, "packed")
        require_whole("run.samples", self.samples, 2)
        if self.batch.batch_size % self.samples:
            raise InputError(
                f"BatchConfig.batch_size = {self.batch.batch_size}: give a multiple of run.samples = {self.samples}"
            )

    def assemble(self, setting: Setting) -> RolloutJob:
        """Return the models, the state, the four functions of an iteration and, for a run, prompts and rewards."""
        config = self.grpo
        texts = None
        if setting.build.runs:
            texts = TextRewards.beside(self.reward, self.reward_texts, self.reward_key, self.monitor)
            check_one_step_off(self.one_step_off, config, texts)
        anchored = config.kl_coefficient > 0
        roles = load_roles(setting, self.policy, self.reward, self.lora, value=False, reference=anchored)
        prompts, template = read_prompts(setting, self, roles, samples=self.samples)
        ends = roles.ends(template, self.sampling.stop_strings)
        return self.wire(setting, roles, ends, prompts, texts)

    def wire(
        self,
        setting: Setting,
        roles: Roles,
        ends: Mapping[str, Any],
        prompts: PromptData | None = None,
        texts: TextRewards | None = None,
    ) -> RolloutJob:
        """Return state and jitted functions for models that are loaded.

        ends: the tokens and texts that end a response (`Roles.ends`).
        """
        mesh, config = setting.mesh, self.grpo
        updates = config.epochs * config.minibatches
        optimizer = learn.make_optimizer(self.optimizer, setting.steps, updates, matrices=roles.matrices())

        def begin(params: Params) -> TrainState:
            return learn.initial_state(params, optimizer, setting.train_rng)

        state = setting.build.init(begin, roles.shardings(mesh), mesh, roles.trainable)
        roles = roles.without_trainable()

        def prepare(
            scored: Scored, scores: dict[str, jax.Array], counts: jax.Array
        ) -> tuple[learn.GroupBatch, dict[str, Mean]]:
            return learn.prepare_groups(Rollout.of(scored, scores, counts), config, self.samples)

        def update(
            state: TrainState,
            frozen: Params,
            batch: learn.GroupBatch,
            rng: Rng,
            measured: Mapping[str, Mean],
            fold: Fold | None = None,
        ) -> tuple[TrainState, dict[str, Any]]:
            del measured
            # No dropout: the first ratio must be 1.
            loss = lora.on_adapters(self._loss(scoring.folded(roles.models, fold)), None)
            train_step = learn.make_train_step(loss, optimizer, microbatches=self.batch.microbatches)
            return learn.update_groups(train_step, state, batch, rng, config, frozen)

        return make_rollout_job(
            self,
            config,
            setting,
            roles,
            state,
            view=VIEW,
            iteration=Iteration(prepare, update, self._loss(roles.models)),
            ends=ends,
            prompts=prompts,
            texts=texts,
        )

    def _loss(self, models: Mapping[str, Model]) -> LossFn:
        """Return the loss of the update, over whole parameters."""

        def logprobs(params: Params, completions: Any) -> Any:
            temperature = self.sampling.temperature
            return policy_logprobs(models["policy"], params["policy"], completions, temperature=temperature)

        return learn.make_grpo_loss(logprobs, self.grpo)

    def phases(self, job: RolloutJob) -> list[Phase]:
        """Return the four phases of an iteration, for shapes."""
        names = () if self.reward_texts is None else (self.reward_key,)
        return rollout_phases(job, names)
