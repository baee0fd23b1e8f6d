"""XLA compiler flags of the tests, the same for all processes so that they share the compilation cache."""

from __future__ import annotations

import os

QUICK = (
    "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""Without optimisation by LLVM: tests spend most of their time on compilation (one small gradient compiles in 0.6 s instead of
5 s). In one part: two workers use both cores of a laptop already."""
COMPILER = os.environ.get("RLHF_JAX_TEST_COMPILER", QUICK)
"""RLHF_JAX_TEST_COMPILER=--xla_cpu_multi_thread_eigen=false compiles as users do."""
EIGHT_DEVICES = f"--xla_force_host_platform_device_count=8 {COMPILER}"
