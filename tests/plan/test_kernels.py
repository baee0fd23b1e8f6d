"""The cost of splash attention's kernels, against masks counted block by block and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.models import Model
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.plan import count, parse_module
from rlhf_jax.plan.analytic import adapter_weights, forward_flops, model_flops, self_attention_flops, training_flops
from rlhf_jax.plan.kernels import visited_pairs
from rlhf_jax.testing import tiny_config


@pytest.mark.parametrize("window", [None, 1, 2, 100, 128, 129, 130, 257, 400, 5000])
def test_visited_pairs_are_those_of_blocks_with_a_mask(window: int | None) -> None:
    length, block = 1024, 128
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    mask = (key <= query) & (key > query - (length if window is None else window))
    blocks = mask.reshape(length // block, block, length // block, block).any(axis=(1, 3))
    assert visited_pairs(length, window, block) == blocks.sum() * block * block


KERNEL = """HloModule m

ENTRY %main (t: s8[1,4,4]) -> bf16[2,8,2048,128] {
  %t = s8[1,4,4]{2,1,0} parameter(0)
  %u = s8[1,4,4]{2,1,0} parameter(1)
  %q = bf16[2,8,2048,128]{3,2,1,0} parameter(2)
  %k = bf16[2,4,2048,128]{3,2,1,0} parameter(3)
  %v = bf16[2,4,2048,128]{3,2,1,0:S(1)} parameter(4)
  ROOT %NAME.1 = bf16[2,8,2048,128]{3,2,1,0} custom-call(%t, %u, %q, %k, %v), CALL, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, backend_config={"custom_call_config":{"body":"x"}}
}
""".replace("CALL", 'custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_operations_of_a_kernel(phase: str, products: int) -> None:
    """2 rows x 8 heads x 10 of 16 blocks of 512 x 512 x 128, 2 a product."""
    text = KERNEL.replace("NAME", f"splash_mha_{phase}_segmented_no_residuals")
    cost = count(parse_module(text), {"x": 1})
    assert cost.flops == products * 2 * 2 * 8 * 10 * 512 * 512 * 128 and not cost.silent


def test_traffic_of_a_kernel() -> None:
    """Forward: queries read and results written once, a block of keys for each of 10 visited blocks of each head; values
    are near the core."""
    text = KERNEL.replace("NAME", "splash_mha_fwd_segmented_no_residuals")
    rows = 2 * 8 * 2048 * 128 * 2
    assert count(parse_module(text), {"x": 1}).hbm_bytes == 2 * rows + 2 * 8 * 10 * 512 * 128 * 2 + 16


def test_a_kernels_estimate_is_found_behind_a_line_break() -> None:
    message = '"custom_call_config":{"cost_estimate":{"flops":"7","bytes_accessed":"5"},"body":"x"}'
    text = KERNEL.replace("NAME", "mine").replace('"custom_call_config":{"body":"x"}', message)
    cost = count(parse_module(text), {"x": 1})
    assert (cost.flops, cost.hbm_bytes, dict(cost.kernels), dict(cost.silent)) == (7, 5, {"mine": 1}, {})


def test_attention_counts_as_its_implementation_computes_it() -> None:
    """2 layers, 4 heads of 8: the square of 2,048, or 10 of its 16 blocks; 100 tokens are one block of 128."""
    config = tiny_config()
    assert self_attention_flops(config, 2048, "blocks") == 4 * 2 * 4 * 8 * 2048 * 2048 * 9 // 16  # eight of them
    assert self_attention_flops(config, 2048, "xla") == 4 * 2 * 4 * 8 * 2048 * 2048
    assert self_attention_flops(config, 2048, "splash") == 4 * 2 * 4 * 8 * 10 * 512 * 512
    assert self_attention_flops(config, 100, "splash") == 4 * 2 * 4 * 8 * 128 * 128


def test_operations_of_adapters() -> None:
    """Rank 3 on every matrix of 2 layers (16 wide; query and output 32, key and value 16, feed-forward 32):
    3 x 2 x (2 x 48 + 2 x 32 + 3 x 48) weights. Frozen matrices have no gradient of their own."""
    model = Model(tiny_config(), lora=LoraConfig(rank=3))
    adapters = 3 * 2 * (2 * 48 + 2 * 32 + 3 * 48)
    assert adapter_weights(model) == adapters
    frozen = forward_flops(model.config, 3, 10, 10)
    assert model_flops(model, 3, 10, 10) == frozen + 2 * 30 * adapters
    assert training_flops(model, 3, 10, 10) == 2 * frozen + 3 * 2 * 30 * adapters
    plain = Model(tiny_config())
    assert training_flops(plain, 3, 10, 10) == 3 * frozen
