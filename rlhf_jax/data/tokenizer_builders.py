"""Builders of tokenizers that gin files name: they train or make one on the spot and need no download."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import trained_tokenizers
from rlhf_jax.data.support_desk_replies import DeskConfig, corpus_text
from rlhf_jax.data.trained_tokenizers import train_bpe_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and special tokens. To plan models by their sizes alone, and for experiments on bytes."""
    return trained_tokenizers.byte_tokenizer()


def desk_tokenizer(desk: DeskConfig, vocab_size: int = 1024, documents: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the support desk's corpus."""
    return train_bpe_tokenizer(list(corpus_text(desk, "train", 0, documents)), vocab_size)
