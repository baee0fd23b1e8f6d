"""Comparisons of policies on the same prompts."""

from rlhf_jax.evaluate.compare import ScoredResponses, compare, completion_rows

__all__ = [
    "ScoredResponses",
    "compare",
    "completion_rows",
]
