"""The environment of every test, set before anything imports jax: CPU with eight pretended devices, no network.

Subprocesses started by tests inherit it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose the devices; which plugin does that?")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
# Threads of XLA's pool: a collective holds one until every device has come, and a program may have several under way at once;
# with a pool of two (the cores of a laptop) eight devices wait for each other for ever.
os.environ["NPROC"] = "32"
# Compiled programs outlive the process: a second run of the suite compiles almost nothing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
