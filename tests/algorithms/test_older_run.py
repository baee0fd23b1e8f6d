"""A run directory that the version before this package layout made: it loads as a model, and goes on."""

from __future__ import annotations

import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked_programs import Server

from rlhf_jax.io import load_pretrained
from rlhf_jax.storage.metric_files import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SAVED = Path(__file__).with_name("saved") / "sft_run_of_the_version_before.tar.gz"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(SAVED) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_loads_as_a_model(older: Path) -> None:
    model, params, tokenizer = load_pretrained(older / "run")
    assert model.config.hidden_size == 8 and tokenizer.vocab_size == 259
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert model.apply(params, jnp.ones((1, 3), jnp.int32)).shape == (1, 3, 259)


def test_it_goes_on(server: Server, older: Path) -> None:
    """Two steps are done; the same command with two more goes on from there."""
    script = ROOT / "experiments" / "train_sft.py"
    completions = server(older, [str(script), "--gin_file=run.gin", "--gin_bindings=run.steps = 4"])
    assert completions.returncode == 0, completions.stderr
    rows = read_metrics(older / "run")[0].rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] < rows[0]["loss"]
