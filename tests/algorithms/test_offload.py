"""The optimiser in the hosts' memory between updates: the same numbers by the same program."""

from __future__ import annotations

import jax
import numpy as np

from rlhf_jax import learn
from rlhf_jax.algorithms import programs
from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint, born_sharded, to_global, tree_shardings
from rlhf_jax.testing import mesh_of, random_params, tiny_config, token_batch


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_an_optimiser_that_sleeps_between_updates_changes_nothing() -> None:
    mesh = mesh_of(fsdp=8)
    model = Model(tiny_config(), ActivationConstraint(mesh))
    adam = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-2), 4)
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)

    def begin(params):
        return learn.initial_state(params, adam, jax.random.key(0))

    params = random_params(model, 0)
    awake, slept = (born_sharded(begin, shardings, mesh, params) for _ in range(2))
    home = programs.placed(slept.opt_state)
    step = programs.sft_functions(model, adam, awake, mesh, microbatches=1).train_step
    batch = to_global(token_batch(np.random.default_rng(0).integers(2, 64, (8, 12)).tolist()), mesh)
    for _ in range(3):
        awake, _ = step(awake, {}, batch)
    compiled = step._cache_size()
    for _ in range(3):
        slept = programs.asleep(slept)
        assert kinds(slept.opt_state) == {"pinned_host"} and kinds(slept.params) == {"device"}
        slept, _ = step(programs.awake(slept, home), {}, batch)
    assert step._cache_size() == compiled
    same = jax.tree.map(
        lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), awake.opt_state, slept.opt_state
    )
    assert all(jax.tree.leaves(same))
    jax.tree.map(np.testing.assert_array_equal, awake.params, slept.params)
