"""Names of slices, the roofline, and what is said of a program that is too large."""

from __future__ import annotations

import pytest

from rlhf_jax.plan import CHIPS, Cost, parse_slice, roofline
from rlhf_jax.plan.compiled import out_of_memory
from rlhf_jax.types import InputError


def test_names_of_slices() -> None:
    one, two = parse_slice("v5p:2x2x4"), parse_slice("v5e:4x8*2")
    assert (one.chip.name, one.grid, one.chips, one.slices) == ("v5p", (2, 2, 4), 16, 1)
    assert (two.chip.name, two.grid, two.chips, two.slices) == ("v5e", (4, 8), 64, 2)


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5p:2", "v5p:2x2x2x2", "v5p:0x2", "v5p:2x2*0", "v5p-16"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"--topology={name.replace('*', '.')}: "):
        parse_slice(name)


def test_roofline() -> None:
    """v5e: 197e12 operations take a second; so do 819e9 bytes of HBM traffic, and 200e9 bytes sent."""
    times = roofline(Cost(flops=197e12, hbm_bytes=2 * 819e9, moved={("all-reduce", "fsdp"): 50e9}), CHIPS["v5e"])  # type: ignore[arg-type]
    assert (times.compute, times.hbm, times.ici) == pytest.approx((1, 2, 0.25))
    assert times.bound == pytest.approx(2) and times.limit == "hbm"


def test_the_compilers_own_report_of_too_little_memory() -> None:
    message = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.60G of 31.25G hbm.

Total hbm usage >= 34.35G:

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(update)/while/body/dot_general" source_file="x.py"
     Shape: bf16[32,64,2048]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G

  2. Size: 512.0M
     Shape: f32[128,1024]{1,0:T(8,128)}
"""
    first, buffers = out_of_memory(message)
    assert "Used 33.60G of 31.25G" in first
    assert buffers == [
        ("jit(update)/while/body/dot_general bf16[32,64,2048]", 8 * 2**30),
        ("unnamed f32[128,1024]", 2**29),
    ]
