"""Packing loses nothing, mixes nothing, and always gives the same rows."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from rlhf_jax.data import LENGTH_BUCKETS, Encoded, bucket_length, pack, stack_rows
from rlhf_jax.errors import InputError


def document(size: int, name: str = "", start: int = 10) -> Encoded:
    return Encoded(list(range(start, start + size)), [False] + [True] * (size - 1), 1, 0, name)


def random_documents(seed: int, count: int = 60, length: int = 32) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, length + 1, count)
    return [document(int(size), str(i), 100 * i) for i, size in enumerate(sizes)]


def test_worked_rows() -> None:
    rows = pack([document(size) for size in (2, 5, 6, 3, 4)], 10)
    assert [[len(item.tokens) for item in row] for row in rows] == [[6, 4], [5, 3, 2]]


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    # 7 and 6 open rows of 10 (7 + 6 > 10); 3 fits in both and goes to the 7; 4 came before it to the 6.
    rows = pack([document(size) for size in (6, 7, 3, 4)], 10)
    assert [[len(item.tokens) for item in row] for row in rows] == [[7, 3], [6, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_every_document_once_and_no_row_overfull(seed: int) -> None:
    documents = random_documents(seed)
    rows = pack(documents, 32)
    assert Counter(item.id for row in rows for item in row) == Counter(item.id for item in documents)
    sizes = [sum(len(item.tokens) for item in row) for row in rows]
    assert max(sizes) <= 32
    # Any-fit: no two rows would fit in one.
    assert all(a + b > 32 for i, a in enumerate(sizes) for b in sizes[:i])
    assert rows == pack(documents, 32)


def test_stacked_rows_against_a_slow_reference() -> None:
    rows = pack(random_documents(7), 32)
    batch = stack_rows(rows, 40, pad_id=-1)
    for r, row in enumerate(rows):
        column = 0
        for segment, item in enumerate(row, start=1):
            for position, token in enumerate(item.tokens):
                assert batch.tokens[r, column] == token
                assert batch.positions[r, column] == position
                assert batch.segment_ids[r, column] == segment
                assert batch.loss_mask[r, column] == (item.loss_mask[position] and position > 0)
                column += 1
        assert np.all(batch.tokens[r, column:] == -1) and not np.any(batch.segment_ids[r, column:])
        assert not np.any(batch.loss_mask[r, column:]) and not np.any(batch.positions[r, column:])
    assert (batch.tokens.dtype, batch.positions.dtype) == (np.int32, np.int32)
    assert (batch.segment_ids.dtype, batch.loss_mask.dtype) == (np.int32, np.bool_)


def test_worked_row() -> None:
    batch = stack_rows([(document(3), document(2)), ()], 6, pad_id=0)
    np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 10, 11, 0], [0] * 6])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0], [0] * 6])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2, 0], [0] * 6])
    np.testing.assert_array_equal(batch.loss_mask, np.array([[0, 1, 1, 0, 1, 0], [0] * 6], bool))


def test_first_token_never_counts_even_if_its_mask_says_so() -> None:
    batch = stack_rows([(document(2), Encoded([1, 2], [True, True], 0))], 4, pad_id=0)
    np.testing.assert_array_equal(batch.loss_mask, [[False, True, False, True]])


def test_padding_id_inside_a_document_still_counts() -> None:
    batch = stack_rows([Encoded([7, 0], [False, True], 1)], 3, pad_id=0)
    np.testing.assert_array_equal(batch.loss_mask, [[False, True, False]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 0]])


def test_documents_that_cannot_be_placed() -> None:
    with pytest.raises(InputError, match="'big': 11 tokens do not fit in 10"):
        pack([document(11, "big")], 10)
    with pytest.raises(InputError, match="'b': 3 tokens do not fit in 1"):
        stack_rows([(document(3, "a"), document(3, "b"))], 4, pad_id=0)
    with pytest.raises(InputError, match="2 tokens with 1 mask entries"):
        pack([Encoded([1, 2], [False], 1)], 10)
    with pytest.raises(InputError, match="0 tokens"):
        pack([Encoded([], [], 0)], 10)


def test_buckets() -> None:
    assert [bucket_length(n) for n in (1, 32, 33, 65, 96, 32768)] == [32, 32, 48, 96, 96, 32768]
    with pytest.raises(InputError, match="length 32769 exceeds the largest bucket 32768"):
        bucket_length(32769)
    assert bucket_length(5, (4, 8)) == 8
    assert len(LENGTH_BUCKETS) == 21
    assert all(a < b <= 1.5 * a for a, b in itertools.pairwise(LENGTH_BUCKETS))
    assert all(bucket % 128 == 0 for bucket in LENGTH_BUCKETS if bucket >= 256)
