"""Checks of tokens, before any number is computed: masks, lengths, ends, templates, how often the data is seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import Encoded, Template, padding_id, response_ends
from rlhf_jax.doctor.findings import Finding, judge

Tokenizer = Any
"""A transformers tokenizer: ids of special tokens, encode, len."""


def text_checks(
    documents: Sequence[Encoded], left_out: int, tokenizer: Tokenizer, template: Template, limit: int, pairs: bool
) -> Iterator[Finding]:
    """Check the documents that a run trains on.

    documents: the training documents.
    left_out: how many were too long.
    limit: columns of a row.
    pairs: whether documents are the sides of comparisons.
    """
    targets = np.array([sum(document.loss_mask) for document in documents])
    lengths = np.array([len(document.tokens) for document in documents])
    share = targets.sum() / lengths.sum()
    words = f"{len(documents)} documents, {targets.sum()} of {lengths.sum()} tokens are targets ({share:.0%})"
    yield judge(
        "label masks", bool((targets > 0).all()), words, f"{(targets == 0).sum()} have no target; look at the template"
    )
    total = len(documents) + left_out
    words = f"{left_out} of {total} left out; longest kept {lengths.max()} of {limit} columns"
    if left_out <= total / 2:
        yield Finding("ok" if left_out <= total / 10 else "note", "lengths", words)
    else:
        yield judge("lengths", False, words, "most of the data is not learned from: raise BatchConfig.length")
    yield from token_checks([document.tokens for document in documents], tokenizer)
    ends = [document.tokens[-1] for document in documents if document.loss_mask[-1]]
    stop_ids = response_ends(tokenizer, template).ids
    stops = np.mean([token in stop_ids for token in ends]) if ends else 0.0
    words = f"{stops:.0%} of the documents end in a stop token that is a target"
    if pairs:  # a response that was cut off has none, and the reward model must learn that
        yield Finding("ok" if stops else "note", "end of response", words)
    else:
        yield judge(
            "end of response",
            bool(stops > 0.5),
            words,
            "a model that never learns to stop runs to the limit: see Template",
        )


def template_check(model: str, has_template: bool, difference: str | None) -> Finding:
    """Check that conversations are formatted as the ``model`` ("policy", "reward model") learned them.

    has_template: whether the model's files say how.
    difference: the part that is formatted otherwise.
    """
    if difference is None and not has_template:
        words = f"nothing says how the {model} learned to write conversations: see that these are written so"
        return Finding("note", f"template of the {model}", words)
    words = difference or f"conversations are written as in the training of the {model}"
    remedy = "write them so, train it on these, or set ModelSource.other_template = True"
    return judge(f"template of the {model}", difference is None, words, remedy)


def token_checks(sequences: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check prompts for BOS, padding and unknown tokens."""
    bos, pad, eos = tokenizer.bos_token_id, padding_id(tokenizer), tokenizer.eos_token_id
    if bos is not None and bos != eos:
        # Twice in a row: a chat template may begin every turn with this token (SmolLM2's <|im_start|>).
        doubled = sum((bos, bos) in itertools.pairwise(tokens) for tokens in sequences)
        words = f"token {bos}, twice in a row in {doubled} of {len(sequences)} sequences"
        yield judge("BOS", not doubled, words, "set Template.bos = 'never', or take it out of the text")
    words = f"padding is token {pad}, the end is {eos}"
    same = "; the same token: masks come from lengths here, so the end stays a target" if pad == eos else ""
    yield Finding("note" if same else "ok", "pad and EOS", words + same)
    if (unknown := tokenizer.unk_token_id) is not None:
        flat = np.concatenate([np.asarray(tokens) for tokens in sequences])
        share = float((flat == unknown).mean())
        yield judge(
            "unknown tokens",
            share < 0.01,
            f"{share:.2%}",
            "the tokenizer does not know this text: take the model's own",
        )


def vocabulary_check(ids: int, rows: int) -> Finding:
    """Check that every id of the tokenizer, all below ``ids``, is a row of the embedding."""
    return judge(
        "vocabulary", ids <= rows, f"token ids below {ids}, {rows} rows", "set ModelConfig.vocab_size to at least that"
    )


def arithmetic_check(examples: int, batch_size: int, steps: int) -> Finding:
    """Report how often the data is seen."""
    epochs = steps * batch_size / examples
    words = f"{examples} examples, {batch_size} a step, {steps} steps: {epochs:.2f} epochs"
    return judge(
        "batches", examples >= batch_size, words, "one batch holds an example twice: lower BatchConfig.batch_size"
    )
