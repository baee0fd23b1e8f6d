"""TPU chips and slices: what a name such as v5p:2x2x4 stands for, and the numbers that a roofline needs."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from rlhf_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. flops: bfloat16, per second. hbm_bytes: capacity. hbm_bandwidth, ici_bandwidth: bytes per second;
    ici_bandwidth is what leaves the chip over all its links together. hbm_usable: bytes that the compiler gives to a
    program, as libtpu 0.0.42 says when a program needs more. source: where the first four stand."""

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    hbm_usable: float
    source: str


def _chip(name: str, tflops: float, hbm_gb: float, hbm_gbps: float, ici_gbit: float, usable_gib: float) -> Chip:
    source = f"https://cloud.google.com/tpu/docs/{name}"
    return Chip(name, tflops * 1e12, hbm_gb * 1e9, hbm_gbps * 1e9, ici_gbit * 1e9 / 8, usable_gib * GIB, source)


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", 275, 32, 1228, 2400, 30.75),
        _chip("v5e", 197, 16, 819, 1600, 15.75),
        _chip("v5p", 459, 95, 2765, 4800, 95.74),
        _chip("v6e", 918, 32, 1640, 3584, 31.25),
    )
}
"""Peak bfloat16 TFLOP/s, HBM GB, HBM GB/s, interconnect Gbit/s: the tables "System architecture" of Google's pages.
Usable HBM: measured, see `Chip`."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: chips on a grid, ``slices`` of them joined by the data centre's network. name: as it was given."""

    name: str
    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices together."""
        return math.prod(self.grid) * self.slices

    def devices(self) -> list[jax.Device]:
        """Return devices to compile for; no program can run on them.

        Raises InputError when libtpu is missing or does not know the slice.
        """
        # Without it libtpu asks a metadata server that only a TPU machine has, for minutes.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # Nothing runs on a TPU here, so several plans may use libtpu at the same time.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        name = f"{self.chip.name}:{'x'.join(map(str, self.grid))}"
        more: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":  # as a v4 machine runs JAX: both cores of a chip are one device
            more["chip_config_name"] = "megacore"
        try:
            described = topologies.get_topology_desc(name, "tpu", **more)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"--plan={self.name}: {first} (compiling for a TPU needs the [tpu] extra: EXTRAS=dev,tpu scripts/setup.sh)"
            ) from error
        return list(described.devices)


def parse_slice(name: str) -> Slice:
    """Parse 'v5p:2x2x4', or 'v5p:2x2x4*2' for two slices. Raises InputError for anything else."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", name)
    if match is None or match[1] not in CHIPS:
        raise InputError(
            f"--plan={name}: give CHIP:AxB or CHIP:AxBxC, chip one of {', '.join(CHIPS)}, for instance v5p:2x2x4; "
            "append *2 for two slices"
        )
    grid = tuple(int(size) for size in match[2].split("x"))
    if 0 in grid or (match[3] is not None and int(match[3]) < 1):
        raise InputError(f"--plan={name}: every size must be at least 1")
    return Slice(name, CHIPS[match[1]], grid, int(match[3] or 1))
