"""Packing of several documents into a row, and the table of row lengths that limits the number of compiled shapes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.batches import TokenBatch
from rlhf_jax.data.encode import Encoded
from rlhf_jax.errors import InputError

LENGTH_BUCKETS = (
    *(32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    *(3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768),
)
"""Row lengths: powers of two and their halfway points. Each is at most 1.5 times the previous, so padding is less
than a third of a row, and there are at most 21 compiled shapes. From 256 on they are multiples of 128, the lanes
of a TPU."""

Row = tuple[Encoded, ...]
"""Documents that share a row, left to right."""


def bucket_length(length: int, buckets: Sequence[int] = LENGTH_BUCKETS) -> int:
    """Return the smallest bucket that holds ``length`` tokens: 65 -> 96, 96 -> 96. Raises InputError beyond the last one."""
    place = bisect.bisect_left(buckets, length)
    if place == len(buckets):
        raise InputError(f"length {length} exceeds the largest bucket {buckets[-1]}; lower max_length")
    return buckets[place]


def pack(encoded: Sequence[Encoded], length: int) -> list[Row]:
    """Pack documents into rows of at most ``length`` tokens by best-fit decreasing.

    The longest is placed first, each where the least room remains; ties go to the lower index and the older row, so
    the same documents always give the same rows. At worst about 11/9 of the fewest possible rows result (Johnson et al.
    1974). Lengths [6, 5, 4, 3, 2] in rows of 10 become (6, 4) and (5, 3, 2). Raises InputError for a document longer
    than a row.
    """
    rows: list[list[Encoded]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row number), ascending
    for index in sorted(range(len(encoded)), key=lambda index: -len(encoded[index].tokens)):
        document = encoded[index]
        size = _check_size(document, length)
        place = bisect.bisect_left(rooms, (size, -1))
        if place == len(rooms):
            room, number = length, len(rows)
            rows.append([])
        else:
            room, number = rooms.pop(place)
        rows[number].append(document)
        bisect.insort(rooms, (room - size, number))
    return [tuple(row) for row in rows]


def stack_rows(rows: Sequence[Encoded | Row], length: int, pad_id: int) -> TokenBatch:
    """Stack rows to a host batch (numpy) [B, length], each a document or a ``Row`` of them, right-padded with ``pad_id``.

    Positions restart at 0 and segment_ids count 1, 2, ... with each document; padding has position 0, segment 0 and
    no loss. A document's first token is never a target: the token before it belongs to another document. An empty ``Row`` is all
    padding. Documents of 3 and 2 tokens in a row of 6: positions [0 1 2 0 1 0], segment_ids [1 1 1 2 2 0].
    """
    shape = (len(rows), length)
    arrays: dict[str, Any] = {  # numpy arrays in a pytree whose fields are declared as JAX's
        "tokens": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.bool_),
    }
    for number, row in enumerate(rows):
        begin = 0
        for segment, document in enumerate((row,) if isinstance(row, Encoded) else row, start=1):
            end = begin + _check_size(document, length - begin)
            arrays["tokens"][number, begin:end] = document.tokens
            arrays["positions"][number, begin:end] = np.arange(end - begin)
            arrays["segment_ids"][number, begin:end] = segment
            arrays["loss_mask"][number, begin + 1 : end] = document.loss_mask[1:]
            begin = end
    return TokenBatch(**arrays)


def _check_size(document: Encoded, room: int) -> int:
    size = len(document.tokens)
    if size == 0 or size != len(document.loss_mask):
        problem = f"{size} tokens with {len(document.loss_mask)} mask entries"
        raise InputError(f"example {document.id!r}: {problem}; encode it again")
    if size > room:
        raise InputError(f"example {document.id!r}: {size} tokens do not fit in {room}; encode with a lower max_length")
    return size
