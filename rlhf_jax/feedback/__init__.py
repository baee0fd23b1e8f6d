"""Preference pairs labelled by a simulated annotator."""

from __future__ import annotations

from rlhf_jax.feedback.annotator import (
    AnnotatedResponse,
    AnnotatorConfig,
    Labels,
    label,
    label_pairs,
    preference_probability,
    prefers_first,
    utility,
)

__all__ = [
    "AnnotatedResponse",
    "AnnotatorConfig",
    "Labels",
    "label",
    "label_pairs",
    "preference_probability",
    "prefers_first",
    "utility",
]
