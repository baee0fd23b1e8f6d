"""Adapters in PEFT's format: names and shapes by hand, an exact round trip, and refused files."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from family_files import CASES, draw_tensors, stored_shapes
from llama_files import write_checkpoint
from safetensors.numpy import load_file, save_file

from rlhf_jax.errors import InputError
from rlhf_jax.io import export_adapter, load_pretrained, read_adapter
from rlhf_jax.io.location import adapter_base
from rlhf_jax.models import LoraConfig, Model, lora
from rlhf_jax.testing import byte_tokenizer, random_params

SETTINGS = LoraConfig(rank=3, alpha=5.0, rslora=True)


def base(case: str, directory: Path) -> Path:
    return write_checkpoint(directory / case, CASES[case], draw_tensors(stored_shapes(case)))


@pytest.fixture
def exported(tmp_path: Path):
    """(adapter directory, base model, base parameters, trained) of a model whose layers are of two kinds."""
    directory = base("gemma3", tmp_path)
    model, params, _ = load_pretrained(directory)
    adapted = Model(model.config, lora=SETTINGS)
    _, trained = lora.split(random_params(adapted, 7))
    export_adapter(tmp_path / "adapter", adapted, trained, byte_tokenizer(), str(directory))
    return tmp_path / "adapter", model, params, trained


def test_names_shapes_and_settings(exported) -> None:
    adapter, _, _, trained = exported
    tensors = load_file(adapter / "adapter_model.safetensors")
    at = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    # 5 layers, 7 matrices, A and B; hidden 32, 4 heads of 12 on 2, rank 3
    assert len(tensors) == 5 * 7 * 2
    shapes = {(name, side): tensors[at.format(1, name, side)].shape for name in ("q_proj", "k_proj") for side in "AB"}
    assert shapes == {
        ("q_proj", "A"): (3, 32),
        ("q_proj", "B"): (48, 3),
        ("k_proj", "A"): (3, 32),
        ("k_proj", "B"): (24, 3),
    }
    assert tensors[at.format(2, "o_proj", "A")].shape == (3, 48)
    # layers 0, 1 and 3, 4 see a window, layer 2 everything: three stacks, the last one of layers 3 and 4
    assert sorted(trained["layers"]) == ["0", "2", "3"]
    query = trained["layers"]["3"]["attention"]["query"]
    assert np.array_equal(tensors[at.format(4, "q_proj", "A")], query["lora_a"][1].T)
    assert np.array_equal(tensors[at.format(4, "q_proj", "B")], query["lora_b"][1].reshape(3, 48).T)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (3, 5.0, True)
    names = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    assert set(fields["target_modules"]) == names | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert (fields["task_type"], fields["modules_to_save"]) == ("CAUSAL_LM", None)


def test_round_trip_is_bit_exact(exported) -> None:
    adapter, model, _, trained = exported
    settings, again, with_head = read_adapter(adapter, model.config)
    assert not with_head and (settings.rank, settings.alpha, settings.rslora) == (3, 5.0, True)
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    for actual, original in zip(jax.tree.leaves(again), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(actual, original)
    assert jax.tree.structure(lora.split(Model(model.config, lora=settings).abstract())[1]) == jax.tree.structure(
        trained
    )


def test_an_adapter_loads_merged_into_the_base_it_names(exported) -> None:
    adapter, model, params, trained = exported
    loaded, merged, _ = load_pretrained(adapter)
    assert loaded.config == model.config
    expected = lora.merge(lora.combine(params, trained), SETTINGS)
    for actual, reference in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, reference, atol=1e-6)


def test_an_adapter_brings_its_own_tokenizer(exported) -> None:
    """It needs only tokenizer.json."""
    adapter, _, _, _ = exported
    (adapter / "tokenizer_config.json").unlink()
    assert load_pretrained(adapter).tokenizer.name_or_path == str(adapter)


def test_a_reward_models_head_is_exported(tmp_path: Path) -> None:
    directory = base("mistral", tmp_path)
    model = load_pretrained(directory).model.with_head("scalar")
    adapted = Model(model.config, lora=LoraConfig(rank=2, targets="attention/value"))
    _, trained = lora.split(random_params(adapted, 3))
    export_adapter(tmp_path / "adapter", adapted, trained, byte_tokenizer(), str(directory))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = trained["scalar_head"]["kernel"]
    assert np.array_equal(tensors["base_model.model.score.weight"], np.asarray(head).T)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
    loaded, params, _ = load_pretrained(tmp_path / "adapter")
    assert loaded.config.head == "scalar"
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(params["scalar_head"][name], trained["scalar_head"][name])


def rewrite(adapter: Path, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"missing: {QUERY}"),
        (lambda t: t.update(other=np.zeros(2, np.float32)), "not of this model: other"),
        (
            lambda t: t.update({QUERY: np.zeros((4, 32), np.float32)}),
            r"of another shape than the configuration says: .*q_proj.*\[4, 32\], not \[3, 32\]",
        ),
        (lambda t: t.update({QUERY: np.zeros((3, 32), np.int8)}), r"of a dtype that is not read: .*q_proj.*\(I8\)"),
    ],
)
def test_wrong_tensors_are_listed(exported, change, message) -> None:
    rewrite(exported[0], change)
    with pytest.raises(InputError, match=message):
        load_pretrained(exported[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 4}),
        ("modules_to_save", ["embed_tokens"]),
        ("peft_type", "IA3"),
        ("something_new", 1),
        ("something_new", 0),
        ("something_new", ""),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something_new"),
        ("use_rslora", "false"),
        ("task_type", "TOKEN_CLS"),
        ("lora_dropout", "0.1"),
        ("alpha_pattern", {"q_proj": 4}),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [3]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("velora_config", {"num_groups": 64}),
        ("monteclora_config", {"num_samples": 8}),
        ("alora_invocation_tokens", [7]),
        ("megatron_config", {"tensor_parallel": 2}),
    ],
)
def test_unsupported_settings_are_refused_by_name(exported, field, value) -> None:
    file = exported[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InputError, match=f"{field} = "):
        load_pretrained(exported[0])


def test_settings_without_effect_are_read(exported) -> None:
    """PEFT 0.21 writes these fields beside the defaults; initialisations that do not change the base are accepted."""
    adapter, model, _, _ = exported
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    off = ["alpha_pattern", "rank_pattern"], ["use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"]
    fields |= {name: {} for name in off[0]} | dict.fromkeys(off[1], False)
    none = ["layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters", "trainable_token_indices"]
    none += ["arrow_config", "kasa_config", "velora_config", "use_bdlora", "megatron_config", "alora_invocation_tokens"]
    fields |= dict.fromkeys([*none, "monteclora_config", "layer_replication", "revision", "something_new"])
    fields |= {
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "fan_in_fan_out": True,
        "peft_version": "0.21.2",
    }
    for how in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        file.write_text(json.dumps(fields | {"init_lora_weights": how}))
        assert read_adapter(adapter, model.config)[0].rank == 3


def test_missing_parts_of_an_adapter_are_named(exported) -> None:
    adapter, model, _, _ = exported
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in ("r", "lora_alpha")}))
    with pytest.raises(InputError, match=r"adapter_config.json: lora_alpha, r is missing; take the file from"):
        read_adapter(adapter, model.config)
    file.write_text(json.dumps(fields | {"modules_to_save": ["score"]}))
    with pytest.raises(InputError, match=r"modules_to_save names 'score', but .*has no base_model.model.score.weight"):
        read_adapter(adapter, model.config)


def test_the_revision_of_the_base_is_followed(tmp_path: Path) -> None:
    where = Path("adapter_config.json")
    (tmp_path / "model").mkdir()
    local = {"base_model_name_or_path": str(tmp_path / "model"), "revision": "abc"}
    assert adapter_base(local, where) == str(tmp_path / "model")
    hub = {"base_model_name_or_path": "name/model", "revision": None}
    assert adapter_base(hub, where) == "name/model"
    assert adapter_base(hub | {"revision": "v2"}, where) == "name/model@v2"
    with pytest.raises(InputError, match="revision = 3: must be a text or null"):
        adapter_base(hub | {"revision": 3}, where)


def test_adapters_of_fused_matrices_are_refused(tmp_path: Path) -> None:
    adapted = Model(load_pretrained(base("gpt2", tmp_path)).model.config, lora=SETTINGS)
    _, trained = lora.split(random_params(adapted, 0))
    with pytest.raises(InputError, match="layers/attention/key.*stored joined.*export the merged model"):
        export_adapter(tmp_path / "adapter", adapted, trained, byte_tokenizer(), "base")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(InputError, match="no adapters"):
        export_adapter(tmp_path / "adapter", Model(adapted.config), trained, byte_tokenizer(), "base")
