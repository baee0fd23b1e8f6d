"""The environment of every test, set before jax is imported: CPU with eight virtual devices, no network.

Subprocesses of tests inherit it.

"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiler_flags import COMPILER, EIGHT_DEVICES
from forked_programs import EXPERIMENTS, Server, forked_programs

ROOT = Path(__file__).resolve().parents[1]

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose the devices; which plugin does that?")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = EIGHT_DEVICES
# Threads of XLA's pool: a collective occupies one per device until all devices have arrived, and a program may have several
# at once; with a pool of two (the cores of a laptop) eight devices would deadlock.
os.environ["NPROC"] = "32"
# Compiled programs outlive the process: what one worker or program compiled, the others read, however small it is.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

LONGEST = (
    "experiments/test_experiment_smoke.py",  # makes the chain that others wait for
    "parallel/test_devices_agree.py",
    "rollout/test_generate.py",
    "learn/test_ppo_update.py",
    "experiments/test_exact_resume.py",
    "experiments/test_one_step_off.py",
    "experiments/test_plan_is_the_run.py",
)
"""Files that take a minute or more, run first: started last, one of them would run alone at the end of the suite."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Run programs of one device that are forked from one process of this worker, which has imported what experiments do."""
    with forked_programs(EXPERIMENTS, {**os.environ, "XLA_FLAGS": COMPILER}) as call:
        yield call
