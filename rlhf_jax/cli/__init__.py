"""The `rlhf-jax` command: starts the shipped experiments from any directory, and lists, describes and creates configurations."""

from rlhf_jax.cli.main import main

__all__ = ["main"]
