"""Loading of run directories as models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_directories import TEMPLATE, make_run

from rlhf_jax.errors import InputError
from rlhf_jax.io import load_pretrained, read_model_card, read_template
from rlhf_jax.parallel import MeshConfig, make_mesh, tree_shardings
from rlhf_jax.testing import bytes_per_device
from rlhf_jax.types import Params


def assert_equal(one: Params, other: Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


@pytest.mark.parametrize("subtree", ["params", "train/params/policy"])
def test_the_newest_checkpoint_is_read(subtree: str, tmp_path: Path) -> None:
    model, params = make_run(tmp_path / "run", subtree=subtree, steps=(1, 2, 10))
    (tmp_path / "run" / "checkpoints" / "11.saving").mkdir()  # a save that never finished
    loaded, read, tokenizer = load_pretrained(tmp_path / "run")
    assert loaded.config == model.config and tokenizer.encode("A") == [68]
    assert_equal(read, params)
    assert read_model_card(tmp_path / "run") == (model.config, subtree)


def test_the_template_is_kept_with_the_model(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert read_template(tmp_path / "run") == TEMPLATE
    assert read_template(tmp_path) is None  # no run
    card = tmp_path / "run" / "model.json"
    fields = json.loads(card.read_text())
    card.write_text(json.dumps(fields | {"template": {"style": "fancy"}}))
    with pytest.raises(InputError, match=r"model\.json: template: Template\.style = 'fancy'"):
        read_template(tmp_path / "run")
    del fields["template"]  # of a run of an older version
    card.write_text(json.dumps(fields))
    assert read_template(tmp_path / "run") is None and load_pretrained(tmp_path / "run").model is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_runs_own_by_default(dtype: str, tmp_path: Path) -> None:
    _, params = make_run(tmp_path / "run", param_dtype=dtype)
    assert load_pretrained(tmp_path / "run").model.config.param_dtype == dtype
    model, other, _ = load_pretrained(tmp_path / "run", param_dtype="bfloat16")
    assert model.config.param_dtype == "bfloat16"
    assert_equal(other, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_parameters_are_sharded(tmp_path: Path) -> None:
    model, params = make_run(tmp_path / "run", tie_embeddings=False)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    read = load_pretrained(tmp_path / "run", mesh=mesh).params
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or pytest.fail(), read, shardings
    )
    assert_equal(read, params)
    assert max(bytes_per_device(read).values()) < 0.4 * max(bytes_per_device(params).values())


def test_heads(tmp_path: Path) -> None:
    """A language model can get a new scalar head, a head can be omitted, and a scorer is never a language model."""
    _, params = make_run(tmp_path / "lm")
    scorer = load_pretrained(tmp_path / "lm", head="scalar", rng=jax.random.key(0)).params
    assert set(scorer) == {"embed", "layers", "final_norm", "scalar_head"}
    assert_equal(scorer["layers"], params["layers"])
    _, params = make_run(tmp_path / "both", "lm+scalar", tie_embeddings=False)
    for head, parts in {"lm": {"lm_head"}, "scalar": {"scalar_head"}, None: {"lm_head", "scalar_head"}}.items():
        loaded: Any = load_pretrained(tmp_path / "both", head=head)
        assert set(loaded.params) == {"embed", "layers", "final_norm"} | parts
        assert_equal(loaded.params, {name: params[name] for name in loaded.params})
    for tied in (True, False):
        make_run(tmp_path / f"scorer {tied}", "scalar", tie_embeddings=tied)
        for head in ("lm", "lm+scalar"):
            with pytest.raises(InputError, match="has no language-model head"):
                load_pretrained(tmp_path / f"scorer {tied}", head=head, rng=jax.random.key(0))


@pytest.mark.parametrize(
    ("gain", "bias", "words"),
    [
        ("0.0", "1.0", "gain = 0.0: must be a finite number above 0"),  # every reward alike
        ("-2.0", "1.0", "gain = -2.0: must be a finite number above 0"),  # the worst response would win
        ("1e-60", "1.0", "gain = 1e-60: must be a finite number above 0, in float32 too"),
        ("1e39", "1.0", r"gain = 1e\+39: must be"),
        ("1e999", "1.0", "reward_normalisation.json"),
        ("NaN", "1.0", "reward_normalisation.json"),
        ("2.0", "-1e39", r"bias = -1e\+39: must be a finite number"),
        ("2.0", "Infinity", "reward_normalisation.json"),
    ],
)
def test_a_normalisation_that_spoils_rewards_is_refused(tmp_path: Path, gain: str, bias: str, words: str) -> None:
    make_run(tmp_path / "run", "scalar")
    (tmp_path / "run" / "reward_normalisation.json").write_text(f'{{"gain": {gain}, "bias": {bias}}}')
    with pytest.raises(InputError, match=words):
        load_pretrained(tmp_path / "run")


def test_a_reward_runs_normalisation_is_folded_into_its_head(tmp_path: Path) -> None:
    model, params = make_run(tmp_path / "run", "scalar")
    file = tmp_path / "run" / "reward_normalisation.json"
    file.write_text(json.dumps({"gain": 2.0, "bias": -3.0, "pairs": 9}))
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    raw = model.scalars(params, model.hidden(params, tokens))
    read = load_pretrained(tmp_path / "run").params
    np.testing.assert_allclose(model.scalars(read, model.hidden(read, tokens)), 2 * raw - 3, rtol=1e-5)
    file.write_text(json.dumps({"gain": "2", "bias": -3.0}))
    (tmp_path / "run" / "provenance.json").write_text('{"stage": "reward"}')
    original_text = file.read_text()
    file.unlink()
    with pytest.raises(InputError, match=r"reward_normalisation.json: no such file; the reward model is unfinished"):
        load_pretrained(tmp_path / "run", head="scalar")
    file.write_text(original_text)
    with pytest.raises(InputError, match="reward_normalisation.json: gain = '2'"):
        load_pretrained(tmp_path / "run")


def test_missing_or_damaged_runs_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    card = json.loads((run / "model.json").read_text())

    def refuse(words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            load_pretrained(run)
        assert "\n" not in str(caught.value)

    def with_card(content: Any) -> None:
        (run / "model.json").write_text(json.dumps(content))

    with_card(card | {"config": card["config"] | {"ffn_size": 64, "tie_embeddings": False}})
    refuse("lm_head/kernel is missing; layers/mlp/down/kernel is float32.2,32,16., expected float32.2,64,16.")
    with_card(card | {"config": card["config"] | {"param_dtype": "bfloat16"}})
    refuse(
        r"embed/embedding is float32\[272,16\], expected bfloat16\[272,16\].*model.json and checkpoint are not of one run"
    )
    with_card(card | {"subtree": "policy"})
    refuse("no 'policy', which model.json names")
    with_card({"config": card["config"]})
    refuse("model.json: damaged .needs config and subtree")
    with_card(card | {"config": card["config"] | {"windows": 3}})
    refuse("unknown fields windows")
    with_card(card)
    data = [
        file for file in (run / "checkpoints" / "1" / "state").rglob("*") if file.is_file() and "ocdbt" not in file.name
    ]
    for file in data:
        if file.name not in ("_METADATA", "_sharding"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuse("damaged checkpoint")
    (run / "checkpoints" / "1").rename(run / "checkpoints" / "1.damaged")
    refuse("no complete checkpoint")
    (run / "model.json").unlink()
    refuse("neither a run directory .model.json. nor a checkpoint directory .config.json.")
    with pytest.raises(InputError, match="model.json: no such file; give a run directory"):
        read_model_card(run)
