"""Rotary positions in a config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families.records import Fields, Rule
from rlhf_jax.models.rope import RopeScaling

_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_max_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_length",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_length",
        "attention_factor": "attention_factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
    },
}
"""Kind -> key of config.json -> `RopeScaling` field. "yarn" also has mscale and mscale_all_dim, which set attention_factor."""
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def rope_rule(
    default_theta: float = 10000.0,
    *,
    theta: str = "rope_theta",
    fraction: str | None = None,
    default_fraction: float = 1.0,
    outer_original: bool = False,
    sliding_theta: float | None = None,
) -> Rule:
    """Return the rule of a family's rotary positions.

    theta, fraction: names of the base and of the rotated fraction (None: the family rotates whole heads).
    outer_original: original_max_position_embeddings is beside rope_scaling, not inside (Phi-3). sliding_theta: default
    base of sliding-window layers in a family where they have their own (Gemma 3: rope_local_base_freq).
    """
    names = {theta, "rope_scaling", "rope_parameters"}
    names |= {fraction} if fraction else set()
    names |= {"original_max_position_embeddings"} if outer_original else set()
    names |= {"rope_local_base_freq"} if sliding_theta else set()

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        objects, local = _rope_objects(fields, where, nested=sliding_theta is not None)
        stated = (fields.get(theta), *(entry.pop("rope_theta", None) for entry in objects))
        bases = [_number(where, theta, number) for number in stated if number is not None]
        if len(set(bases)) > 1:
            raise InputError(f"{where}: rope_theta is given as {' and as '.join(map(str, bases))}; keep one")
        settings: dict[str, Any] = {"rope_theta": _number(where, theta, bases[0] if bases else default_theta)}
        if fraction:
            parts = [fields.get(fraction), *(entry.pop("partial_rotary_factor", None) for entry in objects)]
            fractions = {_number(where, fraction, part) for part in parts if part is not None}
            if len(fractions) > 1:
                raise InputError(
                    f"{where}: {fraction} is given as {' and as '.join(map(str, sorted(fractions)))}; keep one"
                )
            settings["rope_fraction"] = _number(where, fraction, fractions.pop() if fractions else default_fraction)
        scalings = [entry for entry in objects if entry]
        if len(scalings) > 1 and scalings[0] != scalings[1]:
            raise InputError(f"{where}: rope_scaling and rope_parameters disagree; keep one")
        if scalings:
            original = fields.get("original_max_position_embeddings", 4096) if outer_original else None
            settings["rope_scaling"] = _scaling(scalings[0], values["max_length"], original, where)
        if sliding_theta is not None:
            beside = fields.get("rope_local_base_freq", None if local is not None else sliding_theta)
            bases = [_number(where, "rope_local_base_freq", base) for base in (local, beside) if base is not None]
            if len(set(bases)) > 1:
                raise InputError(
                    f"{where}: rope_local_base_freq is given as {' and as '.join(map(str, bases))}; keep one"
                )
            settings["rope_theta_sliding"] = _number(where, "rope_local_base_freq", bases[0] if bases else None)
            if values.get("sliding_window") is None:
                del settings["rope_theta_sliding"]
        return settings

    def write(config: ModelConfig) -> dict[str, Any]:
        hf_fields: dict[str, Any] = {theta: config.rope_theta, "rope_scaling": _to_hf(config.rope_scaling)}
        if fraction:
            hf_fields[fraction] = config.rope_fraction
        if outer_original and config.rope_scaling is not None:
            hf_fields["original_max_position_embeddings"] = config.rope_scaling.original_max_length
        if config.rope_theta_sliding is not None:
            hf_fields["rope_local_base_freq"] = config.rope_theta_sliding
        return hf_fields

    return Rule(frozenset(names), read, write)


def _rope_objects(fields: Fields, where: str, nested: bool) -> tuple[list[dict[str, Any]], Any]:
    """Return (rope_scaling and rope_parameters, without entries that mean "not scaled"; the base of sliding layers)."""
    objects, local = [], None
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name} = {value!r}: must be an object or null")
        if nested and value.keys() & {"full_attention", "sliding_attention"}:
            for kind, entry in value.items():
                if not isinstance(entry, Mapping):
                    raise InputError(f"{where}: {name}.{kind} = {entry!r}: must be an object")
            sliding = _normalize(dict(value.get("sliding_attention", {})), f"{where}: {name}")
            base = sliding.pop("rope_theta", None)
            if None not in (base, local) and base != local:
                raise InputError(f"{where}: rope_scaling and rope_parameters disagree; keep one")
            local = local if base is None else base
            if sliding or value.keys() - {"full_attention", "sliding_attention"}:
                raise InputError(f"{where}: {name} = {dict(value)}: this is not implemented")
            value = value.get("full_attention", {})
        objects.append(_normalize(dict(value), f"{where}: {name}"))
    return objects, local


def _normalize(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the object without the kind when that is "default". "type" is the old name of "rope_type", and "su" of "longrope"."""
    kind = settings.pop("type", None)
    newer = settings.get("rope_type", kind)
    if kind is not None and newer != kind and (kind, newer) != ("su", "longrope"):
        raise InputError(f"{where}: type = {kind!r}, but rope_type = {newer!r}; keep one")
    settings.setdefault("rope_type", kind or "default")
    if settings["rope_type"] == "default":
        del settings["rope_type"]
    return settings


def _scaling(settings: dict[str, Any], max_length: int, original: int | None, where: str) -> RopeScaling:
    kind: Any = settings.get("rope_type", "default")
    if not isinstance(kind, str):
        raise InputError(f"{where}: rope_scaling.rope_type = {kind!r}: must be a text")
    if original is not None and kind in ("su", "yarn"):  # the name in old Phi-3 files
        kind = "longrope"
    keys = _KEYS.get(kind, {})
    allowed = keys.keys() | {"rope_type"} | ({"mscale", "mscale_all_dim"} if kind == "yarn" else set())
    if not keys or settings.keys() - allowed:
        raise InputError(
            f"{where}: rope_scaling = {settings}: not implemented; known: {', '.join(sorted(_KEYS.keys() - {'default'}))}"
        )
    if missing := [name for name in _REQUIRED[kind] if settings.get(name) is None]:
        raise InputError(f"{where}: rope_scaling = {settings}: {', '.join(missing)} is missing")
    if not all(isinstance(settings.get(name, []), list) for name in ("short_factor", "long_factor")):
        raise InputError(f"{where}: rope_scaling = {settings}: short_factor and long_factor must be lists of numbers")
    for name in ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim"):
        if settings.get(name) is not None:
            _number(where, f"rope_scaling.{name}", settings[name])
    values: dict[str, Any] = {field: settings[name] for name, field in keys.items() if settings.get(name) is not None}
    if "original_max_position_embeddings" in keys:
        length = values.get("original_max_length", max_length) if original is None else original
        if values.get("original_max_length", length) != length:
            raise InputError(
                f"{where}: rope_scaling.original_max_position_embeddings = {values['original_max_length']!r}, but beside it (by "
                f"default) it is {length!r}; let both say the same"
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise InputError(f"{where}: original_max_position_embeddings = {length!r}: must be a whole number >= 2")
        values["original_max_length"] = length
    if kind == "longrope":
        values.setdefault("factor", max_length / values["original_max_length"])
    if kind in ("yarn", "longrope"):
        values.setdefault("attention_factor", _attention_factor(kind, settings, values))
    try:
        return RopeScaling(kind, **values)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: rope_scaling: {error}") from error


def _attention_factor(kind: str, settings: Fields, values: Fields) -> float:
    """Return the default of transformers: YaRN 0.1 ln(factor) + 1, LongRoPE sqrt(1 + ln factor / ln original)."""
    factor = values["factor"]
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(values["original_max_length"]))
    scale, scale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if scale and scale_all:
        return float((0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1))
    return 0.1 * math.log(factor) + 1


def _to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    hf_fields = {key: getattr(scaling, field) for key, field in _KEYS[scaling.kind].items()}
    hf_fields = {name: list(value) if isinstance(value, tuple) else value for name, value in hf_fields.items()}
    return {"rope_type": scaling.kind} | hf_fields


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} = {value!r}: must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{where}: {name}: too large for a number") from error
