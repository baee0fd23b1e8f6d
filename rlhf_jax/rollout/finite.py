"""Checks for NaN and infinity: a sampler would turn NaN logits into arbitrary tokens, and scores of NaN would enter rewards."""

from __future__ import annotations

import numpy as np

from rlhf_jax.errors import RunStopped
from rlhf_jax.types import Completions


def stop_if_not_finite(completions: Completions, place: str) -> None:
    """Raise RunStopped when a log-probability of a sampled token is not finite.

    completions: numpy arrays. place: prefix of the message.
    """
    logprobs = np.asarray(completions.logprobs)
    wrong = np.argwhere(~np.isfinite(logprobs) & np.asarray(completions.mask))
    if wrong.size:
        row, column = wrong[0]
        raise RunStopped(
            f"{place}: the model's numbers are not finite: log-probability {logprobs[row, column]} at token {column} of a "
            "response; its weights, or compute_dtype, overflow"
        )


def stop_if_scores_not_finite(scores: np.ndarray, place: str) -> None:
    """Raise RunStopped when a score of a reward model is not finite. scores: [B], numpy. place: prefix of the message."""
    wrong = np.flatnonzero(~np.isfinite(scores))
    if wrong.size:
        raise RunStopped(
            f"{place}: the model's numbers are not finite: score {scores[wrong[0]]}; its weights, or compute_dtype, overflow"
        )
