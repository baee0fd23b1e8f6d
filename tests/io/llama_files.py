"""Llama checkpoints in Hugging Face's format, written without transformers and without this package's name table.

Names and shapes are repeated here on purpose: `make_llama_golden.py` shows that transformers accepts them (strictly), the
tests that this package does.

"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rlhf_jax.testing import byte_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "llama.npz"


def llama_fields(**changes: Any) -> dict[str, Any]:
    """Return a config.json of 264 tokens, hidden 32, 2 layers, 4 heads on 2 key/value heads of 8, feed-forward 48."""
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "transformers_version": "4.46.0",
    }
    return fields | changes


CASES: dict[str, dict[str, Any]] = {
    "tied": llama_fields(),
    "untied": llama_fields(
        tie_word_embeddings=False, head_dim=16, num_key_value_heads=1, rope_theta=500000.0, rms_norm_eps=1e-3
    ),
    "mistral": llama_fields(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=None,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "scorer": llama_fields(
        architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}
    ),
}


def llama_tensors(fields: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw random float32 tensors, large enough for peaked logits; a tensor depends on (seed, name, shape) alone."""
    d, f, v = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    queries = fields["num_attention_heads"] * fields["head_dim"]
    keys = fields["num_key_value_heads"] * fields["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {
            block + "input_layernorm.weight": (d,),
            block + "self_attn.q_proj.weight": (queries, d),
            block + "self_attn.k_proj.weight": (keys, d),
            block + "self_attn.v_proj.weight": (keys, d),
            block + "self_attn.o_proj.weight": (d, queries),
            block + "post_attention_layernorm.weight": (d,),
            block + "mlp.gate_proj.weight": (f, d),
            block + "mlp.up_proj.weight": (f, d),
            block + "mlp.down_proj.weight": (d, f),
        }
    if fields["architectures"][0].endswith("ForSequenceClassification"):
        shapes["score.weight"] = (1, d)
    elif not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return {name: _draw(seed, name, shape) for name, shape in shapes.items()}


def _draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.sha256(f"{seed} {name} {shape}".encode()).digest()
    noise = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(shape)
    values = 1.0 + 0.3 * noise if "norm" in name else 0.25 * noise
    return values.astype(np.float32)


def golden_tokens() -> np.ndarray:
    """Return the input tokens, int32 [2, 20]."""
    return np.random.default_rng(7).integers(3, 259, (2, 20)).astype(np.int32)


def write_checkpoint(
    directory: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    dtype: str = "float32",
    files: int = 1,
) -> Path:
    """Write config.json, tokenizer and the tensors, in one file or in several with an index.

    dtype: of the float32 tensors; the others stay unchanged.

    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    byte_tokenizer().save_pretrained(directory)
    target_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored = {name: t.astype(target_dtype) if t.dtype == np.float32 else t for name, t in tensors.items()}
    if files == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    file_names = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: stored[name] for name in sorted(stored)[number::files]}
        save_file(part, directory / file, metadata={"format": "pt"})
        file_names |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in stored.values())}, "weight_map": file_names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
