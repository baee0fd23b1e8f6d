"""Names of slices, and the roofline."""

from __future__ import annotations

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.plan import CHIPS, Cost, parse_slice, roofline


def test_names_of_slices() -> None:
    one, two = parse_slice("v5p:2x2x4"), parse_slice("v5e:4x8*2")
    assert (one.chip.name, one.grid, one.chips, one.slices) == ("v5p", (2, 2, 4), 16, 1)
    assert (two.chip.name, two.grid, two.chips, two.slices) == ("v5e", (4, 8), 64, 2)


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5p:2", "v5p:2x2x2x2", "v5p:0x2", "v5p:2x2*0", "v5p-16"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"--plan={name.replace('*', '.')}: "):
        parse_slice(name)


def test_roofline() -> None:
    """v5e: 197e12 operations take a second; so do 819e9 bytes of HBM traffic, and 200e9 bytes sent."""
    times = roofline(Cost(flops=197e12, hbm_bytes=2 * 819e9, moved={("all-reduce", "fsdp"): 50e9}), CHIPS["v5e"])
    assert (times.compute, times.hbm, times.ici) == pytest.approx((1, 2, 0.25))
    assert times.bound == pytest.approx(2) and times.limit == "hbm"
