"""What tests need, ours and those of users: small tokenizers."""

from __future__ import annotations

from rlhf_jax.testing.tokenizer import byte_tokenizer, train_bpe_tokenizer

__all__ = ["byte_tokenizer", "train_bpe_tokenizer"]
