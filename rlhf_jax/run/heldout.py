"""Held-out comparisons of a reward model, or of a policy by its implicit reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data import EncodedPair, evaluation_pair_batches
from rlhf_jax.evaluate.preference import pairwise_accuracy
from rlhf_jax.parallel import to_global


def heldout_scores(
    score_pairs: Callable[..., Any], params: Any, frozen: Any, pairs: Sequence[EncodedPair], mesh: Mesh, **shape: int
) -> np.ndarray:
    """float32 [2, N]: chosen, rejected. shape: as `data.evaluation_pair_batches`."""
    parts = evaluation_pair_batches(pairs, **shape)
    scored = [np.stack(jax.device_get(score_pairs(params, to_global(part, mesh), frozen))) for part in parts]
    return np.concatenate(scored, axis=1)[:, : len(pairs)]


def heldout_metrics(scores: np.ndarray, losses: np.ndarray) -> Mapping[str, float]:
    """What is recorded. scores: [2, N]. losses: [N]."""
    accuracy = pairwise_accuracy(*scores)
    return {
        "heldout/accuracy": accuracy.mean,
        "heldout/accuracy_low": accuracy.low,
        "heldout/accuracy_high": accuracy.high,
        "heldout/loss": float(np.mean(losses)),
    }
