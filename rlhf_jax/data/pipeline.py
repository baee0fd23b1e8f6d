"""Batches of fixed shape from encoded examples, shuffled anew each epoch, resumable at the exact example.

The order comes from a grain ``MapDataset`` (seeded shuffle, repeated with another permutation each epoch), read by
random access: batch ``k`` holds the examples at places ``k * batch_size`` and following of the endless stream, so the
whole state is ``k``. Batches continue across the end of an epoch: nothing is dropped, and each example occurs exactly once an
epoch. There are no workers, threads or iterators to restore. A state also carries a fingerprint, because grain itself
resumes silently on another data set, seed or batch size. Every process of a multi-host run builds the same batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from rlhf_jax.batches import PromptBatch, RankedBatch, TokenBatch
from rlhf_jax.data.encode import Encoded, EncodedPair
from rlhf_jax.data.packing import Row, stack_rows
from rlhf_jax.errors import InputError

_BatchT = TypeVar("_BatchT")
# Places of the stream in the fingerprint, so that another order of shuffling in grain is detected. Few, because grain
# needs 2 ms a place when there are 10 examples (it draws until an index falls inside); 10 us from 5,000 on.
_ORDER_PROBE = 32
_MISSING = "(nothing)"


class Batches(Generic[_BatchT]):
    """An endless iterator of batches.

    make: builds the batch of the examples with the given indices.
    settings: other values that determine the stream (content hash, row length, ...), JSON values, part of the fingerprint.
    """

    def __init__(
        self,
        make: Callable[[list[int]], _BatchT],
        *,
        examples: int,
        batch_size: int,
        seed: int,
        settings: Mapping[str, str | int],
    ) -> None:
        if examples < 1:
            raise InputError("no examples to make batches of; look at what was dropped")
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: must be at least 1")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed = {seed}: must lie in [0, 2**32)")  # what grain takes
        self._make = make
        import grain  # imports jax, which is slow and which worker processes do not need

        self._order = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
        self._batch_size = batch_size
        self._next = 0
        probe = np.array([self._order[place] for place in range(_ORDER_PROBE)], np.int64)
        self._fingerprint: dict[str, str | int] = {
            **settings,
            "examples": examples,
            "batch_size": batch_size,
            "seed": seed,
            "order": hashlib.sha256(probe.tobytes()).hexdigest(),
        }
        self.batches_per_epoch = examples / batch_size
        """The number of batches in an epoch, a float: an epoch need not end with a batch."""

    def __iter__(self) -> Iterator[_BatchT]:
        return self

    def __next__(self) -> _BatchT:
        begin = self._next * self._batch_size
        batch = self._make([int(self._order[begin + row]) for row in range(self._batch_size)])
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the number of batches so far and the fingerprint of the stream, as JSON values."""
        return {"next_batch": self._next, "fingerprint": dict(self._fingerprint)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch before ``get_state``. Raises InputError for a state of another stream."""
        saved, place = state.get("fingerprint"), state.get("next_batch")
        if not isinstance(saved, Mapping) or not isinstance(place, int) or isinstance(place, bool) or place < 0:
            raise InputError("data state: 'next_batch' or 'fingerprint' is missing or damaged; use another checkpoint")
        for key in sorted({*saved, *self._fingerprint}):
            before, current = saved.get(key, _MISSING), self._fingerprint.get(key, _MISSING)
            if before != current:
                remedy = "resume with the data and settings of the checkpoint, or start a new run"
                raise InputError(f"data state: {key!r} was {_shorten(before)} and is now {_shorten(current)}; {remedy}")
        self._next = place


def token_batches(
    encoded: Sequence[Encoded | Row], *, batch_size: int, length: int, seed: int, pad_id: int
) -> Batches[TokenBatch]:
    """Iterate without end over TokenBatch [batch_size, length] (numpy) of documents or ``pack``ed rows. Raises InputError."""
    rows = list(encoded)
    _check_lengths((sum(len(document.tokens) for document in _documents(row)) for row in rows), length)

    def make(indices: list[int]) -> TokenBatch:
        return stack_rows([rows[index] for index in indices], length, pad_id)

    content = _hash_documents(_documents(row) for row in rows)
    settings: dict[str, str | int] = {"kind": "tokens", "length": length, "pad_id": pad_id, "content": content}
    return Batches(make, examples=len(rows), batch_size=batch_size, seed=seed, settings=settings)


def pair_batches(
    pairs: Sequence[EncodedPair], *, batch_size: int, length: int, seed: int, pad_id: int
) -> Batches[RankedBatch]:
    """Iterate without end over RankedBatch [batch_size, 2, length] (numpy). Raises InputError."""
    items = list(pairs)
    _check_lengths((max(len(pair.chosen.tokens), len(pair.rejected.tokens)) for pair in items), length)

    def make(indices: list[int]) -> RankedBatch:
        return _stack_pairs([items[index] for index in indices], len(indices), length, pad_id)

    content = _hash_documents((pair.chosen, pair.rejected) for pair in items)
    margins = hashlib.sha256(np.array([pair.margin for pair in items], np.float64).tobytes()).hexdigest()
    settings: dict[str, str | int] = {"kind": "pairs", "length": length, "pad_id": pad_id, "content": content + margins}
    return Batches(make, examples=len(items), batch_size=batch_size, seed=seed, settings=settings)


def pair_lengths(pairs: RankedBatch) -> np.ndarray:
    """Return the number of tokens of every row, first chosen and then rejected ones, int [2 B]."""
    lengths: np.ndarray = (np.asarray(pairs.rows.segment_ids) > 0).sum(axis=2)
    return lengths.T.reshape(-1)


def pair_targets(pairs: RankedBatch) -> np.ndarray:
    """Return the number of target tokens of every row, in the order of `pair_lengths`, int [2 B]."""
    targets: np.ndarray = np.asarray(pairs.rows.loss_mask)[:, :, 1:].sum(axis=2)
    return targets.T.reshape(-1)


def prompt_batches(
    prompts: Sequence[Sequence[int]], *, batch_size: int, length: int, seed: int, pad_id: int, samples: int = 1
) -> Batches[PromptBatch]:
    """Iterate without end over PromptBatch [batch_size * samples, length] (numpy), left-padded. Raises InputError.

    batch_size: prompts a batch. Rows i * samples .. (i + 1) * samples - 1 are the samples of the batch's i-th prompt.
    prompt_id: index in ``prompts``. sample_id: 0 .. samples - 1; when a prompt occurs twice in a batch (the end of
    an epoch and the beginning of the next) its second group continues with samples, samples + 1, ..., so that
    (prompt_id, sample_id) never repeats inside a batch and the two groups do not share their random bits.
    """
    token_ids = [[int(token) for token in prompt] for prompt in prompts]
    if samples < 1:
        raise InputError(f"samples = {samples}: must be at least 1")
    _check_lengths(map(len, token_ids), length)

    def make(indices: list[int]) -> PromptBatch:
        return _stack_prompts(token_ids, [index for index in indices for _ in range(samples)], length, pad_id)

    content = hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()
    settings: dict[str, str | int] = {"kind": "prompts", "length": length, "pad_id": pad_id, "content": content}
    return Batches(
        make, examples=len(token_ids), batch_size=batch_size, seed=seed, settings=settings | {"samples": samples}
    )


def evaluation_batches(
    encoded: Sequence[Encoded | Row], *, batch_size: int, length: int, pad_id: int
) -> Iterator[TokenBatch]:
    """Yield every example once, in order, as TokenBatch [batch_size, length] (numpy).

    The last batch is filled up with rows of padding: segment_ids 0, loss_mask all False. Raises InputError.
    """
    rows = list(encoded)
    _check_lengths((sum(len(document.tokens) for document in _documents(row)) for row in rows), length)
    for group in _groups(rows, batch_size):
        yield stack_rows(_fill_rows(group, batch_size), length, pad_id)


def evaluation_pair_batches(
    pairs: Sequence[EncodedPair], *, batch_size: int, length: int, pad_id: int
) -> Iterator[RankedBatch]:
    """Yield every pair once, in order; rows that fill up the last batch are padding on both sides. Raises InputError."""
    items = list(pairs)
    _check_lengths((max(len(pair.chosen.tokens), len(pair.rejected.tokens)) for pair in items), length)
    for group in _groups(items, batch_size):
        yield _stack_pairs(group, batch_size, length, pad_id)


def evaluation_prompt_batches(
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    seeds: Sequence[int] | None = None,
) -> Iterator[PromptBatch]:
    """Yield every prompt once, in order, left-padded. Raises InputError for a prompt that is empty or longer than ``length``.

    Rows that fill up the last batch repeat its last prompt (a sampler needs at least one real token) with prompt_id -1: their
    responses are ignored. seeds: `PromptBatch.seed` of each prompt.
    """
    token_ids = [[int(token) for token in prompt] for prompt in prompts]
    _check_lengths(map(len, token_ids), length)
    for group in _groups(range(len(token_ids)), batch_size):
        missing = batch_size - len(group)
        batch = _stack_prompts(token_ids, [*group, *[group[-1]] * missing], length, pad_id)
        numbers: Any = np.array([*group, *[-1] * missing], np.int32)  # numpy arrays in fields declared as JAX's
        first: Any = np.zeros(batch_size, np.int32)
        own: Any = None if seeds is None else np.array([seeds[i] for i in group] + [0] * missing, np.int32)
        yield dataclasses.replace(batch, prompt_id=numbers, sample_id=first, seed=own)


def _stack_pairs(pairs: Sequence[EncodedPair], rows: int, length: int, pad_id: int) -> RankedBatch:
    chosen = stack_rows(_fill_rows([pair.chosen for pair in pairs], rows), length, pad_id)
    rejected = stack_rows(_fill_rows([pair.rejected for pair in pairs], rows), length, pad_id)
    margin = np.zeros(rows, np.float32)
    margin[: len(pairs)] = [pair.margin for pair in pairs]
    return RankedBatch.of_pairs(chosen, rejected, margin)


def _stack_prompts(prompts: Sequence[Sequence[int]], indices: Sequence[int], length: int, pad_id: int) -> PromptBatch:
    tokens = np.full((len(indices), length), pad_id, np.int32)
    mask = np.zeros((len(indices), length), np.bool_)
    sample_id = np.zeros(len(indices), np.int32)
    occurrences: Counter[int] = Counter()
    for row, index in enumerate(indices):
        begin = length - len(prompts[index])
        tokens[row, begin:] = prompts[index]
        mask[row, begin:] = True
        sample_id[row] = occurrences[index]
        occurrences[index] += 1
    ids = np.array(indices, np.int32)
    return PromptBatch(tokens=tokens, mask=mask, prompt_id=ids, sample_id=sample_id)  # type: ignore[arg-type]


_ItemT = TypeVar("_ItemT")


def _groups(items: Sequence[_ItemT], size: int) -> Iterator[Sequence[_ItemT]]:
    if size < 1:
        raise InputError(f"batch_size = {size}: must be at least 1")
    if not items:
        raise InputError("no examples to evaluate on; look at what was dropped")
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def _fill_rows(rows: Sequence[Encoded | Row], size: int) -> list[Encoded | Row]:
    """Add empty rows at the end, which ``stack_rows`` fills with padding."""
    return [*rows, *[()] * (size - len(rows))]


def _documents(row: Encoded | Row) -> Row:
    return (row,) if isinstance(row, Encoded) else row


def _check_lengths(lengths: Iterable[int], limit: int) -> None:
    for index, length in enumerate(lengths):
        if not 1 <= length <= limit:
            raise InputError(f"example {index} has {length} tokens, rows hold 1 to {limit}; encode with that limit")


def _hash_documents(rows: Iterable[Row]) -> str:
    """Return the sha256 (hex) of ids, masks and the boundaries of documents and rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row), *(len(document.tokens) for document in row)], np.int64).tobytes())
        for document in row:
            digest.update(np.array(document.tokens, np.int32).tobytes())
            digest.update(np.array(document.loss_mask, np.bool_).tobytes())
    return digest.hexdigest()


def _shorten(value: object) -> str:
    """Cut a hash to 12 characters for a message."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 20 else str(value)
