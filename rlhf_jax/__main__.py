"""`python -m rlhf_jax` is the `rlhf-jax` command."""

from rlhf_jax.cli import main

main()
