"""Where comparisons come from."""

from __future__ import annotations

from rlhf_jax.feedback.annotator import (
    AnnotatorConfig,
    Labels,
    Reply,
    label,
    label_pairs,
    preference_probability,
    prefers_first,
    utility,
)

__all__ = [
    "AnnotatorConfig",
    "Labels",
    "Reply",
    "label",
    "label_pairs",
    "preference_probability",
    "prefers_first",
    "utility",
]
