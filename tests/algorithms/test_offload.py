"""The optimiser in the hosts' memory between updates: the same numbers by the same program."""

from __future__ import annotations

import jax
import numpy as np

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms import GRPO
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint, to_global
from rlhf_jax.testing import IN_MEMORY, mesh_of, random_params, random_prompts, roles_of, setting_of, tiny_config


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_an_offloaded_optimizer_changes_nothing() -> None:
    mesh = mesh_of(fsdp=8)
    model = Model(tiny_config(), ActivationConstraint(mesh))
    params = random_params(model, 0)
    algorithm = GRPO(
        policy=IN_MEMORY,
        batch=BatchConfig(8, 4),
        samples=2,
        sampling=rollout.SamplingConfig(max_new_tokens=4),
        grpo=learn.GRPOConfig(),
        optimizer=learn.OptimizerConfig(learning_rate=1e-2),
        offload_optimizer=True,
    )
    ends = {"eos_ids": (2,), "pad_id": 0}
    jobs = [algorithm.wire(setting_of(mesh, steps=4), roles_of(policy=(model, params)), ends) for _ in range(2)]
    job, resident, offloaded = jobs[0], jobs[0].state, jobs[1].state
    prompts = to_global(random_prompts(0, 8, 4, 64), mesh)
    completions = job.generate(resident.params, {}, prompts, jax.random.key(0))
    scores = to_global(({"gold": np.arange(8, dtype=np.float32)}, np.ones(8, bool)), mesh)
    batch, _ = job.prepare(job.score(resident.params, {}, completions), *scores)
    for _ in range(3):
        resident, _ = job.update(resident, {}, batch, jax.random.key(1), {})
    compiled = job.update._cache_size()
    for _ in range(3):
        offloaded = job.offload(offloaded)
        assert kinds(offloaded.opt_state) == {"pinned_host"} and kinds(offloaded.params) == {"device"}
        offloaded, _ = job.update(job.reload(offloaded), {}, batch, jax.random.key(1), {})
    assert job.update._cache_size() == compiled
    same = jax.tree.map(
        lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), resident.opt_state, offloaded.opt_state
    )
    assert all(jax.tree.leaves(same))
    jax.tree.map(np.testing.assert_array_equal, resident.params, offloaded.params)
