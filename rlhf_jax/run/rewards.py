"""Rewards that come from texts."""

from __future__ import annotations

import numpy as np

from rlhf_jax.types import InputError


def text_rewards(values: dict[str, list[float]], key: str) -> np.ndarray:
    """float32 [B]. Raises InputError when the scorer has no such key."""
    if key not in values:
        raise InputError(f"run.reward_key = {key!r}: reward_texts gives {', '.join(sorted(values))}")
    return np.asarray(values[key], np.float32)
