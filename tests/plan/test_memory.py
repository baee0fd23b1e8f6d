"""Bytes from the architecture, against numbers worked by hand; against compiled TPU programs: test_tpu_aot.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models import Model
from rlhf_jax.plan.memory import (
    block_bytes,
    cache_bytes,
    copied_bytes,
    head_bytes,
    leaf_bytes,
    learning,
    saved_bytes,
    scoring_bytes,
    table_bytes,
)
from rlhf_jax.testing import mesh_of, tiny_config

HEAD = 64 * 16
"""Weights of the table, and of the head."""


def over(fsdp: int, tensor: int = 1, data: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_bytes() -> None:
    """Keys and values of 2 layers x 3 rows x 2 heads x 15 columns x 8, float32; two block inputs and the last output."""
    assert cache_bytes(tiny_config(), 3, 15) == 2 * 2 * 3 * 2 * 15 * 8 * 4
    assert saved_bytes(tiny_config(remat=True), 3, 15) == 3 * 3 * 15 * 16 * 4
    assert saved_bytes(tiny_config(), 3, 15) is None
    # "cheap" keeps of each layer beside its input: q 4 x 8, k and v 2 x 2 x 8, the output 16, gate and up 2 x 32.
    assert saved_bytes(tiny_config(remat="cheap"), 3, 15) == (2 * (16 + 32 + 32 + 16 + 64) + 16) * 3 * 15 * 4


def test_a_block() -> None:
    """3 rows of 10 in float32: two blocks of 3072 weights and two norms of 16 (and the last norm, over 2 layers), 3 x 10 x (2 x
    32 + 4 x 16) activations, the scores of 4 heads twice; backward 5 x 32 + 10 x 16, and three times."""
    model = Model(tiny_config())
    weights, scores = 2 * (3072 + 32) * 4 + 16 * 4, 3 * 4 * 10 * 10 * 4
    assert block_bytes(model, 3, 10, over(4), backward=False) == weights + 3 * 10 * 128 * 4 + 2 * scores
    assert block_bytes(model, 3, 10, over(4), backward=True) == weights + 3 * 10 * 320 * 4 + 3 * scores
    halves = weights // 2 + 3 * 10 * (32 + 64) * 4 + scores
    assert block_bytes(model, 3, 10, over(4, tensor=2), backward=False) == halves


def test_a_head() -> None:
    """A chunk of 8 columns of 3 rows' logits; over 4 chips the head comes in whole tiles of 8 rows, over 16 it does not: it and its
    copy, as with copies of the parameters; backward its gradient."""
    model = Model(tiny_config(logits_chunk=8))
    logits = 4 * 3 * 8 * 64
    actual = [head_bytes(model, 3, 10, over(fsdp), backward=False) - logits for fsdp in (1, 4, 16)]
    assert actual == [0, 0, 8 * HEAD]
    assert head_bytes(model, 3, 10, over(4, data=2), backward=False) == 8 * HEAD + logits
    assert head_bytes(model, 3, 10, over(4), backward=True) == 4 * HEAD + logits
    assert head_bytes(Model(tiny_config(head="scalar")), 3, 10, over(4), backward=True) == 0


def test_a_table() -> None:
    """64 words. 3 rows of 5 on 4 chips are 60 tokens: their rows travel, made and added up. Of 3 of 6 the table does, backward
    its float32 gradient, which a ring of 256 sums on every chip."""
    model = Model(tiny_config())
    assert table_bytes(model, 3, 5, over(4), backward=True) == 2 * 60 * 16 * 4
    assert table_bytes(model, 3, 6, over(4), backward=False) == 4 * HEAD
    assert table_bytes(model, 3, 6, over(64), backward=True) == 4 * HEAD
    assert table_bytes(model, 3, 6, over(256), backward=True) == 8 * HEAD
    assert table_bytes(model, 3, 6, over(1), backward=True) == 0


def test_scoring() -> None:
    """Two models: the head of the first with its logits, and the second's table on its way."""
    model = Model(tiny_config(logits_chunk=8))
    one = head_bytes(model, 8, 64, over(4), backward=False)
    alone, pair = (scoring_bytes([(model, 64)] * count, 8, 64, over(4)) for count in (1, 2))
    block = block_bytes(model, 8, 64, over(4), backward=False)
    assert alone == max(block, one) and pair == max(block, one + 4 * HEAD)


def test_one_model_goes_backward_after_another() -> None:
    """Parameters of 100 numbers each on one chip, in float32 as the products. In one microbatch the gradients of the first wait;
    in several their sum has a place of its own."""
    models = [Model(tiny_config(remat=True, head="scalar"))] * 2
    params = {name: jax.ShapeDtypeStruct((100,), jnp.float32) for name in ("policy", "value")}
    actual = {parts: learning(models, params, over(1), parts, 3, 10, 5) for parts in (1, 2)}
    block, remaining = block_bytes(models[0], 3, 10, over(1), backward=True), saved_bytes(models[0].config, 3, 10)
    assert [actual[parts].gradients for parts in (1, 2)] == [800, 1200]
    assert all((one.activations, one.casts, one.passing) == (remaining, 0, block) for one in actual.values())
    assert actual[2].total == 1200 + remaining + block


def test_sums_of_tables_that_are_not_scattered_wait() -> None:
    """A ring of 256: the first model's whole float32 sum beside the second's gradient and sum; what its block needs is less."""
    models = [Model(tiny_config(remat=True, head="scalar", vocab_size=4096))] * 2
    params = {name: jax.ShapeDtypeStruct((100,), jnp.float32) for name in ("policy", "value")}
    actual = learning(models, params, over(256), 1, 2, 10, 5)
    table = 4096 * 16 * 4
    assert (actual.gradients, actual.activations, actual.passing) == (800 + table, 0, 2 * table)


def test_short_rows_are_copied_in_whole_tiles() -> None:
    """[256, 64] as if it were [256, 128], in float32; [64, 256] fills its tiles."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 64), (64, 256), (64,), (2, 256, 8))]
    assert copied_bytes(shapes) == 256 * 128 * 4 + 2 * 256 * 128 * 4


@pytest.mark.parametrize(("spec", "size"), [(("fsdp", None), 64), ((None, "tensor"), 128), ((None, None), 256)])
def test_a_chip_holds_its_shard(spec: tuple, size: int) -> None:
    """[8, 8] float32 on 1 x 4 x 2 devices."""
    sharding = NamedSharding(mesh_of(1, 4, 2), PartitionSpec(*spec))
    assert leaf_bytes(jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)) == size
