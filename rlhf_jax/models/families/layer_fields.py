"""Rules of the config.json fields for sliding windows, layers without rotary positions, and layers with experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families.records import Fields, Rule

_KINDS = {"full_attention": "full", "sliding_attention": "sliding"}


def pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest tuple that repeats to ``kinds``; () when all are "full". (s, s, f, s, s, f, s) -> (s, s, f)."""
    if all(kind == "full" for kind in kinds):
        return ()
    for period in range(1, len(kinds) + 1):
        if all(kinds[index] == kinds[index % period] for index in range(len(kinds))):
            return tuple(kinds[:period])
    raise AssertionError("the whole repeats to itself")


def _kinds_of(config: ModelConfig) -> list[str]:
    """Return the kind of each layer."""
    kinds = config.layer_pattern or ("full",)
    return [kinds[index % len(kinds)] for index in range(config.num_layers)]


def _window(fields: Fields, name: str, value: Any, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{where}: {name} = {value!r}: must be a positive number of tokens or null")
    return value


def _count(fields: Fields, name: str, default: int, least: int, where: str) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{where}: {name} = {value!r}: must be a whole number >= {least}")
    return value


def _switch(fields: Fields, name: str, where: str) -> bool:
    value = fields.get(name, False)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}: {name} = {value!r}: must be true or false")
    return bool(value)


def _typed_layers(fields: Fields, count: int, assumed: Callable[[int], bool], where: str) -> list[str]:
    """Return the kind of each layer from layer_types; when it is absent, from ``assumed`` (layer -> whether it has a window)."""
    layer_types = fields.get("layer_types")
    if layer_types is None:
        return ["sliding" if assumed(layer) else "full" for layer in range(count)]
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != count
        or not all(isinstance(kind, str) and kind in _KINDS for kind in layer_types)
    ):
        raise InputError(f"{where}: layer_types: must name {' or '.join(_KINDS)} for each of {count} layers")
    return [_KINDS[kind] for kind in layer_types]


def _layer_settings(kinds: list[str], window: int | None, where: str) -> dict[str, Any]:
    """Return the `ModelConfig` fields of these layers."""
    slides = any("sliding" in kind for kind in kinds)
    if slides and window is None:
        raise InputError(f"{where}: layer_types has sliding_attention, but sliding_window is null")
    return {"layer_pattern": pattern(kinds), "sliding_window": window if slides else None}


def one_window(default: int | None, switch: str | None = None) -> Rule:
    """Return the rule of families where all layers have a sliding window if sliding_window is set (Mistral, Phi-3, Mixtral).

    switch: a field that must also be true (Qwen 3 MoE).
    """

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        window = _window(fields, "sliding_window", fields.get("sliding_window", default), where)
        if switch and not _switch(fields, switch, where):
            window = None
        return _layer_settings(["full" if window is None else "sliding"] * values["num_layers"], window, where)

    def write(config: ModelConfig) -> dict[str, Any]:
        hf_fields: dict[str, Any] = {"sliding_window": config.sliding_window}
        return hf_fields | ({switch: config.sliding_window is not None} if switch else {})

    return Rule(frozenset({"sliding_window"} | ({switch} if switch else set())), read, write)


def _qwen_layers(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
    window = _window(fields, "sliding_window", fields.get("sliding_window", 4096), where)
    window = window if _switch(fields, "use_sliding_window", where) else None
    first = _count(fields, "max_window_layers", 28, 0, where)
    kinds = _typed_layers(fields, values["num_layers"], lambda layer: window is not None and layer >= first, where)
    return _layer_settings(kinds, window, where)


def _layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if kind.startswith("sliding") else "full_attention" for kind in _kinds_of(config)]


QWEN_LAYERS = Rule(
    frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    _qwen_layers,
    lambda config: {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    },
)
"""With use_sliding_window, layers from max_window_layers on have the window, unless layer_types says otherwise."""


def alternating(period: int, name: str | None = None) -> Rule:
    """Return the rule of families where every ``period``-th layer is full and the others have a window (Gemma 2: 2, Gemma 3: 6).

    name: the field that may change the period.
    """

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        window = _window(fields, "sliding_window", fields.get("sliding_window", 4096), where)
        every = _count(fields, name, period, 1, where) if name else period
        kinds = _typed_layers(fields, values["num_layers"], lambda layer: bool((layer + 1) % every), where)
        return _layer_settings(kinds, window, where)

    def write(config: ModelConfig) -> dict[str, Any]:
        hf_fields: dict[str, Any] = {"layer_types": _layer_types(config)}
        return hf_fields | ({"sliding_window": config.sliding_window} if config.sliding_window is not None else {})

    return Rule(frozenset({"layer_types", "sliding_window"} | ({name} if name else set())), read, write)


def _smollm3_layers(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
    count = values["num_layers"]
    every, rotated = _count(fields, "no_rope_layer_interval", 4, 1, where), fields.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % every != 0) for layer in range(count)]
    if not isinstance(rotated, list) or len(rotated) < count:
        raise InputError(f"{where}: no_rope_layers: must hold 1 (rotary positions) or 0 for each of {count} layers")
    window = _window(fields, "sliding_window", fields.get("sliding_window"), where)
    window = window if _switch(fields, "use_sliding_window", where) else None
    kinds = _typed_layers(fields, count, lambda layer: window is not None and not rotated[layer], where)
    if window is None:
        kinds = ["full"] * count  # as transformers: the switch decides
    return _layer_settings(
        [kind if turned else f"{kind}_nope" for kind, turned in zip(kinds, rotated, strict=False)], window, where
    )


SMOLLM3_LAYERS = Rule(
    frozenset({"no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"}),
    _smollm3_layers,
    lambda config: {
        "no_rope_layers": [int(not kind.endswith("_nope")) for kind in _kinds_of(config)],
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    },
)
"""Every fourth layer has no rotary positions; with use_sliding_window those layers have the sliding window."""


def _qwen3_moe_experts(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
    counts = [fields[name] for name in ("num_experts", "num_local_experts") if fields.get(name) is not None]
    if len(counts) == 2 and counts[0] != counts[1]:
        raise InputError(f"{where}: num_experts = {counts[0]!r}, but num_local_experts = {counts[1]!r}; keep one")
    count = fields.get("num_experts", fields.get("num_local_experts", 128))
    step, dense = _count(fields, "decoder_sparse_step", 1, 1, where), fields.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise InputError(f"{where}: mlp_only_layers = {dense!r}: must be a list of layer numbers")
    layers = [layer for layer in range(values["num_layers"]) if layer in dense or (layer + 1) % step]
    return {"num_experts": count, "dense_layers": tuple(layers)}


QWEN3_MOE_EXPERTS = Rule(
    frozenset({"num_experts", "num_local_experts", "decoder_sparse_step", "mlp_only_layers"}),
    _qwen3_moe_experts,
    lambda config: {
        "num_experts": config.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    },
)
"""Experts in every decoder_sparse_step-th layer but those of mlp_only_layers."""
