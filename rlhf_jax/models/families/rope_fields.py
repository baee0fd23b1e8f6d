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
"""Kind -> their key -> `RopeScaling` field. "yarn" also has mscale and mscale_all_dim, which give attention_factor."""
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
    """How a family says its rotary positions.

    theta, fraction: names of the base and of the rotated fraction (None: the family rotates whole heads). outer_original:
    original_max_position_embeddings stands beside rope_scaling (Phi-3). sliding_theta: default base of sliding layers in
    a family that has one of their own (Gemma 3: rope_local_base_freq).
    """
    names = {theta, "rope_scaling", "rope_parameters"}
    names |= {fraction} if fraction else set()
    names |= {"original_max_position_embeddings"} if outer_original else set()
    names |= {"rope_local_base_freq"} if sliding_theta else set()

    def read(fields: Fields, values: Fields, where: str) -> dict[str, Any]:
        given, local = _given(fields, where, nested=sliding_theta is not None)
        stated = (fields.get(theta), *(one.pop("rope_theta", None) for one in given))
        bases = [_number(where, theta, number) for number in stated if number is not None]
        if len(set(bases)) > 1:
            raise InputError(f"{where}: rope_theta is given as {' and as '.join(map(str, bases))}; keep one")
        found: dict[str, Any] = {"rope_theta": _number(where, theta, bases[0] if bases else default_theta)}
        if fraction:
            parts = [fields.get(fraction), *(one.pop("partial_rotary_factor", None) for one in given)]
            told = {_number(where, fraction, part) for part in parts if part is not None}
            if len(told) > 1:
                raise InputError(f"{where}: {fraction} is given as {' and as '.join(map(str, sorted(told)))}; keep one")
            found["rope_fraction"] = _number(where, fraction, told.pop() if told else default_fraction)
        scalings = [one for one in given if one]
        if len(scalings) > 1 and scalings[0] != scalings[1]:
            raise InputError(f"{where}: rope_scaling and rope_parameters disagree; keep one")
        if scalings:
            original = fields.get("original_max_position_embeddings", 4096) if outer_original else None
            found["rope_scaling"] = _scaling(scalings[0], values["max_length"], original, where)
        if sliding_theta is not None:
            beside = fields.get("rope_local_base_freq", None if local is not None else sliding_theta)
            bases = [_number(where, "rope_local_base_freq", base) for base in (local, beside) if base is not None]
            if len(set(bases)) > 1:
                raise InputError(
                    f"{where}: rope_local_base_freq is given as {' and as '.join(map(str, bases))}; keep one"
                )
            found["rope_theta_sliding"] = _number(where, "rope_local_base_freq", bases[0] if bases else None)
            if values.get("sliding_window") is None:
                del found["rope_theta_sliding"]
        return found

    def write(config: ModelConfig) -> dict[str, Any]:
        told: dict[str, Any] = {theta: config.rope_theta, "rope_scaling": _written(config.rope_scaling)}
        if fraction:
            told[fraction] = config.rope_fraction
        if outer_original and config.rope_scaling is not None:
            told["original_max_position_embeddings"] = config.rope_scaling.original_max_length
        if config.rope_theta_sliding is not None:
            told["rope_local_base_freq"] = config.rope_theta_sliding
        return told

    return Rule(frozenset(names), read, write)


def _given(fields: Fields, where: str, nested: bool) -> tuple[list[dict[str, Any]], Any]:
    """The rope_scaling and rope_parameters objects without what means "not scaled", and the base of sliding layers."""
    found, local = [], None
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: {name} = {given!r}: must be an object or null")
        if nested and given.keys() & {"full_attention", "sliding_attention"}:
            for kind, one in given.items():
                if not isinstance(one, Mapping):
                    raise InputError(f"{where}: {name}.{kind} = {one!r}: must be an object")
            sliding = _unscaled(dict(given.get("sliding_attention", {})), f"{where}: {name}")
            base = sliding.pop("rope_theta", None)
            if None not in (base, local) and base != local:
                raise InputError(f"{where}: rope_scaling and rope_parameters disagree; keep one")
            local = local if base is None else base
            if sliding or given.keys() - {"full_attention", "sliding_attention"}:
                raise InputError(f"{where}: {name} = {dict(given)}: this is not implemented")
            given = given.get("full_attention", {})
        found.append(_unscaled(dict(given), f"{where}: {name}"))
    return found, local


def _unscaled(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Without the kind when that is "default"; "type" is the old name of "rope_type", and "su" of "longrope"."""
    kind = given.pop("type", None)
    newer = given.get("rope_type", kind)
    if kind is not None and newer != kind and (kind, newer) != ("su", "longrope"):
        raise InputError(f"{where}: type = {kind!r}, but rope_type = {newer!r}; keep one")
    given.setdefault("rope_type", kind or "default")
    if given["rope_type"] == "default":
        del given["rope_type"]
    return given


def _scaling(given: dict[str, Any], max_length: int, original: int | None, where: str) -> RopeScaling:
    kind: Any = given.get("rope_type", "default")
    if not isinstance(kind, str):
        raise InputError(f"{where}: rope_scaling.rope_type = {kind!r}: must be a text")
    if original is not None and kind in ("su", "yarn"):  # Phi-3 once called it so
        kind = "longrope"
    keys = _KEYS.get(kind, {})
    known = keys.keys() | {"rope_type"} | ({"mscale", "mscale_all_dim"} if kind == "yarn" else set())
    if not keys or given.keys() - known:
        raise InputError(
            f"{where}: rope_scaling = {given}: not implemented; known: {', '.join(sorted(_KEYS.keys() - {'default'}))}"
        )
    if missing := [name for name in _REQUIRED[kind] if given.get(name) is None]:
        raise InputError(f"{where}: rope_scaling = {given}: {', '.join(missing)} is missing")
    if not all(isinstance(given.get(name, []), list) for name in ("short_factor", "long_factor")):
        raise InputError(f"{where}: rope_scaling = {given}: short_factor and long_factor must be lists of numbers")
    for name in ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim"):
        if given.get(name) is not None:
            _number(where, f"rope_scaling.{name}", given[name])
    values: dict[str, Any] = {ours: given[name] for name, ours in keys.items() if given.get(name) is not None}
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
        values.setdefault("attention_factor", _attention_factor(kind, given, values))
    try:
        return RopeScaling(kind, **values)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: rope_scaling: {error}") from error


def _attention_factor(kind: str, given: Fields, values: Fields) -> float:
    """What the papers recommend and transformers assumes: YaRN 0.1 ln(factor) + 1, LongRoPE sqrt(1 + ln factor / ln original)."""
    factor = values["factor"]
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(values["original_max_length"]))
    scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")
    if scale and scale_all:
        return float((0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1))
    return 0.1 * math.log(factor) + 1


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    told = {theirs: getattr(scaling, ours) for theirs, ours in _KEYS[scaling.kind].items()}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    return {"rope_type": scaling.kind} | told


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} = {value!r}: must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{where}: {name}: too large for a number") from error
