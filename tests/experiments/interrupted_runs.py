"""Runs stopped midway, and whether what they end as is the very run that nothing stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from experiment_processes import read_lines, wait_for_step
from forked_programs import Forked, Result

from rlhf_jax.checkpoint_files.manifest import checkpoint_dir, saved_steps


def saved_state(run_dir: Path) -> dict[str, np.ndarray]:
    """Return every array of the newest checkpoint by its path: parameters, optimiser, keys, counters, controller."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(checkpoint_dir(run_dir) / str(saved_steps(run_dir)[-1]) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    raw = jax.random.key_data
    return {
        jax.tree_util.keystr(path): np.asarray(raw(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for path, x in leaves
    }


def same_as(unbroken: Path, broken: Path, *parts: str) -> None:
    """Assert that two runs ended alike. parts: texts that some path of the state must contain."""
    assert (broken / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    assert saved_steps(broken)[-1] == saved_steps(unbroken)[-1]
    actual, reference = saved_state(broken), saved_state(unbroken)
    assert actual.keys() == reference.keys()
    for part in parts:
        assert any(part in path for path in actual), (part, list(actual))
    for path, array in actual.items():
        assert array.dtype == reference[path].dtype
        np.testing.assert_array_equal(array, reference[path], err_msg=path)
    assert [line["step"] for line in read_lines(broken / "timing.jsonl")] == [
        line["step"] for line in read_lines(unbroken / "timing.jsonl")
    ]


def resumed_steps(run_dir: Path) -> list[int]:
    return [launch["resumed_step"] for launch in json.loads((run_dir / "provenance.json").read_text())["launches"]]


def terminate(train: Callable[..., Result], run_dir: Path, at: int, *arguments: str, **macros: Any) -> int:
    """Send SIGTERM once step ``at`` is logged; return the step that was saved."""

    def ask(program: Forked) -> None:
        wait_for_step(run_dir, at, program)
        program.send_signal(signal.SIGTERM)

    result = train(*arguments, run_dir.name, code=143, seconds_a_step=0.4, meanwhile=ask, **macros)
    saved = saved_steps(run_dir)[-1]
    assert f"stopped at step {saved}; the same command goes on from here" in result.stderr
    return saved


def kill(train: Callable[..., Result], run_dir: Path, at: int, *arguments: str, **macros: Any) -> None:
    """Send SIGKILL once step ``at`` is logged."""

    def end(program: Forked) -> None:
        wait_for_step(run_dir, at, program)
        program.send_signal(signal.SIGKILL)

    train(*arguments, run_dir.name, code=-signal.SIGKILL, seconds_a_step=1.0, meanwhile=end, **macros)
