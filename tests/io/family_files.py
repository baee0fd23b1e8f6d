"""Small checkpoints of every family, each configuration with the options that its family has.

golden/families.json has the names and shapes of the tensors that transformers saves for each (`make_family_golden.py`), independent
of this package's name table; golden/families.npz has the outputs that transformers computes.

"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT, OTHER, FAR = 16, 9, 5000
"""Lengths of the two documents; first position of a second copy of the first document."""


def _fields(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    """Return a config.json: 264 tokens, hidden 32, 3 layers, 4 heads on 2 key/value heads of 8, feed-forward 48, 8192 positions."""
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    return fields | changes


_NEOX_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")


def _select_fields(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in (*names, *_TOKENS, "architectures", "model_type")}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SHORT, _LONG = [1.0, 1.1, 1.5, 2.0], [2.0, 3.0, 5.0, 8.0]
CASES: dict[str, dict[str, Any]] = {
    "llama": _fields(
        "LlamaForCausalLM", "llama", rope_scaling=_LLAMA3, rope_theta=5e5, attention_bias=True, mlp_bias=True
    ),
    "llama_linear": _fields(
        "LlamaForCausalLM", "llama", rope_scaling={"type": "linear", "factor": 3.0}, tie_word_embeddings=True,
        hidden_act="gelu",
    ),
    "mistral": _fields("MistralForCausalLM", "mistral", sliding_window=5, head_dim=12),
    "qwen2": _fields(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2, rope_theta=1e6,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        tie_word_embeddings=True,
    ),
    "qwen3": _fields(
        "Qwen3ForCausalLM", "qwen3", head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_theta=1e6,
    ),
    "gemma": _fields("GemmaForCausalLM", "gemma", head_dim=12, hidden_act="gelu"),
    "gemma2": _fields(
        "Gemma2ForCausalLM", "gemma2", head_dim=12, sliding_window=5, query_pre_attn_scalar=11,
        final_logit_softcapping=9.0, attn_logit_softcapping=1.5, hidden_activation="gelu_pytorch_tanh",
    ),
    "gemma3": _fields(
        "Gemma3ForCausalLM", "gemma3_text", head_dim=12, num_hidden_layers=5, sliding_window=5, sliding_window_pattern=3,
        query_pre_attn_scalar=14, rope_theta=1e6, rope_local_base_freq=3e3, rope_scaling={"rope_type": "linear", "factor": 8.0},
        final_logit_softcapping=9.0,
    ),
    "smollm3": _fields(
        "SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5,
        attention_bias=True, mlp_bias=True, rope_theta=5e6,
    ),
    "phi3": _fields(  # no longer than the original context: the short factors
        "Phi3ForCausalLM", "phi3", original_max_position_embeddings=8192, sliding_window=7,
        rope_scaling={"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG, "attention_factor": 1.3},
    ),
    "phi3_long": _fields(  # longer: the long factors
        "Phi3ForCausalLM", "phi3", original_max_position_embeddings=4096, partial_rotary_factor=0.5,
        rope_scaling={"type": "longrope", "short_factor": _SHORT[:2], "long_factor": _LONG[:2]},
    ),
    "olmo2": _fields("Olmo2ForCausalLM", "olmo2", attention_bias=True, rope_theta=5e5),
    "gpt_neox": _select_fields(_fields("GPTNeoXForCausalLM", "gpt_neox"), *_NEOX_SIZES, "max_position_embeddings")
    | {"rotary_pct": 0.5, "rotary_emb_base": 2e4, "layer_norm_eps": 1e-4, "classifier_dropout": 0.1},
    "gpt_neox_sequential": _select_fields(_fields("GPTNeoXForCausalLM", "gpt_neox"), *_NEOX_SIZES, "max_position_embeddings")
    | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    "gpt2": _select_fields(_fields("GPT2LMHeadModel", "gpt2"), "vocab_size")
    | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 8192, "n_inner": 48, "layer_norm_epsilon": 1e-4}
    | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "n_ctx": 8192},
    "mixtral": _fields(
        "MixtralForCausalLM", "mixtral", num_local_experts=5, num_experts_per_tok=2, router_aux_loss_coef=0.02,
        sliding_window=6,
    ),
    "qwen3_moe": _fields(
        "Qwen3MoeForCausalLM", "qwen3_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, head_dim=12,
        mlp_only_layers=[1], norm_topk_prob=True, use_sliding_window=True, sliding_window=6, attention_bias=True,
    ),
}  # fmt: skip
BEYOND_ORIGINAL = {"phi3_long"}
"""Cases whose documents begin at FAR: transformers uses the long factors only when a batch reaches past the original
context, this package at all lengths (`RopeScaling`)."""


def tokens() -> np.ndarray:
    """Return the first document, int64 [DOCUMENT]."""
    return np.random.default_rng(7).integers(3, 259, DOCUMENT)


def other_tokens() -> np.ndarray:
    """Return the second document, the reversed beginning of the first: int64 [OTHER]."""
    return tokens()[:OTHER][::-1].copy()


def stored_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that transformers saves for a case."""
    return {name: tuple(shape) for name, shape in json.loads((GOLDEN / "families.json").read_text())[case].items()}


def draw_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw random float32 tensors, large enough for peaked logits; a tensor depends on (seed, name, shape) alone."""
    return {name: _draw(seed, name, shape) for name, shape in shapes.items()}


def _draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.sha256(f"{seed} {name} {shape}".encode()).digest()
    noise = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(shape)
    is_scale = name.endswith(".weight") and len(shape) == 1
    return (1.0 + 0.3 * noise if is_scale else 0.25 * noise).astype(np.float32)
