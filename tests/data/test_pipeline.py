"""Each example exactly once an epoch, in another order each time, and exact continuation in a fresh iterator."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import (
    Batches,
    Encoded,
    EncodedPair,
    evaluation_batches,
    evaluation_pair_batches,
    evaluation_prompt_batches,
    pack,
    pair_batches,
    prompt_batches,
    token_batches,
)
from rlhf_jax.errors import InputError


def document(number: int, size: int = 3) -> Encoded:
    """All its tokens are its number."""
    return Encoded([number] * size, [False] + [True] * (size - 1), 1, 0, str(number))


def documents(count: int) -> list[Encoded]:
    return [document(i, 2 + i % 3) for i in range(1, count + 1)]


def pairs(count: int) -> list[EncodedPair]:
    return [EncodedPair(document(i, 3), document(100 + i, 4), i / 2) for i in range(1, count + 1)]


def tokens_of(count: int = 10, **changes: Any) -> Batches[Any]:
    options = {"batch_size": 4, "length": 6, "seed": 3, "pad_id": 0} | changes
    return token_batches(documents(count), **options)


MAKERS: dict[str, Callable[[], Batches[Any]]] = {
    "tokens": tokens_of,
    "packed": lambda: token_batches(pack(documents(20), 8), batch_size=3, length=8, seed=1, pad_id=0),
    "pairs": lambda: pair_batches(pairs(10), batch_size=4, length=5, seed=1, pad_id=0),
    "prompts": lambda: prompt_batches([[i] * (1 + i % 3) for i in range(10)], batch_size=4, length=3, seed=1, pad_id=0),
}


def assert_same(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_each_example_once_an_epoch_with_a_fresh_order() -> None:
    stream = tokens_of(10)  # batches of 4: epochs end inside a batch
    observed = np.concatenate([next(stream).tokens[:, 0] for _ in range(15)])  # 60 examples = 6 epochs
    epochs = observed.reshape(6, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 11))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert any(list(epoch) != sorted(epoch) for epoch in epochs)


def test_order_depends_on_the_seed_only() -> None:
    def order(**changes: Any) -> list[int]:
        stream = tokens_of(**changes)
        return [int(token) for _ in range(5) for token in next(stream).tokens[:, 0]]

    assert order() == order()
    assert order() == order(length=7, pad_id=9)
    assert order() != order(seed=4)
    longer = order(batch_size=2)
    assert longer == order()[: len(longer)]


def test_token_batch_shape_and_padding() -> None:
    batch = next(tokens_of(10, pad_id=77))
    for field in (batch.tokens, batch.positions, batch.segment_ids, batch.loss_mask):
        assert isinstance(field, np.ndarray) and field.shape == (4, 6)
    np.testing.assert_array_equal(batch.tokens == 77, batch.segment_ids == 0)
    for row in range(4):
        size = 2 + int(batch.tokens[row, 0]) % 3
        np.testing.assert_array_equal(batch.loss_mask[row], [0 < column < size for column in range(6)])


def test_packed_rows_carry_every_token() -> None:
    rows = pack(documents(20), 8)
    batches = list(itertools.islice(token_batches(rows, batch_size=1, length=8, seed=0, pad_id=0), len(rows)))
    actual = sorted(int(token) for batch in batches for token in batch.tokens[batch.segment_ids > 0])
    assert actual == sorted(token for item in documents(20) for token in item.tokens)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "batches_before", [0, 1, 2, 3, 7]
)  # 10 examples by 4: batch 3 holds the end of the first epoch
def test_fresh_iterator_continues_exactly(kind: str, batches_before: int) -> None:
    unbroken = MAKERS[kind]()
    for _ in range(batches_before):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.get_state()))
    fresh = MAKERS[kind]()
    next(fresh)  # also one that was already used
    fresh.set_state(state)
    assert fresh.get_state() == unbroken.get_state()
    for _ in range(8):
        assert_same(next(fresh), next(unbroken))


def test_state_is_taken_when_asked_for() -> None:
    stream = tokens_of()
    state = stream.get_state()
    first = next(stream)
    assert state["next_batch"] == 0
    stream.set_state(state)
    assert_same(next(stream), first)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 5}, "batch_size"),
        ({"seed": 4}, "order"),
        ({"count": 11}, "content"),
        ({"length": 7}, "length"),
        ({"pad_id": 1}, "pad_id"),
    ],
)
def test_state_of_another_stream_is_refused_by_name(changes: dict[str, int], key: str) -> None:
    other = tokens_of(**changes)
    before = other.get_state()
    with pytest.raises(InputError, match=f"data state: '{key}' was") as caught:
        other.set_state(tokens_of().get_state())
    assert "\n" not in str(caught.value)
    assert other.get_state() == before


def test_one_changed_token_mask_boundary_or_margin_is_noticed() -> None:
    def content(rows: list[Any]) -> object:
        return token_batches(rows, batch_size=1, length=9, seed=0, pad_id=0).get_state()["fingerprint"]["content"]

    one = Encoded([1, 2, 3], [False, True, True], 1)
    variants = [
        [one],
        [Encoded([1, 2, 4], [False, True, True], 1)],
        [Encoded([1, 2, 3], [False, False, True], 1)],
        [one, one],
        [(one, one)],
        [(Encoded([1], [False], 1), Encoded([2, 3], [True, True], 1))],
    ]
    assert len({str(content(rows)) for rows in variants}) == len(variants)
    changed = [pairs(3)[0]._replace(margin=9.0), *pairs(3)[1:]]
    with pytest.raises(InputError, match="'content'"):
        pair_batches(changed, batch_size=1, length=5, seed=0, pad_id=0).set_state(
            pair_batches(pairs(3), batch_size=1, length=5, seed=0, pad_id=0).get_state()
        )


@pytest.mark.parametrize(
    "damage", [{"next_batch": -1}, {"next_batch": "3"}, {"next_batch": True}, {"fingerprint": None}]
)
def test_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    stream = tokens_of()
    with pytest.raises(InputError, match="missing or damaged"):
        stream.set_state(stream.get_state() | damage)
    with pytest.raises(InputError, match="missing or damaged"):
        stream.set_state({})


def test_pairs_stay_together() -> None:
    stream = pair_batches(pairs(10), batch_size=5, length=5, seed=2, pad_id=0)
    for batch in itertools.islice(stream, 4):
        first = batch.rows.tokens[:, :, 0]
        np.testing.assert_array_equal(first[:, 1], first[:, 0] + 100)
        np.testing.assert_array_equal(batch.margin, first[:, 0] / 2)
        np.testing.assert_array_equal(batch.label, [[1, 0]] * 5)
        assert batch.mask.all() and batch.rows.tokens.shape == (5, 2, 5) and batch.weight.tolist() == [1.0] * 5
        assert batch.label.dtype == batch.margin.dtype == batch.weight.dtype == np.float32
        assert data.pair_lengths(batch).tolist() == [3] * 5 + [4] * 5
        assert data.pair_targets(batch).tolist() == [2] * 5 + [3] * 5


def test_prompts_are_left_padded_and_named() -> None:
    prompts = [[10], [20, 21], [30, 31, 32]]
    batch = next(prompt_batches(prompts, batch_size=3, length=4, seed=0, pad_id=9, samples=2))
    assert batch.tokens.shape == (6, 4) and batch.tokens.dtype == batch.prompt_id.dtype == np.int32
    np.testing.assert_array_equal(batch.sample_id, [0, 1] * 3)
    np.testing.assert_array_equal(batch.prompt_id[::2], batch.prompt_id[1::2])
    assert sorted(batch.prompt_id) == [0, 0, 1, 1, 2, 2]
    for row, index in enumerate(batch.prompt_id):
        padding = 4 - len(prompts[index])
        np.testing.assert_array_equal(batch.tokens[row], [9] * padding + prompts[index])
        np.testing.assert_array_equal(batch.mask[row], [False] * padding + [True] * len(prompts[index]))


def test_a_prompt_twice_in_a_batch_has_other_sample_ids() -> None:
    """3 prompts by 4: every batch holds one prompt of the next epoch too."""
    stream = prompt_batches([[1], [2], [3]], batch_size=4, length=1, seed=0, pad_id=0, samples=2)
    for batch in itertools.islice(stream, 6):
        names = list(zip(batch.prompt_id.tolist(), batch.sample_id.tolist(), strict=True))
        assert len(set(names)) == 8
        assert {sample for _, sample in names} == {0, 1, 2, 3}


def test_evaluation_covers_each_example_once_in_order() -> None:
    batches = list(evaluation_batches(documents(10), batch_size=4, length=6, pad_id=0))
    assert [batch.tokens.shape for batch in batches] == [(4, 6)] * 3
    first = np.concatenate([batch.tokens[:, 0] for batch in batches])
    np.testing.assert_array_equal(first, [*range(1, 11), 0, 0])
    assert not batches[-1].loss_mask[2:].any() and not batches[-1].segment_ids[2:].any()
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(sum(item.loss_mask) for item in documents(10))


def test_evaluation_of_pairs_and_prompts() -> None:
    *_, last = evaluation_pair_batches(pairs(5), batch_size=4, length=5, pad_id=0)
    np.testing.assert_array_equal(last.rows.tokens[:, :, 0], [[5, 105], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(last.mask, [[True, True], [False, False], [False, False], [False, False]])
    assert last.weight.tolist() == [1.0, 0.0, 0.0, 0.0] and not last.label[1:].any()
    np.testing.assert_array_equal(last.margin, [2.5, 0, 0, 0])
    assert not last.rows.loss_mask[1:].any() and not last.rows.segment_ids[1:].any()
    prompts = list(evaluation_prompt_batches([[1], [2], [3]], batch_size=2, length=2, pad_id=0))
    np.testing.assert_array_equal(np.concatenate([batch.prompt_id for batch in prompts]), [0, 1, 2, -1])
    np.testing.assert_array_equal(prompts[-1].tokens, [[0, 3], [0, 3]])
    assert prompts[-1].mask.any(axis=1).all()
    seeded = list(evaluation_prompt_batches([[1], [2], [3]], batch_size=2, length=2, pad_id=0, seeds=[7, 9, 8]))
    np.testing.assert_array_equal(np.concatenate([batch.seed for batch in seeded]), [7, 9, 8, 0])
    assert prompts[0].seed is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "no examples"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"length": 3}, "example 1 has 4 tokens, rows hold 1 to 3"),
    ],
)
def test_bad_settings(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokens_of(**changes)


def test_bad_settings_of_prompts_and_evaluation() -> None:
    with pytest.raises(InputError, match="samples = 0"):
        prompt_batches([[1]], batch_size=1, length=1, seed=0, pad_id=0, samples=0)
    with pytest.raises(InputError, match="example 0 has 0 tokens"):
        prompt_batches([[]], batch_size=1, length=1, seed=0, pad_id=0)
    with pytest.raises(InputError, match="batch_size = 0"):
        list(evaluation_batches(documents(2), batch_size=0, length=6, pad_id=0))
    with pytest.raises(InputError, match="no examples to evaluate on"):
        list(evaluation_batches([], batch_size=1, length=6, pad_id=0))
