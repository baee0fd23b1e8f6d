"""GGUF files (llama.cpp): configuration, tensors and tokenizer under Hugging Face's names.

Quantised tensors are de-quantised a window of rows at a time with the ``gguf`` package. Sources: ggml/docs/gguf.md for keys
and names; llama.cpp, convert_hf_to_gguf.py (LlamaModel.permute, GemmaModel.modify_tensors) for norms and the row order of
query and key; src/llama-model.cpp (gemma2, gemma3) for the scale of queries.

"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.io.layout import Window
from rlhf_jax.io.tensors import Stored, Tensors, join_names

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_SIZES = {*_REQUIRED, "attention.head_count_kv", "attention.key_length", "rope.dimension_count", "vocab_size"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """A model architecture of GGUF (general.architecture).

    language_model, model_type: of config.json.
    layers: names of a block's tensors, without ".weight" and ".bias".
    fields: keys that only this architecture has.
    interleaved: rows of query and key are in the order of ggml's rotation.
    norms_plus_one: norm scales are stored as multiplied; Hugging Face stores scale - 1.
    layers_of_27b: number of layers of the model that scales its queries by hidden_size / heads; the others scale by head_dim
    (llama.cpp has no key for it).

    """

    language_model: str
    model_type: str
    layers: Mapping[str, str]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    norms_plus_one: bool = False
    layers_of_27b: int | None = None


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "llama", _PRE_NORMS | _MATRICES, interleaved=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _PRE_NORMS | _MATRICES),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _PRE_NORMS | _MATRICES | _HEAD_NORMS),
    "gemma": _Architecture("GemmaForCausalLM", "gemma", _PRE_NORMS | _MATRICES, norms_plus_one=True),
    "gemma2": _Architecture(
        "Gemma2ForCausalLM", "gemma2", _FOUR_NORMS | _MATRICES, _WINDOW | _CAPS, norms_plus_one=True, layers_of_27b=46
    ),
    "gemma3": _Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _FOUR_NORMS | _MATRICES | _HEAD_NORMS,
        _WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
        norms_plus_one=True,
        layers_of_27b=62,
    ),
    "phi3": _Architecture("Phi3ForCausalLM", "phi3", _PRE_NORMS | _FUSED, _WINDOW),
}
"""Architectures by general.architecture. Files of Mistral models say "llama"."""
_READABLE = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)


def open_gguf(path: Path) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """Open a GGUF file of one of `_ARCHITECTURES` and return (config.json fields, tensors, all metadata).

    The file is memory-mapped. Raises InputError for an incomplete GGUF file, another architecture, and a key that changes the
    computation and is not supported.

    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a .gguf file") from error
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error}); download it again") from error
    raw = {tensor.name: tensor for tensor in reader.tensors}
    kind = _architecture(metadata, str(path))
    fields = _config_fields(metadata, kind, "output.weight" not in raw, str(path))
    return fields, _tensors(path, raw, fields, kind), metadata


def _architecture(metadata: Mapping[str, Any], where: str) -> _Architecture:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise InputError(
            f"{where}: general.architecture = {name!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[name]


def _config_fields(metadata: Mapping[str, Any], kind: _Architecture, tied: bool, where: str) -> dict[str, Any]:
    """Return the fields of config.json. Numbers stored as float32 get their shortest decimal form (1e-5, not 9.9999997e-06)."""
    prefix = f"{metadata['general.architecture']}."
    keys = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if missing := [prefix + name for name in _REQUIRED if name not in keys]:
        raise InputError(f"{where}: {join_names(missing)} is missing; download the file again")
    for name in _SIZES & keys.keys():
        if isinstance(keys[name], bool) or not isinstance(keys[name], int) or keys[name] < 1:
            raise InputError(
                f"{where}: {prefix}{name} = {keys[name]!r}: must be one positive whole number for all layers"
            )
    names = {**_FIELDS, **kind.fields}
    fields: dict[str, Any] = {hf_name: _number(keys[key]) for key, hf_name in names.items() if key in keys}
    fields.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [])))
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    supported = {
        "rope.dimension_count": fields["head_dim"],
        "attention.value_length": fields["head_dim"],
        "expert_count": 0,
        "expert_used_count": 0,
    }
    if kind.model_type == "phi3":
        rotated = keys.pop("rope.dimension_count", fields["head_dim"])
        fields["partial_rotary_factor"] = rotated / fields["head_dim"]
        fields["sliding_window"] = fields.get("sliding_window") or None  # 0: none
    if kind.layers_of_27b is not None:
        is_27b = fields["num_hidden_layers"] == kind.layers_of_27b
        fields["query_pre_attn_scalar"] = (
            fields["hidden_size"] // fields["num_attention_heads"] if is_27b else fields["head_dim"]
        )
    fields |= _rope_scaling(keys)
    wrong = [f"{prefix}{key} = {keys[key]!r}" for key, value in supported.items() if keys.get(key, value) != value]
    wrong += [f"{prefix}{key} = {value!r}" for key, value in keys.items() if key not in names.keys() | supported.keys()]
    if wrong:
        raise InputError(f"{where}: {join_names(wrong)}: this computation is not implemented")
    return fields | {"architectures": [kind.language_model], "model_type": kind.model_type, "tie_word_embeddings": tied}


def _number(value: Any) -> Any:
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(keys: dict[str, Any]) -> dict[str, Any]:
    """Take the keys of "linear" and "yarn" out of ``keys`` and return them as rope_scaling; other keys stay and are refused."""
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        keys.pop("rope.scaling.type", None)
        return {}
    names = {"linear": ("factor",), "yarn": ("factor", "original_context_length")}.get(str(kind), ())
    if not names or any(f"rope.scaling.{name}" not in keys for name in names):
        return {}
    factor, *original = (_number(keys.pop(f"rope.scaling.{name}")) for name in names)
    settings = {"rope_type": keys.pop("rope.scaling.type"), "factor": factor}
    return {"rope_scaling": settings | ({"original_max_position_embeddings": original[0]} if original else {})}


def _tensors(path: Path, raw: Mapping[str, Any], fields: Mapping[str, Any], kind: _Architecture) -> Tensors:
    """Return the tensors under Hugging Face's names; unknown names stay and are refused later."""
    by_name = {_hf_name(name, kind): tensor for name, tensor in raw.items()}
    stored = {
        name: Stored(tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, path.name)
        for name, tensor in by_name.items()
    }
    heads = {
        "q_proj": fields["num_attention_heads"],
        "k_proj": fields.get("num_key_value_heads", fields["num_attention_heads"]),
    }

    def read(name: str, window: Window) -> np.ndarray:
        tensor, (first, *columns) = by_name[name], window
        rows: Any = first
        for part, count in heads.items():
            if kind.interleaved and f".{part}." in name:
                rows = _interleaved_rows(stored[name].shape[0], count)[first]
        read: np.ndarray = gguf.dequantize(tensor.data[rows], tensor.tensor_type)[(slice(None), *columns)]
        return read - np.float32(1) if kind.norms_plus_one and name.endswith("norm.weight") else read

    return Tensors(str(path), stored, read, _READABLE)


def _hf_name(name: str, kind: _Architecture) -> str:
    block, _, suffix = name.removeprefix("blk.").partition(".")
    part, _, leaf = suffix.rpartition(".")
    if name.startswith("blk.") and block.isdigit() and part in kind.layers and leaf in ("weight", "bias"):
        return f"model.layers.{int(block)}.{kind.layers[part]}.{leaf}"
    return _TENSORS.get(name, name)


def _interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Return, for each row of Hugging Face's query or key matrix, the index of its row in GGUF's.

    GGUF pairs rotary rows as (0, 1), (2, 3), ...; Hugging Face pairs row i of a head with row i + head_dim / 2.
    Head of four: [0, 2, 1, 3].

    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
