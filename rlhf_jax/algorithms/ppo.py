"""PPO (Schulman et al. 2017) for language models (Ziegler et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

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
from rlhf_jax.errors import check_unused
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Fold, LoraConfig, Model, lora
from rlhf_jax.parallel import MeshConfig
from rlhf_jax.rewards import Reward, RewardSource
from rlhf_jax.types import LossFn, Mean, Params, PolicyBatch, Rng, Rollout, Scored

VIEW = StateView(
    subtree="train/params/policy",
    train=lambda state: state.train,
    with_train=lambda state, train: dataclasses.replace(state, train=train),
    extra=lambda state: (state.kl_coefficient,),
)
"""Where `learn.PPOState` keeps its parts."""


@dataclasses.dataclass(frozen=True)
class PPO:
    """A description of PPO: the parameters of `train_ppo`.

    prompts: None in a plan. reward, reward_texts: exactly one; a reward model, from which the value model starts, or a function of
    texts whose ``reward_key`` is the score. monitor: scores of texts that are logged and not trained on. share_trunk: put the value
    head on the policy's trunk. rollout_mesh: the run's devices in another shape, for sampling. offload_optimizer: keep the
    optimizer
    state in host memory during rollouts. one_step_off: sample the next rollout with the policy before the update, while texts are
    judged.
    """

    policy: ModelSource
    batch: BatchConfig
    sampling: rollout.SamplingConfig
    ppo: learn.PPOConfig
    policy_optimizer: learn.OptimizerConfig
    value_optimizer: learn.OptimizerConfig
    prompts: RecordSource | Records | None = None
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE
    rollout_mesh: MeshConfig | None = None
    reward: ModelSource | None = None
    reward_texts: Reward | RewardSource | None = None
    reward_key: str = "gold"
    monitor: Reward | RewardSource | None = None
    share_trunk: bool = False
    lora: LoraConfig | None = None
    offload_optimizer: bool = False
    one_step_off: bool = False

    name: ClassVar[str] = "ppo"
    run_only: ClassVar[tuple[str, ...]] = ("prompts",)
    phase_names: ClassVar[tuple[str, ...]] = PHASES

    def __post_init__(self) -> None:
        check_unused(self.batch, "packed")

    def assemble(self, setting: Setting) -> RolloutJob:
        """Return the models, the state, the four functions of an iteration and, for a run, prompts and rewards."""
        config = self.ppo
        texts = None
        if setting.build.runs:
            texts = TextRewards.beside(self.reward, self.reward_texts, self.reward_key, self.monitor)
            check_one_step_off(self.one_step_off, config, texts)
        roles = load_roles(
            setting, self.policy, self.reward, self.lora, share_trunk=self.share_trunk, value=True, reference=True
        )
        prompts, template = read_prompts(setting, self, roles, samples=1)
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
        mesh, config = setting.mesh, self.ppo
        optimizer = self._optimizer(setting.steps, roles)

        def begin(params: Params) -> learn.PPOState:
            if self.share_trunk:  # a value head on the policy's trunk begins with every value 0 (Ziegler et al. 2019)
                head = jax.tree.map(jnp.zeros_like, params["policy"]["scalar_head"])
                params = params | {"policy": params["policy"] | {"scalar_head": head}}
            train = learn.initial_state(params, optimizer, setting.train_rng)
            return learn.PPOState(train, jnp.asarray(config.kl_coefficient, jnp.float32))

        state = setting.build.init(begin, roles.shardings(mesh), mesh, roles.trainable)
        roles = roles.without_trainable()

        def prepare(
            scored: Scored, scores: dict[str, jax.Array], counts: jax.Array, kl_coefficient: jax.Array
        ) -> tuple[PolicyBatch, dict[str, Mean]]:
            return learn.prepare(Rollout.of(scored, scores, counts), config, kl_coefficient)

        def update(
            state: learn.PPOState,
            frozen: Params,
            batch: PolicyBatch,
            rng: Rng,
            measured: Mapping[str, Mean],
            fold: Fold | None = None,
        ) -> tuple[learn.PPOState, dict[str, Any]]:
            # No dropout: the first ratio must be 1.
            loss = lora.on_adapters(self._loss(scoring.folded(roles.models, fold)), None)
            train_step = learn.make_train_step(loss, optimizer, microbatches=self.batch.microbatches)
            train, metrics = learn.update(train_step, state.train, batch, rng, config, frozen)
            coefficient = state.kl_coefficient
            following = learn.next_kl_coefficient(config, coefficient, measured["kl"].value(), self.batch.batch_size)
            return learn.PPOState(train, following), metrics | {"kl_coefficient": coefficient}

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

    def _optimizer(self, steps: int, roles: Roles) -> optax.GradientTransformation:
        """Return one optimizer for the leaves of the policy and another for those of the value model."""
        updates, matrices = self.ppo.epochs * self.ppo.minibatches, roles.matrices()
        configs = {"policy": self.policy_optimizer, "value": self.value_optimizer}
        optimizers = {
            role: learn.make_optimizer(config, steps, updates, matrices=matrices) for role, config in configs.items()
        }
        return optax.partition(optimizers, learn.ppo_optimizer_labels)

    def _loss(self, models: Mapping[str, Model]) -> LossFn:
        """Return the loss of the update, over whole parameters."""

        def policy_fn(params: Params, completions: Any) -> Any:
            return scoring.policy_and_values(models, params, completions, temperature=self.sampling.temperature)

        return learn.make_ppo_loss(policy_fn, self.ppo)

    def phases(self, job: RolloutJob) -> list[Phase]:
        """Return the four phases of an iteration, for shapes."""
        names = () if self.reward_texts is None else (self.reward_key,)
        return rollout_phases(job, names)
