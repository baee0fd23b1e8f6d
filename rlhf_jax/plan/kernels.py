"""Costs of splash attention's kernels: XLA cannot see into them, and JAX's kernels give no estimate of their own.

A kernel's grid is (query heads, blocks of queries, blocks of keys). Under a causal mask the block of row i meets i + 1
blocks of columns, with a sliding window at most as many as the mask's table is wide; the others are skipped.
"""

from __future__ import annotations

import re

from rlhf_jax.plan.hlo import Array

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products of a visited block. fwd: scores, weighted sum. dq: scores, gradient of the weights, of the queries. dkv:
scores, gradients of the weights, values and keys."""
_STREAMED = {"fwd": ("key", "value"), "dq": ("key", "value"), "dkv": ("query", "gradient")}
"""Operands of which a block is fetched for every visited block; of the others one a row of blocks."""


def splash_cost(name: str, operands: list[Array], results: tuple[Array, ...]) -> tuple[float, float] | None:
    """Return (operations, bytes of HBM traffic) of one call of the kernel ``name``; None when it is no splash kernel.

    operands: mask tables int8 [1, rows of blocks, columns], query [..., H, S, K], key and value [..., G, S, K], ...
    """
    match = re.match(r"splash_mha_(fwd|dq|dkv)_", name)
    if match is None:
        return None
    phase = match[1]
    table, query, key, value = operands[0], operands[2], operands[3], operands[4]
    _, rows, columns = table.dims
    visited = sum(min(row + 1, columns) for row in range(rows))
    *outer, length, size = query.dims
    block = length // rows
    heads = 1
    for dimension in outer:
        heads *= dimension
    flops = 2.0 * PRODUCTS[phase] * heads * visited * block * block * size
    gradient = next(
        (operand for operand in operands[5:] if operand.dims == query.dims and operand.dtype == query.dtype), query
    )
    arrays = {"query": query, "key": key, "value": value, "gradient": gradient}
    streamed = [arrays[operand] for operand in _STREAMED[phase]]
    fetched = sum(heads * visited * block * size * (operand.hbm / operand.elements) for operand in streamed)
    once = sum(operand.hbm for operand in (*operands[1:], *results) if operand not in streamed)
    return flops, fetched + once


def visited_pairs(length: int, window: int | None, block: int) -> int:
    """Return the number of pairs (query, key) of one head that a kernel computes, masked ones in visited blocks included.

    2,048 tokens in blocks of 512 visit 1 + 2 + 3 + 4 blocks of 16. window: as in `models.splash.splash_attention`.
    """
    blocks = length // block
    widest = blocks if window is None else (window - 2) // block + 2
    return sum(min(row + 1, widest) for row in range(blocks)) * block * block
