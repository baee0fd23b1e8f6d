"""Small batches made by hand or from a seed, as numpy arrays (host batches)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.batches import PromptBatch, TokenBatch
from rlhf_jax.errors import InputError
from rlhf_jax.types import Completions


def token_batch(
    rows: Sequence[Sequence[int]],
    *,
    length: int | None = None,
    prompt_lengths: Sequence[int] | None = None,
    pad_id: int = 0,
) -> TokenBatch:
    """Return one document a row, right-padded to ``length`` (default: the longest). An empty row is all padding.

    loss_mask is True from column ``prompt_lengths[row]`` on (default 1: everything but the first token, which nothing
    predicts). Raises InputError when a row does not fit.
    """
    width = max(len(row) for row in rows) if length is None else length
    starts = [1] * len(rows) if prompt_lengths is None else prompt_lengths
    tokens = np.full((len(rows), width), pad_id, np.int32)
    real, targets = np.zeros((len(rows), width), bool), np.zeros((len(rows), width), bool)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if len(row) > width:
            raise InputError(f"token_batch: row {index} has {len(row)} tokens, more than length = {width}")
        tokens[index, : len(row)] = row
        real[index, : len(row)] = True
        targets[index, start : len(row)] = True
    positions = np.where(real, np.arange(width, dtype=np.int32), 0).astype(np.int32)
    return TokenBatch(tokens, positions, real.astype(np.int32), targets)  # type: ignore[arg-type]


def prompt_batch(
    rows: Sequence[Sequence[int]],
    *,
    width: int | None = None,
    prompt_ids: Sequence[int] | None = None,
    sample_ids: Sequence[int] | None = None,
    pad_id: int = 0,
) -> PromptBatch:
    """Return prompts left-padded to ``width`` columns (default: the longest). prompt_ids default to 0, 1, ...; sample_ids to 0."""
    columns = max(len(row) for row in rows) if width is None else width
    tokens, mask = np.full((len(rows), columns), pad_id, np.int32), np.zeros((len(rows), columns), bool)
    for index, row in enumerate(rows):
        if len(row) > columns:
            raise InputError(f"prompt_batch: row {index} has {len(row)} tokens, more than width = {columns}")
        tokens[index, columns - len(row) :] = row
        mask[index, columns - len(row) :] = True
    prompts = np.arange(len(rows)) if prompt_ids is None else np.asarray(prompt_ids)
    samples = np.zeros(len(rows)) if sample_ids is None else np.asarray(sample_ids)
    return PromptBatch(tokens, mask, prompts.astype(np.int32), samples.astype(np.int32))  # type: ignore[arg-type]


def random_prompts(seed: int, rows: int, width: int, vocab_size: int) -> PromptBatch:
    """Return ``rows`` prompts of 1 ... ``width`` tokens (the first one fills the width), ids 3 ... vocab_size - 1."""
    rng = np.random.default_rng(seed)
    lengths = [width, *rng.integers(1, width + 1, rows - 1)]
    return prompt_batch([rng.integers(3, vocab_size, n).tolist() for n in lengths], width=width)


def completions(
    prompts: PromptBatch,
    responses: Sequence[Sequence[int]],
    *,
    length: int,
    eos_ids: Sequence[int] = (2,),
    pad_id: int = 0,
    logprobs: np.ndarray | None = None,
) -> Completions:
    """Append ``responses`` (the sampled tokens, a final end-of-sequence token included where there is one) to ``prompts``.

    length: columns of the response. logprobs: the sampler's, float32 [B, length], 0 when not given. ended follows from
    the last token of each response.
    """
    tokens = np.full((len(responses), length), pad_id, np.int32)
    mask = np.zeros((len(responses), length), bool)
    for index, row in enumerate(responses):
        if len(row) > length:
            raise InputError(f"completions: row {index} has {len(row)} tokens, more than length = {length}")
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    ended = np.array([bool(row) and row[-1] in eos_ids for row in responses])
    sampled = np.zeros((len(responses), length), np.float32) if logprobs is None else logprobs
    return Completions(prompts, tokens, mask, np.asarray(sampled, np.float32), ended)  # type: ignore[arg-type]
