from __future__ import annotations

import itertools

import numpy as np
import pytest

from rlhf_jax.io.layout import Window, full_window, parse

SIZES = {"h": 3, "k": 2, "d": 4}


def reader(stored: np.ndarray, windows: list[Window]):
    def read(window: Window) -> np.ndarray:
        windows.append(window)
        return stored[window]

    return read


def test_a_layout_by_hand() -> None:
    """The rows are 3 heads of 2; the number in row 2 h + k, column d moves to [d, h, k]."""
    layout = parse("(h k) d -> d h k")
    assert layout.stored_shape(SIZES) == (6, 4) and layout.parameter_shape(SIZES) == (4, 3, 2)
    stored = np.arange(24).reshape(6, 4)
    parameter = layout.read_parameter(SIZES, full_window((4, 3, 2)), lambda window: stored[window])
    assert parameter[1, 2, 0] == stored[4, 1] == 17
    assert all(parameter[d, h, k] == stored[2 * h + k, d] for d, h, k in np.ndindex(4, 3, 2))


@pytest.mark.parametrize("text", ["(h k) d -> d h k", "d (h k) -> h k d", "h d -> d h", "h k -> h k", "d -> d"])
def test_a_window_equals_that_part_of_the_full_array(text: str) -> None:
    layout = parse(text)
    stored = np.random.default_rng(0).standard_normal(layout.stored_shape(SIZES))
    complete = layout.read_parameter(SIZES, full_window(layout.parameter_shape(SIZES)), lambda window: stored[window])
    rewritten = np.full_like(stored, np.nan)
    layout.write(SIZES, rewritten, complete)
    np.testing.assert_array_equal(rewritten, stored)
    bounds = [[slice(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in layout.parameter_shape(SIZES)]
    for window in itertools.product(*bounds):
        windows: list[Window] = []
        part = layout.read_parameter(SIZES, window, reader(stored, windows))
        np.testing.assert_array_equal(part, complete[window])
        # of an axis (h k) whole blocks of k are read, whatever part of a block is wanted
        cut = "(h k)" in text and part.shape[layout.parameter.index("k")] < SIZES["k"]
        assert sum(stored[one].size for one in windows) == part.size * (SIZES["k"] if cut else 1)


JOINED = {  # (text of each part), numpy's way to the part
    "one after the other": (
        ["(h k)|(g k)|(g k) d -> d h k", "(h k)|(g k)|(g k) d -> d g k", "(h k)|(g k)|(g k) d -> d g k"],
        lambda stored, part: np.split(stored, [6, 8])[part].T.reshape(4, (3, 1, 1)[part], 2),
    ),
    "columns one after the other": (
        ["d (h k)|(h k) -> d h k"] * 2,
        lambda stored, part: np.split(stored, 2, axis=1)[part].reshape(4, 3, 2),
    ),
    "interleaved": (
        ["(h 3 k) d -> d h k"] * 3,
        lambda stored, part: stored.reshape(3, 3, 2, 4)[:, part].transpose(2, 0, 1),
    ),
    "interleaved biases": (["(h 3 k) -> h k"] * 3, lambda stored, part: stored.reshape(3, 3, 2)[:, part]),
    "halves": (["h|h d -> d h"] * 2, lambda stored, part: stored[3 * part : 3 * part + 3].T),
}


def test_blocks_are_stored_rows_that_cover_the_window() -> None:
    """``(h k) d -> d h k``: the stored rows are h first. A window of 2 x 3 heads x 4 in reads of at most 16 numbers: two
    heads (16), then one (8); a row longer than the limit is read by itself."""
    layout, window = parse("(h k) d -> d h k"), (slice(1, 3), slice(2, 5), slice(0, 4))
    every = slice(None)
    assert list(layout.blocks(window, 16)) == [
        ((every, slice(0, 2), every), (slice(1, 3), slice(2, 4), slice(0, 4))),
        ((every, slice(2, 3), every), (slice(1, 3), slice(4, 5), slice(0, 4))),
    ]
    assert [target[1] for target, _ in layout.blocks(window, 1)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(layout.blocks(window, 1000)) == [((every, slice(0, 3), every), window)]


@pytest.mark.parametrize("name", JOINED)
def test_parameters_that_share_a_tensor(name: str) -> None:
    """Any window of each parameter equals that part of the full array, and together they rewrite the tensor."""
    texts, select = JOINED[name]
    sizes = SIZES | {"g": 1}
    layouts = [parse(text, part) for part, text in enumerate(texts)]
    stored = np.random.default_rng(0).standard_normal(layouts[0].stored_shape(sizes))
    rewritten = np.full_like(stored, np.nan)
    for part, layout in enumerate(layouts):
        complete = layout.read_parameter(
            sizes, full_window(layout.parameter_shape(sizes)), lambda window: stored[window]
        )
        np.testing.assert_array_equal(complete, select(stored, part))
        window = tuple(slice(size - 1, size) for size in complete.shape)
        one = layout.read_parameter(sizes, window, lambda window: stored[window])
        np.testing.assert_array_equal(one, complete[window])
        layout.write(sizes, rewritten, complete)
    np.testing.assert_array_equal(rewritten, stored)


@pytest.mark.parametrize("text", ["(h k) d -> d h", "h d -> d h k", "h h -> h", "h d"])
def test_an_invalid_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="same letters"):
        parse(text)
