"""Counts from the architecture, against numbers worked by hand and against compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models import Model
from rlhf_jax.plan import count, parse_module
from rlhf_jax.plan.analytic import (
    block_weights,
    cache_bytes,
    end_bytes,
    forward_flops,
    generate_flops,
    leaf_bytes,
    passing_bytes,
    saved_bytes,
)
from rlhf_jax.testing import mesh_of, tiny_config


def test_weights_a_token_meets() -> None:
    """2 layers of hidden 16, 4 + 4 heads and 2 + 2 key/value heads of 8, feed-forward 32: 2 x (16 x 8 x 12 + 3 x 16 x 32)."""
    assert block_weights(tiny_config()) == 2 * (1536 + 1536)


def test_forward_pass_equals_the_compiled_program() -> None:
    """3 rows of 10: 2 x 30 x 6144 + 3 x 4 x 2 x 100 x 4 x 8 + 2 x 30 x 16 x 64."""
    config = tiny_config()
    assert forward_flops(config, 3, 10, 10) == 368640 + 76800 + 61440
    model = Model(config)
    tokens = jax.ShapeDtypeStruct((3, 10), jnp.int32)
    text = jax.jit(model.apply).lower(model.abstract(), tokens).compile().as_text()
    assert count(parse_module(text), {"x": 1}).flops == 506880


def test_decoding() -> None:
    """Prefill without logits, then 5 tokens each read a cache of 10 + 5: 2 x 3 x 6144 + 3 x 4 x 2 x 15 x 32 + 2 x 3 x 16 x 64."""
    config = tiny_config()
    assert generate_flops(config, 3, 10, 5) == (368640 + 76800) + 5 * (36864 + 11520 + 6144)


def test_bytes() -> None:
    """Keys and values of 2 layers x 3 rows x 2 heads x 15 columns x 8, float32; two block inputs and the last output."""
    assert cache_bytes(tiny_config(), 3, 15) == 2 * 2 * 3 * 2 * 15 * 8 * 4
    assert saved_bytes(tiny_config(remat=True), 3, 15) == 3 * 3 * 15 * 16 * 4
    assert saved_bytes(tiny_config(), 3, 15) is None
    # "cheap" keeps of each layer beside its input: q 4 x 8, k and v 2 x 2 x 8, the output 16, gate and up 2 x 32.
    assert saved_bytes(tiny_config(remat="cheap"), 3, 15) == (2 * (16 + 32 + 32 + 16 + 64) + 16) * 3 * 15 * 4


def test_whole_gradients_of_tables() -> None:
    """64 words x 16 in float32. One where the compiler scatters them; with copies (data) the own and the summed one of each
    model; in a ring of 256 the head's as well."""
    policy, value = Model(tiny_config()), Model(tiny_config(head="scalar"))
    whole = 64 * 16 * 4

    def ends(data: int, fsdp: int, *models: Model) -> int:
        return end_bytes(models, {"data": data, "fsdp": fsdp, "tensor": 1})

    assert ends(1, 8, policy) == ends(1, 64, policy, value) == whole
    assert ends(4, 64, policy) == 2 * whole and ends(4, 64, policy, value) == 4 * whole
    assert ends(1, 256, policy) == 3 * whole and ends(1, 256, policy, value) == 5 * whole
    assert end_bytes([policy], {"data": 1, "fsdp": 4, "tensor": 2}) == whole // 2


def test_what_passes_forward() -> None:
    """3 rows of 10 in float32: two blocks of 3072 weights and two norms of 16, 3 x 10 x (2 x 32 + 4 x 16) activations, the
    scores of 4 heads twice, 3 x 8 columns of logits; over 4 chips the head in whole tiles of 8 rows, over 16 a copy of it."""
    model = Model(tiny_config(logits_chunk=8))
    rest = 2 * (3072 + 32) * 4 + 3 * 10 * 128 * 4 + 3 * 4 * 10 * 10 * 4 * 2 + 4 * 3 * 8 * 64
    found = {
        fsdp: passing_bytes(model, 3, 10, 10, {"data": 1, "fsdp": fsdp, "tensor": 1}, backward=False)
        for fsdp in (1, 4, 16)
    }
    head = 64 * 16 * 4
    assert found[4] - found[1] == head and found[16] - found[1] == 2 * head
    assert found[1] - rest == pytest.approx(0, abs=2 * 16 * 4)  # the last norm


@pytest.mark.parametrize(("spec", "size"), [(("fsdp", None), 64), ((None, "tensor"), 128), ((None, None), 256)])
def test_a_chip_holds_its_shard(spec: tuple, size: int) -> None:
    """[8, 8] float32 on 1 x 4 x 2 devices."""
    sharding = NamedSharding(mesh_of(1, 4, 2), PartitionSpec(*spec))
    assert leaf_bytes(jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)) == size
