"""Reading what the TPU compiler says that it has assigned. The texts are cut from libtpu 0.0.42's; tests of the real thing are
behind the marker tpu_aot."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.plan.buffers import Assigned, read_assigned

NAME = "module_0881.jit_update.cl_933746096.after_optimizations"
REPORT = """Memory Space: default (color=0)
Total bytes: 3504364544 (3.26GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  519.31MiB( 21%);  519.31MiB;   1447329792;                2; f32[151936,896], f32[2,128,151936]

Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
"""
BUFFERS = """BufferAssignment:
allocation 1: size 68067328, parameter 1, shape |f32[18992,896]| at ShapeIndex {}, maybe-live-out:
 value: <14607 copy-start.2{0} @0> (size=68067328,offset=0): f32[18992,896]{1,0:T(8,128)}
allocation 1638: size 2000029696, preallocated-temp:
 value: <15 copy.3 @0> (size=512,offset=0): s32[4]{0:T(128)}
 value: <18 fusion.1542 @0> (size=544538624,offset=1447329792): f32[151936,896]{1,0:T(8,128)}
 value: <19 fusion.15 @0> (size=544538624,offset=1447329792): f32[2,128,151936]{2,1,0:T(8,128)}
 value: <20 while.5{3} (phi) @0> (size=88080384,offset=807141376): bf16[24,2,1024,896]{2,3,1,0:T(8,128)(2,1)}
allocation 1642: size 117440512, color 1, preallocated-temp:
 value: <21 copy.9 @1> (size=68067328,offset=0): f32[18992,896]{1,0:T(8,128)S(1)}
"""
PROGRAM = """ENTRY %main {
  %copy.3 = s32[4]{0} copy(%p)
  %fusion.1542 = f32[151936,896]{1,0} fusion(%a), metadata={op_name="jit(update)/while/body/nd,vd->nv/dot_general"}
  ROOT %while.5 = (s32[], f32[]) while(%t), metadata={op_name="jit(update)/while"}
}
"""


def write(folder: Path, **files: str) -> Path:
    for subject, text in files.items():
        ending = "" if subject == "program" else f"-{subject.replace('_', '-')}"
        (folder / f"{NAME}{ending}.txt").write_text(text)
    return folder


def test_the_total_is_of_hbm_and_temporaries_are_named(tmp_path: Path) -> None:
    """3.26 GiB, not the 112 MiB of vmem. Two values in one place are one buffer; arguments and vmem are no temporaries."""
    write(tmp_path, memory_usage_report=REPORT, buffer_assignment=BUFFERS, program=PROGRAM)
    assert read_assigned(tmp_path) == Assigned(
        3504364544,
        [
            ("temporary nd,vd->nv/dot_general f32[151936,896]", 544538624),
            ("temporary jit(update)/while bf16[24,2,1024,896]", 88080384),
            ("temporary copy.3 s32[4]", 512),
        ],
    )


def test_nothing_assigned_is_none_and_another_format_is_an_error(tmp_path: Path) -> None:
    assert read_assigned(tmp_path) is None
    write(tmp_path, memory_usage_report="Memory: 3 GiB\n", buffer_assignment=BUFFERS)
    with pytest.raises(InputError, match="names no total; is it libtpu"):
        read_assigned(tmp_path)
