"""A job holds each array once: its state has the only copy of what is trained, also while a checkpoint is read."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms import GRPO, PPO, SFT
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.testing import IN_MEMORY, mesh_of, random_params, roles_of, setting_of, tiny_config
from rlhf_jax.testing.jobs import loaded_model

ENDS = {"eos_ids": (2,), "pad_id": 0}
SAMPLING = rollout.SamplingConfig(max_new_tokens=4)
ADAM = learn.OptimizerConfig(learning_rate=1e-2)


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def size(*trees) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


def sft_job(mesh):
    model = Model(tiny_config(), ActivationConstraint(mesh))
    algorithm = SFT(model=IN_MEMORY, batch=BatchConfig(8, 8), optimizer=ADAM)
    return algorithm.wire(setting_of(mesh), loaded_model(model, random_params(model, 0)), None)


def ppo_job(mesh):
    policy = Model(tiny_config(), ActivationConstraint(mesh))
    value = Model(tiny_config(head="scalar"), ActivationConstraint(mesh))
    algorithm = PPO(
        policy=IN_MEMORY, reward=IN_MEMORY, batch=BatchConfig(8, 4), sampling=SAMPLING, ppo=learn.PPOConfig(),
        policy_optimizer=ADAM, value_optimizer=ADAM,
    )  # fmt: skip
    models = {
        "policy": (policy, random_params(policy, 0)), "value": (value, random_params(value, 1)),
        "reference": (policy, random_params(policy, 2)), "reward": (value, random_params(value, 3)),
    }  # fmt: skip
    return algorithm.wire(setting_of(mesh), roles_of(**models), ENDS)


def grpo_job(mesh):
    policy = Model(tiny_config(), ActivationConstraint(mesh))
    algorithm = GRPO(
        policy=IN_MEMORY, batch=BatchConfig(8, 4), samples=2, sampling=SAMPLING, grpo=learn.GRPOConfig(), optimizer=ADAM
    )
    return algorithm.wire(setting_of(mesh), roles_of(policy=(policy, random_params(policy, 0))), ENDS)


def test_a_job_holds_its_state_and_frozen_models_alone() -> None:
    mesh = mesh_of(fsdp=8)
    for make in (sft_job, ppo_job, grpo_job):
        before = live_bytes()
        job = make(mesh)
        extra = live_bytes() - before - size(job.state, job.frozen)
        assert extra < 1024, (
            make.__name__,
            extra,
        )  # the keys of the setting; a copy of the parameters is 100 times that
        del job


def test_restore_frees_the_first_state(tmp_path) -> None:
    """The state that a resumed run is given only says what to read; beside the restored one it would double the peak."""
    first = {"w": jnp.zeros(1024)}
    with Checkpoints(tmp_path, Retention(keep=1)) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1024)}, {})
        remaining, _ = checkpoints.restore(first)
        assert not first["w"].is_deleted()
        restored, _ = checkpoints.restore(first, donate=True)
    assert first["w"].is_deleted() and float(restored["w"].sum()) == float(remaining["w"].sum()) == 1024.0
