"""Loading of Hugging Face directories: weights, sharding, and errors for invalid checkpoints."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from llama_files import CASES, GOLDEN, golden_tokens, llama_fields, llama_tensors, write_checkpoint
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.io import load_pretrained
from rlhf_jax.io.tensors import open_safetensors
from rlhf_jax.parallel import MeshConfig, make_mesh, tree_shardings
from rlhf_jax.testing import bytes_per_device

Write = Any


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(fields, tensors or None for the right ones, ...) -> directory."""

    def write(fields: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, **how: Any) -> Path:
        return write_checkpoint(tmp_path / "model", fields, tensors or llama_tensors(fields), **how)

    return write


def outputs(path: Path, **how: Any) -> np.ndarray:
    """Compute logits [B, S, V], or scalars [B, S] when there is no language-model head."""
    model, params, _ = load_pretrained(path, **how)
    tokens = jnp.asarray(golden_tokens())
    hidden = jax.jit(model.hidden)(params, tokens)
    return np.asarray((model.logits if model.config.has_lm else model.scalars)(params, hidden))


# ---- numbers


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_transformers(case: str, write: Write) -> None:
    reference = np.load(GOLDEN)[case]
    assert np.abs(outputs(write(CASES[case])) - reference).max() < 5e-5


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_golden_outputs_are_what_transformers_computes_now(case: str) -> None:
    pytest.importorskip("torch", reason="needs the [parity] extra")
    from make_llama_golden import reference_outputs

    live = reference_outputs(CASES[case], llama_tensors(CASES[case]), golden_tokens())
    assert np.abs(live - np.load(GOLDEN)[case]).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_number_arrives_unchanged(dtype: str, files: int, write: Write) -> None:
    """Every number equals that of the file in float32, at its transposed or flattened position."""
    fields = CASES["untied"]
    stored = {name: t.astype(getattr(ml_dtypes, dtype, dtype)) for name, t in llama_tensors(fields).items()}
    model, params, _ = load_pretrained(write(fields, dtype=dtype, files=files))
    assert model.config.param_dtype == "float32"
    wide = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    attention = params["layers"]["attention"]
    for layer in range(2):
        block = f"model.layers.{layer}."
        q, o = (wide[block + f"self_attn.{name}_proj.weight"] for name in "qo")
        np.testing.assert_array_equal(attention["query"]["kernel"][layer], q.T.reshape(32, 4, 16))
        np.testing.assert_array_equal(attention["output"]["kernel"][layer], o.T.reshape(4, 16, 32))
        np.testing.assert_array_equal(
            params["layers"]["mlp"]["up"]["kernel"][layer], wide[block + "mlp.up_proj.weight"].T
        )
        np.testing.assert_array_equal(
            params["layers"]["mlp_norm"]["scale"][layer], wide[block + "post_attention_layernorm.weight"]
        )
    np.testing.assert_array_equal(params["lm_head"]["kernel"], wide["lm_head.weight"].T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_param_dtype_rounds_to_nearest_even(write: Write) -> None:
    fields = llama_fields()
    model, params, _ = load_pretrained(write(fields), param_dtype="bfloat16")
    assert model.config.param_dtype == "bfloat16" and model.config.compute_dtype == "float32"
    expected = llama_tensors(fields)["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["embed"]["embedding"]), expected)


def test_float16_does_not_overflow_silently(write: Write) -> None:
    fields = llama_fields()
    tensors = llama_tensors(fields)
    tensors["model.norm.weight"][3] = 7e4
    path = write(fields, tensors, dtype="bfloat16")
    assert float(load_pretrained(path, param_dtype="bfloat16").params["final_norm"]["scale"][3]) > 65504
    with pytest.raises(InputError, match="final_norm/scale: numbers that float16 cannot hold"):
        load_pretrained(path, param_dtype="float16")


def test_the_tokenizer_must_fit_the_vocabulary(write: Write) -> None:
    assert load_pretrained(write(llama_fields())).tokenizer.encode("A") == [3 + 65]
    small = llama_fields(vocab_size=256)
    with pytest.raises(InputError, match="tokenizer has 259 tokens.*vocab_size = 256"):
        load_pretrained(write(small))


def test_extra_tensors_of_old_checkpoints_are_ignored(write: Write) -> None:
    """Rotary frequencies, and an output head that equals the tied embeddings, are ignored."""
    fields = llama_fields()
    tensors = llama_tensors(fields)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    np.testing.assert_array_equal(outputs(write(fields, tensors | extra)), outputs(write(fields)))
    extra["lm_head.weight"][263, 31] += 1
    with pytest.raises(InputError, match="not of this architecture: lm_head.weight"):
        load_pretrained(write(fields, tensors | extra))


# ---- heads


def test_a_scalar_head_on_a_language_model_is_drawn_from_the_key(write: Write) -> None:
    path = write(CASES["untied"])
    with pytest.raises(InputError, match="no scalar head.*rng="):
        load_pretrained(path, head="scalar")
    model, params, _ = load_pretrained(path, head="scalar", rng=jax.random.key(1))
    assert model.config.head == "scalar" and "lm_head" not in params
    assert params["scalar_head"]["kernel"].shape == (32, 1) and np.asarray(params["scalar_head"]["kernel"]).any()
    same, other = (load_pretrained(path, head="scalar", rng=jax.random.key(seed)).params for seed in (1, 2))
    np.testing.assert_array_equal(same["scalar_head"]["kernel"], params["scalar_head"]["kernel"])
    assert (np.asarray(other["scalar_head"]["kernel"]) != params["scalar_head"]["kernel"]).any()
    np.testing.assert_array_equal(other["embed"]["embedding"], params["embed"]["embedding"])
    two_heads = load_pretrained(path, head="lm+scalar", rng=jax.random.key(1)).params
    assert {"lm_head", "scalar_head"} <= two_heads.keys()


@pytest.mark.parametrize("head", ["lm", "lm+scalar"])
def test_a_scorer_is_no_language_model(head: Any, write: Write) -> None:
    """This holds even with tied embeddings, which have all weights of a language model: the trunk was trained for scores."""
    with pytest.raises(InputError, match="reward or value model.*cannot be loaded from it"):
        load_pretrained(write(CASES["scorer"]), head=head, rng=jax.random.key(0))


def test_a_scorers_bias_is_read_and_zero_when_absent(write: Write) -> None:
    fields = CASES["scorer"]
    plain = outputs(write(fields))
    assert load_pretrained(write(fields)).params["scalar_head"]["bias"].tolist() == [0.0]
    biased = outputs(write(fields, llama_tensors(fields) | {"score.bias": np.float32([0.75])}))
    np.testing.assert_allclose(biased, plain + 0.75, atol=1e-6)


# ---- shards


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}, {"fsdp": 1, "data": 8}])
def test_weights_are_sharded_by_the_rules(shape: dict[str, int], write: Write) -> None:
    path = write(CASES["tied"])
    mesh = make_mesh(MeshConfig(**shape))
    model, params, _ = load_pretrained(path, mesh=mesh)
    one = load_pretrained(path).params
    expected = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    for name, leaf in jax.tree_util.tree_leaves_with_path(params):
        place: Any = expected
        for key in name:
            place = place[key.key]
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), name
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(one))
    if shape.get("data") != 8:
        assert max(bytes_per_device(params).values()) < 0.5 * max(bytes_per_device(one).values())
    np.testing.assert_allclose(outputs(path, mesh=mesh), outputs(path), atol=5e-5)


def test_other_sharding_rules_are_used(write: Write) -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    from rlhf_jax.parallel import RULES

    params = load_pretrained(write(CASES["tied"]), mesh=mesh, rules=RULES | {"vocab": ("tensor",), "mlp": ()}).params
    assert params["embed"]["embedding"].sharding.shard_shape((264, 32)) == (132, 32)
    assert params["layers"]["mlp"]["up"]["kernel"].sharding.shard_shape((2, 32, 48)) == (2, 8, 48)


def test_host_memory_never_holds_the_model_twice(write: Write) -> None:
    """The model has 25 MB of weights on eight devices. On a CPU the shards may share memory with the numpy arrays."""
    fields = llama_fields(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, head_dim=64, num_key_value_heads=4
    )
    path = write(fields, files=2)
    load_pretrained(path, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))  # compile and import what there is to
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size > 20e6
    tracemalloc.start()
    params = load_pretrained(path, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2))).params
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak < size + largest / 4 + 4e6, (peak, size, largest)


# ---- what can be wrong


def without(tensors: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_every_wrong_tensor_is_named(write: Write) -> None:
    fields = llama_fields()
    right = llama_tensors(fields)
    query, gate = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    wrong = without(right, "model.norm.weight") | {
        query: right[query].T.copy()[:16],
        gate: right[gate].astype(np.int8),
        "model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32),
    }
    with pytest.raises(InputError) as caught:
        load_pretrained(write(fields, wrong))
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "not of this architecture: model.layers.0.self_attn.q_proj.bias" in message
    assert f"{query} [16, 32], not [32, 32]" in message
    assert f"{gate} (I8)" in message
    assert "\n" not in message


def test_layers_that_config_json_does_not_count_are_extra(write: Write) -> None:
    fields = llama_fields(num_hidden_layers=1)
    with pytest.raises(
        InputError, match="not of this architecture: model.layers.1.input_layernorm.weight.* and 1 more"
    ):
        load_pretrained(write(fields, llama_tensors(llama_fields())))


def test_pickled_weights_are_refused_with_the_remedy(write: Write) -> None:
    path = write(llama_fields())
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights .pytorch_model.bin.*never read; convert"):
        load_pretrained(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        load_pretrained(path)
    (path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="adapter weights without adapter_config.json; give the whole adapter"):
        load_pretrained(path)


def test_files_that_disagree_with_the_index(write: Write) -> None:
    fields = llama_fields()
    path = write(fields, files=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())

    def with_index(places: Any) -> None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    places = index["weight_map"]
    with_index(places | {"model.norm.weight": "model-00003-of-00003.safetensors"})
    with pytest.raises(InputError, match="model-00003-of-00003.safetensors of .*not there"):
        load_pretrained(path)
    with_index(without(places, "model.norm.weight"))
    with pytest.raises(InputError, match="does not agree with the files on model.norm.weight"):
        load_pretrained(path)
    with_index(places | {"model.norm.weight": "../other.safetensors"})
    with pytest.raises(InputError, match="not in this directory"):
        load_pretrained(path)
    with_index([])
    with pytest.raises(InputError, match="weight_map must map"):
        load_pretrained(path)
    with_index(places)
    (path / sorted(set(places.values()))[1]).write_bytes((path / sorted(set(places.values()))[0]).read_bytes())
    with pytest.raises(InputError, match="is in .* and in .*; keep one"):
        load_pretrained(path)


def test_damaged_files(write: Write) -> None:
    path = write(llama_fields())
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_pretrained(path)
    (path / "model.safetensors").write_bytes(whole)
    (path / "config.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(InputError, match=r"config.json:3: not JSON"):
        load_pretrained(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object, holds a list"):
        load_pretrained(path)
    (path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        load_pretrained(path)


def test_a_wrong_mesh_is_an_input_error(write: Write) -> None:
    fields = llama_fields(num_attention_heads=3, num_key_value_heads=3, head_dim=8, hidden_size=24)
    with pytest.raises(InputError, match="not divisible"):
        load_pretrained(write(fields), mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))


def test_reading_a_window_reads_no_more(tmp_path: Path) -> None:
    tensor = np.arange(24, dtype=np.float32).reshape(4, 6)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    tensors = open_safetensors(tmp_path)
    np.testing.assert_array_equal(tensors.read("a", (slice(1, 3), slice(2, 4))), tensor[1:3, 2:4])
    assert tensors.stored["a"].shape == (4, 6) and tensors.stored["a"].dtype == "F32"
