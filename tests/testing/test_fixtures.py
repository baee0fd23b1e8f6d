"""The shipped test fixtures themselves."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.testing import (
    bytes_per_device,
    completions,
    count_reward,
    mesh_of,
    prompt_batch,
    random_prompts,
    table_reward,
    tiny_model,
    token_batch,
)


def test_parameters_avoid_special_values_and_share_names():
    model, params = tiny_model("lm+scalar")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract()
    )
    for leaf in jax.tree.leaves(params):
        assert np.isfinite(leaf).all() and not np.isin(leaf, (0.0, 1.0)).any()
    _, trunk = tiny_model("lm")
    np.testing.assert_array_equal(trunk["layers"]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"])
    assert (tiny_model("lm", seed=1)[1]["embed"]["embedding"] != trunk["embed"]["embedding"]).all()


def test_batches_by_hand():
    batch = token_batch([[5, 6, 7], [8], []], length=4, prompt_lengths=[2, 1, 0])
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, False], [False] * 4, [False] * 4]
    prompts = prompt_batch([[3, 4], [5]], width=3)
    assert prompts.tokens.tolist() == [[0, 3, 4], [0, 0, 5]]
    assert prompts.mask.tolist() == [[False, True, True], [False, False, True]]
    outcome = completions(prompts, [[7, 2], [7, 7, 7]], length=3)
    assert outcome.ended.tolist() == [True, False]
    assert outcome.mask.tolist() == [[True, True, False], [True, True, True]]
    assert random_prompts(0, 9, 5, 64).mask.sum(axis=1).max() == 5


def test_toy_rewards_ignore_padding():
    outcome = completions(prompt_batch([[3], [4]]), [[7, 2], [9, 7, 7]], length=4, pad_id=7)
    assert count_reward(outcome, 7).tolist() == [1.0, 2.0]
    table = jnp.zeros(10).at[7].set(0.5).at[9].set(-1.5)
    assert table_reward(outcome, table).tolist() == [0.5, -1.5]


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="row 1 has 3 tokens"):
        token_batch([[1], [1, 2, 3]], length=2)
    with pytest.raises(InputError, match="needs 16 devices"):
        mesh_of(data=16)


def test_bytes_count_every_copy():
    mesh = mesh_of(data=2, tensor=2)
    split = jax.device_put(jnp.zeros((8, 8)), jax.NamedSharding(mesh, jax.P("data", "tensor")))
    whole = jax.device_put(jnp.zeros((5,), jnp.bfloat16), jax.NamedSharding(mesh, jax.P()))
    assert bytes_per_device({"a": split, "b": whole}) == dict.fromkeys(range(4), 8 * 8 * 4 // 4 + 5 * 2)


def test_pretended_devices_in_a_fresh_process():
    program = (
        "from rlhf_jax.testing import pretend_devices\n"
        "pretend_devices(3)\n"
        "import jax\n"
        "assert len(jax.devices()) == 3\n"
        "try:\n"
        "    pretend_devices(5)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    completions = subprocess.run(
        [sys.executable, "-c", program], env={"PATH": "", "HOME": "/"}, capture_output=True, text=True, timeout=120
    )
    assert completions.returncode == 0, completions.stderr
    assert "call it before anything else" in completions.stdout
