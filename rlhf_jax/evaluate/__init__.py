"""Policies compared on the same prompts."""

from rlhf_jax.evaluate.compare import Evaluated, compare, completion_rows

__all__ = [
    "Evaluated",
    "compare",
    "completion_rows",
]
