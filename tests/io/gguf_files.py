"""GGUF files for tests, written with the gguf package's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from llama_files import llama_fields, llama_tensors

from rlhf_jax.testing import byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FIELDS = llama_fields(intermediate_size=64, head_dim=8, rms_norm_eps=1e-5, rope_theta=100000.0)
KINDS = {"ffn_down": Kind.Q4_1, "ffn_up": Kind.Q8_0, "attn_q": Kind.Q8_0, "attn_k": Kind.Q4_1, "ffn_gate": Kind.F16}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Write bytes, three special tokens and the merge "ab", as a converter of llama.cpp does."""
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "ab"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        layer, suffix = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[suffix.removesuffix('.weight')]}.weight"
    return NAMES[name.removesuffix(".weight")] + ".weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows i and i + head_dim / 2 of a head to be neighbours (llama.cpp's LlamaModel.permute)."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, fields: dict[str, Any], *, keys: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Write a file and return its tensors under Hugging Face's names and in its order. keys: more metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_rope_dimension_count(fields["head_dim"])
    writer.add_vocab_size(fields["vocab_size"])
    write_tokenizer(writer)
    for key, value in (keys or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    stored = {}
    for name, tensor in llama_tensors(fields).items():
        kind = KINDS.get(gguf_name(name).split(".")[-2], Kind.F32)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        data = gguf.quantize(tensor, kind)
        stored[name] = gguf.dequantize(data, kind)
        if heads is not None:
            data = interleave(data, fields[heads])  # whole rows move, and a row is quantised by itself
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
