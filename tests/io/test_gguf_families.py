"""GGUF files of every supported architecture, written with the gguf package's own tensor names and keys.

`pytest -m parity` compares with transformers' reading of the same files.

"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from family_files import _fields, draw_tensors, tokens
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_tokenizer
from llama_files import write_checkpoint

from rlhf_jax.errors import InputError
from rlhf_jax.io import load_pretrained
from rlhf_jax.io.layout import parse
from rlhf_jax.io.placing import tensor_names
from rlhf_jax.models.families import config_from_hf, dimensions, weights_of

SIZES = {"intermediate_size": 64, "rms_norm_eps": 1e-5}
FIELDS = {
    "llama": _fields("LlamaForCausalLM", "llama", head_dim=8, rope_theta=5e5, **SIZES),
    "qwen2": _fields("Qwen2ForCausalLM", "qwen2", rope_theta=1e6, tie_word_embeddings=True, **SIZES)
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    "qwen3": _fields("Qwen3ForCausalLM", "qwen3", head_dim=16, rope_theta=1e6, **SIZES),
    "gemma": _fields("GemmaForCausalLM", "gemma", head_dim=16, tie_word_embeddings=True, **SIZES),
    "gemma2": _fields(
        "Gemma2ForCausalLM", "gemma2", head_dim=16, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=9.0,
        attn_logit_softcapping=1.5, tie_word_embeddings=True, **SIZES,
    ),
    "gemma3": _fields(
        "Gemma3ForCausalLM", "gemma3_text", head_dim=16, num_hidden_layers=7, sliding_window=5, query_pre_attn_scalar=16,
        rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 8.0}, tie_word_embeddings=True, **SIZES,
    ),
    "phi3": _fields("Phi3ForCausalLM", "phi3", head_dim=16, hidden_size=64, sliding_window=7, partial_rotary_factor=0.5, **SIZES),
}  # fmt: skip
STORED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


def shapes_of(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    config = config_from_hf(fields, "config.json")
    sizes = dimensions(config)
    return {
        name: parse(weight.layout, weight.part).stored_shape(sizes)
        for weight in weights_of(config)
        for name in tensor_names(weight, config)
    }


def write(
    path: Path, architecture: str, fields: dict[str, Any], kinds: list[Kind], more: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Write a file with the n-th matrix as the n-th of ``kinds``; return its tensors under Hugging Face's names."""
    writer = gguf.GGUFWriter(path, architecture)
    write_tokenizer(writer)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_rope_freq_base(fields.get("rope_theta", 10000.0))
    if "head_dim" in fields and architecture != "phi3":
        writer.add_key_length(fields["head_dim"])
        writer.add_value_length(fields["head_dim"])
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(fields["head_dim"] * fields["partial_rotary_factor"]))
    if "sliding_window" in fields:
        writer.add_sliding_window(fields["sliding_window"])
    if "attn_logit_softcapping" in fields:
        writer.add_attn_logit_softcapping(fields["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(fields["final_logit_softcapping"])
    scaling = fields.get("rope_scaling") or {}
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if "original_max_position_embeddings" in scaling:
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    for key, value in (more or {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    number = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, fields["num_hidden_layers"])
    stored_tensors, count = {}, 0
    for name, tensor in draw_tensors(shapes_of(fields)).items():
        kind, plus_one = Kind.F32, architecture.startswith("gemma") and name.endswith("norm.weight")
        if tensor.ndim == 2:
            kind, count = kinds[count % len(kinds)], count + 1
        data = gguf.quantize(tensor + np.float32(1) if plus_one else tensor, kind)
        stored_tensors[name] = gguf.dequantize(data, kind) - np.float32(plus_one)
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored_tensors


@pytest.mark.parametrize("architecture", FIELDS)
def test_a_file_is_the_checkpoint_it_was_made_from(architecture: str, tmp_path: Path) -> None:
    """The matrices cover every dtype that the package writes."""
    fields = FIELDS[architecture]
    stored_tensors = write(tmp_path / "model.gguf", architecture, fields, STORED)
    model, params, _ = load_pretrained(tmp_path / "model.gguf")
    other, same, _ = load_pretrained(write_checkpoint(tmp_path / "hf", fields, stored_tensors))
    assert model.config == other.config
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_mistral_files_have_the_architecture_llama(tmp_path: Path) -> None:
    """Like llama.cpp, these files omit the attention window, so the loaded model has none."""
    fields = FIELDS["llama"]
    stored_tensors = write(tmp_path / "model.gguf", "llama", fields, STORED)
    mistral = fields | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    model, params, _ = load_pretrained(tmp_path / "model.gguf")
    other, same, _ = load_pretrained(write_checkpoint(tmp_path / "hf", mistral, stored_tensors))
    assert model.config == other.config.replace(family="llama")
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_a_window_of_zero_and_no_experts_are_nothing(tmp_path: Path) -> None:
    """llama.cpp's converter writes 0 for a model without window or experts."""
    fields = {name: value for name, value in FIELDS["phi3"].items() if name != "sliding_window"}
    more = {"phi3.attention.sliding_window": 0, "phi3.expert_count": 0, "phi3.expert_used_count": 0}
    write(tmp_path / "model.gguf", "phi3", fields, [Kind.F32], more)
    config = load_pretrained(tmp_path / "model.gguf").model.config
    assert config.sliding_window is None and config.layer_pattern == () and config.num_experts == 0


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_queries_by_width_per_head(architecture: str, layers: int, tmp_path: Path) -> None:
    """llama.cpp recognizes them by their number of layers: 32 / 4 heads = 8, not head_dim = 16."""
    from rlhf_jax.io.gguf_file import open_gguf

    write(tmp_path / "model.gguf", architecture, FIELDS[architecture] | {"num_hidden_layers": layers}, [Kind.F32])
    assert open_gguf(tmp_path / "model.gguf")[0]["query_pre_attn_scalar"] == 8


@pytest.mark.parametrize(
    ("architecture", "more", "words"),
    [
        ("qwen2", {"qwen2.rope.scaling.attn_factor": 2.0}, "qwen2.rope.scaling.attn_factor = 2.0"),
        ("qwen3", {"qwen3.expert_count": 4}, "qwen3.expert_count = 4"),
        ("qwen3", {"qwen3.attention.sliding_window": 4}, "qwen3.attention.sliding_window = 4"),
        ("gemma3", {"gemma3.attn_logit_softcapping": 4.0}, "gemma3.attn_logit_softcapping = 4.0"),
        ("phi3", {"phi3.rope.scaling.type": "longrope"}, "phi3.rope.scaling.type = 'longrope'"),
    ],
)
def test_unsupported_keys_are_refused(architecture: str, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", architecture, FIELDS[architecture], [Kind.F32], more)
    with pytest.raises(InputError, match=f"{words}.*this computation is not implemented"):
        load_pretrained(tmp_path / "model.gguf")


@pytest.mark.parity
@pytest.mark.parametrize("architecture", [name for name in FIELDS if name != "gemma"])  # transformers does not read it
def test_live_transformers_reads_the_same(architecture: str, tmp_path: Path) -> None:
    """The tensors equal those that transformers reads.

    It gets the configuration from the test, since it ignores the keys of rope scaling, soft caps, partial rotation and
    Qwen 3's head_dim.

    """
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    import transformers

    write(tmp_path / "model.gguf", architecture, FIELDS[architecture], STORED)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(FIELDS[architecture]))
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = network(torch.from_numpy(tokens())[None], use_cache=False).logits[0].numpy()
    model, params, _ = load_pretrained(tmp_path / "model.gguf")
    actual = np.asarray(jax.jit(model.apply)(params, tokens()[None].astype(np.int32)))[0]
    difference = np.abs(actual - expected).max()
    print(f"\nGGUF {architecture}: {difference:.1e}")
    assert expected.std() > 1 and difference <= 1e-4
