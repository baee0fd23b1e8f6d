"""Builders of tokenizers for gin files, which need no download."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import trained_tokenizers
from rlhf_jax.data.support_desk_responses import DeskConfig, corpus_text
from rlhf_jax.data.trained_tokenizers import train_bpe_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for every byte, for plans of models by their sizes and for experiments on bytes."""
    return trained_tokenizers.byte_tokenizer()


def desk_tokenizer(desk: DeskConfig, vocab_size: int = 1024, documents: int = 3000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus of the support desk.

    desk: seed and defect rates of the desk.
    vocab_size: number of tokens, >= 259.
    documents: number of documents of the corpus to train on.
    """
    return train_bpe_tokenizer(list(corpus_text(desk, "train", 0, documents)), vocab_size)
