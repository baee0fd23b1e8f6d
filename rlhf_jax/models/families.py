"""Families of Hugging Face checkpoints, as data: what a config.json field means here, which tensor is which parameter.

A family is a `Family` record, not a class: the fields it maps, what it assumes of absent ones, the values that the
decoder can compute, and one table of names that is read in both directions (`io` imports and exports by it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import Head, ModelConfig
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a name table.

    theirs: tensor name; ``{layer}`` stands for 0 ... num_layers - 1. ours: path of the parameter; with ``{layer}`` in
    ``theirs`` its layers are stacked along a leading axis. layout: their axes -> our axes in the letters of
    `dimensions`, ``(h k) d -> d h k``: their rows are h blocks of k, ours is [d, h, k]. zero_when_absent: a checkpoint
    may lack it, which means zeros.
    """

    theirs: str
    ours: str
    layout: str
    zero_when_absent: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one kind are read.

    fields: config.json field -> `ModelConfig` field. defaults: what transformers assumes when a field is absent (None:
    derived from others). fixed: fields that change the computation -> the values the decoder computes.
    weights: the name table, all heads together.
    """

    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    weights: tuple[Weight, ...]


_LAYER = "model.layers.{layer}."
LLAMA_WEIGHTS = (
    Weight("model.embed_tokens.weight", "embed/embedding", "v d -> v d"),
    Weight(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "d -> d"),
    Weight(_LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "(h k) d -> d h k"),
    Weight(_LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "(g k) d -> d g k"),
    Weight(_LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "(g k) d -> d g k"),
    Weight(_LAYER + "self_attn.o_proj.weight", "layers/attention/output/kernel", "d (h k) -> h k d"),
    Weight(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
    Weight(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "f d -> d f"),
    Weight(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "f d -> d f"),
    Weight(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "d f -> f d"),
    Weight("model.norm.weight", "final_norm/scale", "d -> d"),
    Weight("lm_head.weight", "lm_head/kernel", "v d -> d v"),
    Weight("score.weight", "scalar_head/kernel", "o d -> d o"),
    # transformers' score head has no bias. Ours is kept under this name; transformers reports it as unexpected and
    # computes the score without it.
    Weight("score.bias", "scalar_head/bias", "o -> o", zero_when_absent=True),
)
DERIVED_TENSORS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Buffers that old transformers stored; they follow from rope_theta and no version reads them."""

_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
}
_LLAMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
}
LLAMA = Family(
    fields=_LLAMA_FIELDS,
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    fixed=_LLAMA_FIXED,
    weights=LLAMA_WEIGHTS,
)
MISTRAL = Family(
    fields=_LLAMA_FIELDS,
    defaults=dict(LLAMA.defaults) | {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
    fixed=_LLAMA_FIXED | {"sliding_window": (None,)},
    weights=LLAMA_WEIGHTS,
)
_ABSENT_IS_NOT_FIXED = {"sliding_window": 4096}
"""Fields of ``fixed`` that transformers gives another value when they are absent (MistralConfig)."""

ARCHITECTURES: dict[str, tuple[Family, Head]] = {
    "LlamaForCausalLM": (LLAMA, "lm"),
    "LlamaForSequenceClassification": (LLAMA, "scalar"),
    "MistralForCausalLM": (MISTRAL, "lm"),
    "MistralForSequenceClassification": (MISTRAL, "scalar"),
}
"""Architecture of config.json -> (family, head)."""

_COMMON_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_NO_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path architectures bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_llama_config label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version transformers.js_config typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905  (a list would be a page of one-word lines)
)
"""Fields that do not change the logits of a forward pass in evaluation mode: labels, generation, storage, training."""


def dimensions(config: ModelConfig) -> dict[str, int]:
    """The letters of `Weight.layout`: v vocabulary, d hidden, h query heads, g key/value heads, k head_dim, f, o = 1."""
    return {
        "v": config.vocab_size,
        "d": config.hidden_size,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "k": config.head_dim,
        "f": config.ffn_size,
        "o": 1,
    }


def weights_of(config: ModelConfig, family: Family = LLAMA) -> tuple[Weight, ...]:
    """The rows of the family's name table that a model of this configuration has."""
    absent = set()
    if not config.has_lm or config.tie_embeddings:
        absent.add("lm_head")
    if not config.has_scalar:
        absent.add("scalar_head")
    return tuple(weight for weight in family.weights if weight.ours.split("/")[0] not in absent)


def config_from_hf(fields: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Family and `ModelConfig` (float32, head as the architecture says) of a config.json. where: the file, for messages.

    Every field is mapped, known to leave the logits alone, or refused by name. Raises InputError.
    """
    architecture = _architecture(fields, where)
    family, head = ARCHITECTURES[architecture]
    _refuse_foreign(fields, family, where)
    if head == "scalar" and (labels := _labels(fields)) != 1:
        raise InputError(f"{where}: {architecture} with {labels} labels: a reward or value model has num_labels = 1")
    values: dict[str, Any] = {"rope_theta": _rope_theta(fields, where)}
    for theirs, ours in family.fields.items():
        if theirs not in fields and theirs not in family.defaults:
            raise InputError(f"{where}: {theirs} is missing; take config.json and weights from the same checkpoint")
        values[ours] = fields.get(theirs, family.defaults.get(theirs))
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    if values["head_dim"] is None:
        values["head_dim"] = _quotient(values["hidden_size"], values["num_heads"], where)
    try:
        return family, ModelConfig(**values, head=head)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a model with head "lm" or "scalar", without special token ids.

    ``torch_dtype`` is the dtype of the parameters. Raises InputError for what no checkpoint of the family can say.
    """
    if config.head == "lm+scalar":
        raise InputError(
            "head 'lm+scalar': a checkpoint has one head; load the model with head='lm' or head='scalar' and export that"
        )
    if config.hidden_size % config.num_heads:
        raise InputError(
            f"ModelConfig.hidden_size = {config.hidden_size} is not a multiple of num_heads = {config.num_heads}: "
            "transformers' LlamaConfig cannot say this model"
        )
    mapped = {theirs: getattr(config, ours) for theirs, ours in _LLAMA_FIELDS.items()}
    theirs = {
        **mapped,
        "architectures": ["LlamaForCausalLM" if config.head == "lm" else "LlamaForSequenceClassification"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
    }
    if config.head == "scalar":
        theirs |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    said = config_from_hf(theirs, "config.json")[1]
    kept = config.replace(param_dtype=said.param_dtype, compute_dtype=said.compute_dtype, remat=said.remat)
    if lost := [f.name for f in dataclasses.fields(config) if getattr(kept, f.name) != getattr(said, f.name)]:
        raise InputError(
            f"ModelConfig.{lost[0]} = {getattr(config, lost[0])!r}: a Llama checkpoint cannot say this model"
        )
    return theirs


def _architecture(fields: Mapping[str, Any], where: str) -> str:
    named = fields.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(named, list) or len(named) != 1:
        raise InputError(f"{where}: architectures = {named!r}: name exactly one of {known}")
    if named[0] not in ARCHITECTURES:
        raise InputError(f"{where}: architecture {named[0]} is not supported; supported: {known}")
    return str(named[0])


def _refuse_foreign(fields: Mapping[str, Any], family: Family, where: str) -> None:
    """Raises InputError naming each field that changes the computation, or may do so, in a way the decoder does not follow."""
    if fields.get("auto_map") is not None:
        raise InputError(f"{where}: auto_map: the checkpoint brings its own code, which is never run")
    fixed = dict(family.fixed) | _COMMON_FIXED
    wrong = []
    for name, allowed in fixed.items():
        value = fields.get(name, _ABSENT_IS_NOT_FIXED.get(name, allowed[0]))
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            wrong.append(f"{name} = {value!r} (supported: {allowed[0]!r})")
    if wrong:
        raise InputError(f"{where}: {'; '.join(wrong)}: this computation is not implemented")
    rope = {"rope_theta", "rope_scaling", "rope_parameters"}
    known = fixed.keys() | family.fields.keys() | _NO_EFFECT | rope | {"auto_map"}
    if unknown := sorted(fields.keys() - known):
        raise InputError(
            f"{where}: unknown fields {', '.join(unknown)}: they may change the computation; "
            "delete from config.json those that are known not to"
        )


def _rope_theta(fields: Mapping[str, Any], where: str) -> float:
    """The rotary base. transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes rope_parameters."""
    found = [fields["rope_theta"]] if fields.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: {name} = {given!r}: must be an object or null")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default" or given.keys() - {"rope_type", "type", "rope_theta"}:
            raise InputError(f"{where}: {name} = {dict(given)}: scaled rotary positions are not implemented")
        found += [given["rope_theta"]] if given.get("rope_theta") is not None else []
    if len(set(found)) > 1:
        raise InputError(f"{where}: rope_theta is given as {' and as '.join(map(str, found))}; keep one")
    theta = found[0] if found else 10000.0
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise InputError(f"{where}: rope_theta = {theta!r}: must be a number")
    return float(theta)


def _labels(fields: Mapping[str, Any]) -> int:
    """How many labels a sequence classifier has; transformers' default is two."""
    if fields.get("id2label") is not None:
        return len(fields["id2label"])
    return int(fields.get("num_labels") or 2)


def _quotient(hidden_size: Any, heads: Any, where: str) -> int:
    if not isinstance(hidden_size, int) or not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise InputError(
            f"{where}: hidden_size = {hidden_size!r}, num_attention_heads = {heads!r}: not a multiple, so give head_dim"
        )
    return hidden_size // heads
