"""GGUF files (llama.cpp): configuration, tensors and tokenizer under Hugging Face's names.

Quantised tensors are de-quantised a window of rows at a time with the ``gguf`` package. Source of keys and names:
ggml/docs/gguf.md; of the row order of query and key: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rlhf_jax.io.layout import Window
from rlhf_jax.io.tensors import Stored, Tensors, listed
from rlhf_jax.types import InputError

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_FIELDS = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "llama.vocab_size": "vocab_size",
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_READABLE = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)


def open_gguf(path: Path) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """(config.json fields, tensors, all metadata) of a GGUF file of the llama architecture.

    The file is mapped, not read. Raises InputError: not a whole GGUF file, another architecture, a key that changes the
    computation and is not understood.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a .gguf file") from error
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error}); download it again") from error
    raw = {tensor.name: tensor for tensor in reader.tensors}
    fields = _config_fields(metadata, "output.weight" not in raw, str(path))
    return fields, _tensors(path, raw, fields), metadata


def _config_fields(metadata: Mapping[str, Any], tied: bool, where: str) -> dict[str, Any]:
    """What config.json would say. Numbers stored as float32 get their shortest decimal form (1e-5, not 9.9999997e-06)."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{where}: general.architecture = {architecture!r} is not supported; supported: llama")
    if missing := [f"llama.{name}" for name in _REQUIRED if f"llama.{name}" not in metadata]:
        raise InputError(f"{where}: {listed(missing)} is missing; download the file again")
    found = {theirs: metadata[key] for key, theirs in _FIELDS.items() if key in metadata}
    fields = {name: float(str(np.float32(v))) if isinstance(v, float) else v for name, v in found.items()}
    fields.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [])))
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    understood = {
        "llama.rope.dimension_count": fields["head_dim"],
        "llama.attention.value_length": fields["head_dim"],
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
    }
    wrong = [f"{key} = {metadata[key]!r}" for key, value in understood.items() if metadata.get(key, value) != value]
    wrong += [
        f"{key} = {value!r}"
        for key, value in metadata.items()
        if key.startswith("llama.") and key not in _FIELDS.keys() | understood.keys()
    ]
    if wrong:
        raise InputError(f"{where}: {listed(wrong)}: this computation is not implemented")
    return fields | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied}


def _tensors(path: Path, raw: Mapping[str, Any], fields: Mapping[str, Any]) -> Tensors:
    """Tensors under Hugging Face's names; names that are not known stay as they are (and are refused later)."""
    by_name = {_their_name(name): tensor for name, tensor in raw.items()}
    stored = {
        name: Stored(tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, path.name)
        for name, tensor in by_name.items()
    }
    heads = {
        "q_proj": fields["num_attention_heads"],
        "k_proj": fields.get("num_key_value_heads", fields["num_attention_heads"]),
    }

    def read(name: str, window: Window) -> np.ndarray:
        tensor, (first, *rest) = by_name[name], window
        rows: Any = first
        for part, count in heads.items():
            if f".{part}." in name:
                rows = _interleaved_rows(stored[name].shape[0], count)[first]
        return gguf.dequantize(tensor.data[rows], tensor.tensor_type)[(slice(None), *rest)]

    return Tensors(str(path), stored, read, _READABLE)


def _their_name(name: str) -> str:
    block, _, rest = name.removeprefix("blk.").partition(".")
    if name.startswith("blk.") and block.isdigit() and rest in _LAYER_TENSORS:
        return f"model.layers.{int(block)}.{_LAYER_TENSORS[rest]}"
    return _TENSORS.get(name, name)


def _interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """For each row of Hugging Face's query or key matrix the row of GGUF's that holds it.

    GGUF pairs rotary rows as (0, 1), (2, 3), ...; Hugging Face pairs row i of a head with row i + head_dim / 2.
    Head of four: [0, 2, 1, 3].
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
