"""Runs of adapters: resumed exactly, loaded with their base, and in PPO measured against the base itself."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from experiment_processes import ROOT, finish, read_lines, start
from interrupted_runs import same_as, saved_state, terminate

from rlhf_jax.errors import InputError
from rlhf_jax.io import load_pretrained
from rlhf_jax.models import LoraConfig, Model, int8, lora


def adapters_of(run_dir: Path, model: Model) -> dict:
    """Return the trained part of the newest checkpoint as a tree."""
    state, tree = saved_state(run_dir), lora.split(Model(model.config, lora=LoraConfig(rank=8)).abstract())[1]
    return jax.tree_util.tree_map_with_path(lambda at, _: state["['params']" + jax.tree_util.keystr(at)], tree)


@pytest.mark.slow
def test_sft_of_adapters_resumes_exactly_and_loads_merged(chain: Path, train, tmp_path: Path) -> None:
    places = {"BASE": chain / "base"}
    train("train_sft", "sft_lora", "unbroken", **places)
    terminate(train, tmp_path / "broken", 3, "train_sft", "sft_lora", **places)
    train("train_sft", "sft_lora", "broken", **places)
    same_as(tmp_path / "unbroken", tmp_path / "broken", "lora_a", "lora_b", "opt_state")
    assert not any("kernel" in path or "embedding" in path for path in saved_state(tmp_path / "broken"))

    base, base_params, _ = load_pretrained(chain / "base")
    model, params, _ = load_pretrained(tmp_path / "unbroken")
    assert model.lora is None and model.config == base.config
    trained = adapters_of(tmp_path / "unbroken", model)
    expected = lora.merge(lora.combine(base_params, trained), LoraConfig(rank=8, alpha=16))
    for actual, reference in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, atol=1e-6)
    query = (tree["layers"]["attention"]["query"]["kernel"] for tree in (params, base_params))
    assert np.abs(np.subtract(*query)).max() > 1e-3

    # exported by themselves the adapters give the same model on the exported base
    export = [sys.executable, str(ROOT / "experiments" / "export.py")]
    adapter = [*export, f"--run_dir={tmp_path / 'unbroken'}", f"--out={tmp_path / 'adapter'}", "--adapter_only"]
    _, err = finish(start(adapter), 2)
    assert "is nothing that peft can load" in err and not (tmp_path / "adapter").exists()
    finish(start([*export, f"--run_dir={chain / 'base'}", f"--out={tmp_path / 'base'}"]))
    finish(start([*adapter, f"--base={tmp_path / 'base'}"]))
    again = load_pretrained(tmp_path / "adapter").params
    jax.tree.map(np.testing.assert_array_equal, again, params)

    card = tmp_path / "unbroken" / "model.json"
    card.write_text(card.read_text().replace('"base_step": 30', '"base_step": 29'))
    with pytest.raises(InputError, match="no checkpoint of step 29"):
        load_pretrained(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_ppo_of_adapters_begins_at_its_base(base_dtype: str | None, chain: Path, train, tmp_path: Path) -> None:
    places = {"POLICY": chain / "sft", "REWARD": chain / "reward", "LoraConfig.base_dtype": base_dtype}
    train("train_ppo", "ppo_lora", "ppo", **places)
    lines = read_lines(tmp_path / "ppo" / "metrics.jsonl")
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5) and lines[-1]["kl"] > 1e-3
    assert all(line["identity/identity_gap"] < 1e-5 for line in lines)
    trained = [path for path in saved_state(tmp_path / "ppo") if "params" in path]
    assert trained and all("lora_" in path or "scalar_head" in path for path in trained)


@pytest.mark.slow
def test_adapters_over_int8_are_merged_into_the_int8_numbers(chain: Path, train, tmp_path: Path) -> None:
    bindings = {"LoraConfig.base_dtype": "int8", "run.steps": 3}
    train("train_sft", "sft_lora", "int8", BASE=chain / "base", **bindings)
    assert not any("kernel" in path for path in saved_state(tmp_path / "int8"))
    base, base_params, _ = load_pretrained(chain / "base")
    model, params, _ = load_pretrained(tmp_path / "int8")
    rounded = int8.rounded_tree(base_params, Model(base.config, int8=True).abstract())
    expected = lora.merge(lora.combine(rounded, adapters_of(tmp_path / "int8", model)), LoraConfig(rank=8, alpha=16))
    for actual, reference in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, atol=1e-6)
    exact = lora.merge(lora.combine(base_params, adapters_of(tmp_path / "int8", model)), LoraConfig(rank=8, alpha=16))
    query = (tree["layers"]["attention"]["query"]["kernel"] for tree in (params, exact))
    assert np.abs(np.subtract(*query)).max() > 1e-4


def test_dropout_is_refused_for_ppo(chain: Path, train) -> None:
    bindings = {"POLICY": chain / "sft", "REWARD": chain / "reward", "LoraConfig.dropout": 0.1}
    assert "LoraConfig.dropout" in train("train_ppo", "ppo_lora", "ppo", code=2, **bindings).stderr
