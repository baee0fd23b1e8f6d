"""Comparison of two runs, bit for bit: a resumed run must equal one without a break."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlhf_jax.checkpoint_files.manifest import find_step, read_arrays, verify
from rlhf_jax.storage.names import METRICS, NORMALISATION


def difference(unbroken: Path, broken: Path) -> str:
    """Return '' when two run directories hold the same, else 'different: ...', or 'lost: ...' when ``broken`` lacks a step.

    Compared are metrics.jsonl byte for byte, every array of the newest checkpoint, what that keeps on the host, and
    reward_normalisation.json. Raises DamagedCheckpoint for a checkpoint that is not what was saved.
    """
    broken_lines, unbroken_lines = ((directory / METRICS).read_bytes().splitlines() for directory in (broken, unbroken))
    if len(broken_lines) != len(unbroken_lines):
        return f"lost: {len(broken_lines)} lines of metrics, not {len(unbroken_lines)}"
    if broken_lines != unbroken_lines:
        first = next(i for i, pair in enumerate(zip(broken_lines, unbroken_lines, strict=True)) if pair[0] != pair[1])
        return f"different: line {first + 1} of metrics.jsonl"
    places = find_step(broken), find_step(unbroken)
    if places[0].name != places[1].name:
        return f"lost: ends at step {places[0].name}, not {places[1].name}"
    if verify(places[0])["host"] != verify(places[1])["host"]:
        return "different: what the checkpoint keeps on the host"
    one, other = map(read_arrays, places)
    if wrong := [name for name in one.keys() | other.keys() if not _equal(one.get(name), other.get(name))]:
        return f"different: {len(wrong)} arrays, {min(wrong)} among them"
    files = [directory / NORMALISATION for directory in (broken, unbroken)]
    if files[0].is_file() != files[1].is_file() or (
        files[0].is_file() and files[0].read_bytes() != files[1].read_bytes()
    ):
        return "different: reward_normalisation.json"
    return ""


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Compare bit for bit."""
    return one is not None and other is not None and one.dtype == other.dtype and one.tobytes() == other.tobytes()
