"""config.json <-> `ModelConfig`. Every field is mapped, known not to affect the logits, or rejected by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import Head, ModelConfig
from rlhf_jax.models.families.records import Family, Fields
from rlhf_jax.models.families.table import FAMILIES
from rlhf_jax.models.families.weights import family_of, weights_of

ARCHITECTURES: dict[str, tuple[str, Head]] = {family.language_model: (name, "lm") for name, family in FAMILIES.items()}
ARCHITECTURES |= {family.scorer: (name, "scalar") for name, family in FAMILIES.items()}
"""Architecture of config.json -> (name of the family, head)."""

_COMMON_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_NO_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path _num_labels architectures
    bad_words_ids gradient_checkpointing
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_llama_config label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version transformers.js_config typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905  (a list would be a page of one-word lines)
)
"""Fields that do not change the logits of a forward pass in evaluation mode: labels, generation, storage, training."""


def config_from_hf(fields: Fields, where: str) -> ModelConfig:
    """Return the `ModelConfig` of a config.json: float32, head and family from the architecture.

    where: the file, for messages. Raises InputError for a configuration that is not supported.
    """
    architecture = _architecture(fields, where)
    name, head = ARCHITECTURES[architecture]
    family = FAMILIES[name]
    _check_supported(fields, family, where)
    if head == "scalar" and (labels := _labels(fields)) != 1:
        raise InputError(f"{where}: {architecture} with {labels} labels: a reward or value model has num_labels = 1")
    values: dict[str, Any] = dict(family.implied)
    for field, targets in family.fields.items():
        if field not in fields and field not in family.defaults:
            raise InputError(f"{where}: {field} is missing; take config.json and weights from the same checkpoint")
        for target in (targets,) if isinstance(targets, str) else targets:
            values[target] = fields.get(field, family.defaults.get(field))
    if values.get("num_kv_heads") is None:
        values["num_kv_heads"] = values["num_heads"]
    if values.get("head_dim") is None:
        values["head_dim"] = _quotient(values["hidden_size"], values["num_heads"], where)
    if values["ffn_size"] is None and "ffn_size" in family.fields.values():
        values["ffn_size"] = 4 * values["hidden_size"]  # GPT-2's default
    try:
        ModelConfig(**{name: values[name] for name in _SIZE_FIELDS})  # the rules may count on sizes
        for rule in family.rules:
            values |= rule.read(fields, values, where)
        return ModelConfig(**values, head=head, family=name)
    except InputError as error:
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: not a configuration of {architecture} ({cause}); restore the file") from error


_EXECUTION_FIELDS = ("param_dtype", "compute_dtype", "remat", "logits_chunk", "attention")
"""`ModelConfig` fields that change how the model is computed, not its results: a config.json does not have them."""
_SIZE_FIELDS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "max_length",
)  # fmt: skip


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json fields of a model with head "lm" or "scalar", in the format of ``config.family``.

    Special token ids are left out. ``torch_dtype`` is the dtype of the parameters. The fields are read back and
    compared. Raises InputError for a configuration that checkpoints of the family cannot express.
    """
    if config.head == "lm+scalar":
        raise InputError(
            "head 'lm+scalar': a checkpoint has one head; load the model with head='lm' or head='scalar' "
            "(--head of experiments/export.py) and export that"
        )
    family = family_of(config)
    if family.even_heads and config.hidden_size % config.num_heads:
        raise InputError(
            f"ModelConfig.hidden_size = {config.hidden_size} is not a multiple of num_heads = {config.num_heads}: "
            f"transformers cannot express this {family.model_type} model"
        )
    hf_fields: dict[str, Any] = {
        name: getattr(config, targets if isinstance(targets, str) else targets[0])
        for name, targets in family.fields.items()
    }
    for rule in family.rules:
        hf_fields |= rule.write(config)
    hf_fields |= {
        "architectures": [family.language_model if config.head == "lm" else family.scorer],
        "model_type": family.model_type,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
    }
    if config.head == "scalar":
        hf_fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    parsed = config_from_hf(hf_fields, "config.json")
    parsed = parsed.replace(**{name: getattr(config, name) for name in _EXECUTION_FIELDS})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(parsed, field.name):
            raise InputError(
                f"ModelConfig.{field.name} = {value!r}: a checkpoint of family {config.family!r} cannot express this; choose "
                "another ModelConfig.family"
            )
    weights_of(config)
    return hf_fields


def _architecture(fields: Fields, where: str) -> str:
    architectures = fields.get("architectures")
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise InputError(f"{where}: architectures = {architectures!r}: name exactly one of {supported}")
    if not isinstance(architectures[0], str) or architectures[0] not in ARCHITECTURES:
        raise InputError(f"{where}: architecture {architectures[0]} is not supported; supported: {supported}")
    return str(architectures[0])


def _check_supported(fields: Fields, family: Family, where: str) -> None:
    """Raise InputError naming each field that changes, or may change, the computation in an unsupported way."""
    if fields.get("auto_map") is not None and "auto_map" not in family.ignored:
        raise InputError(f"{where}: auto_map: the checkpoint brings its own code, which is never run")
    if fields.get("model_type") not in (None, family.model_type):
        raise InputError(
            f"{where}: model_type = {fields['model_type']!r}, but architectures names a model of type {family.model_type!r}; "
            "take config.json from the checkpoint and let both name the same"
        )
    fixed = dict(family.fixed) | _COMMON_FIXED
    wrong = []
    for name, allowed in fixed.items():
        value = fields.get(name, allowed[0])
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            wrong.append(f"{name} = {value!r} (supported: {allowed[0]!r})")
    if wrong:
        raise InputError(f"{where}: {'; '.join(wrong)}: this computation is not implemented")
    ruled = frozenset[str]().union(*(rule.names for rule in family.rules))
    handled = fixed.keys() | family.fields.keys() | ruled | family.ignored | _NO_EFFECT | {"auto_map"}
    if unknown := sorted(fields.keys() - handled):
        raise InputError(
            f"{where}: unknown fields {', '.join(unknown)}: they may change the computation; "
            "delete from config.json those that are known not to"
        )


def _labels(fields: Fields) -> int:
    """Return the number of labels of a sequence classifier; transformers' default is two."""
    labels, count = fields.get("id2label"), fields.get("num_labels")
    if labels is not None:
        return len(labels) if isinstance(labels, dict) else 0
    return 2 if count is None else count if type(count) is int else 0


def _quotient(hidden_size: Any, heads: Any, where: str) -> int:
    if not isinstance(hidden_size, int) or not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise InputError(
            f"{where}: hidden_size = {hidden_size!r}, num_attention_heads = {heads!r}: not a multiple, so give head_dim"
        )
    return hidden_size // heads
