"""Old names of gin keys and metrics with their new ones, for messages to users of an old name (docs/renamed.md lists all)."""

from __future__ import annotations

GIN_KEYS = {"GRPOConfig.drop_even_groups": "GRPOConfig.drop_zero_variance_groups"}
"""{old 'Configurable.parameter': the new one}."""
METRICS = {"even_groups": "zero_variance_groups", "learned_from": "trained_responses"}
"""{old name in metrics.jsonl: the new one}."""


def renamed_key(configurable: str, parameter: str) -> str:
    """Return '; renamed to NEW' for a gin key under its old name, '' for any other. configurable: with or without its module."""
    new = GIN_KEYS.get(f"{configurable.rpartition('.')[2]}.{parameter}")
    return f"; renamed to {new}" if new else ""


def renamed_metric(name: str) -> str:
    """Return '; renamed to NEW' for a metric under its old name, '' for any other."""
    return f"; renamed to {METRICS[name]}" if name in METRICS else ""
