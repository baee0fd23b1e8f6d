"""Conversion between a stored tensor and a parameter by the layout in `models.families.Weight.layout`.

A layout such as ``(h k) d -> d h k`` is applied from left to right on import and from right to left on export. Windows let an
import read only the rows that a shard needs.

"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Window = tuple[slice, ...]
"""Start and stop along each axis of an array (step 1)."""
Sizes = Mapping[str, int]
"""Axis length by letter."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a stored tensor and of the parameter that it contains.

    stored: for each axis of the stored tensor the parameters concatenated along it, each as the letters that it flattens
    (a digit: so many parameters are interleaved).
    parameter: letters of the parameter's axes.
    part: index of this parameter among those that share an axis.

    """

    stored: tuple[tuple[tuple[str, ...], ...], ...]
    parameter: tuple[str, ...]
    part: int = 0

    def stored_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the stored tensor's shape."""
        return tuple(sum(_length(letters, sizes) for letters in axis) for axis in self.stored)

    def parameter_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the parameter's shape (of one layer)."""
        return tuple(sizes[letter] for letter in self.parameter)

    def read_parameter(self, sizes: Sizes, window: Window, read: Callable[[Window], np.ndarray]) -> np.ndarray:
        """Read the part ``window`` of the parameter with ``read``, which maps a window of the stored tensor to its values.

        An axis of several letters is read in whole blocks of its first letter and cut afterwards.

        """
        slices = dict(zip(self.parameter, window, strict=True))
        stored_window: list[slice] = []
        lengths: list[int] = []
        cuts: list[slice | int] = []
        for axis in self.stored:
            start, (first, *inner) = self._offset_and_letters(axis, sizes)
            block, part = _length(inner, sizes), slices[first]
            stored_window.append(slice(start + part.start * block, start + part.stop * block))
            lengths += [part.stop - part.start, *(_length((letter,), sizes) for letter in inner)]
            cuts += [slice(None), *(self.part if letter.isdigit() else slices[letter] for letter in inner)]
        letters = self._letters()
        values = read(tuple(stored_window)).reshape(lengths)[tuple(cuts)]
        return values.transpose([letters.index(letter) for letter in self.parameter])

    def blocks(self, window: Window, numbers: int) -> Iterator[tuple[Window, Window]]:
        """Yield the parts of ``window`` along the stored tensor's rows, of at most ``numbers`` numbers or one row each.

        Each item is (window of the part relative to ``window``, window of the part in the parameter).

        """
        axis = self.parameter.index(self._letters()[0])
        lengths = [part.stop - part.start for part in window]
        row = math.prod(lengths[:axis] + lengths[axis + 1 :])
        step = max(1, numbers // max(1, row))
        for begin in range(0, lengths[axis], step):
            end, first = min(begin + step, lengths[axis]), window[axis].start
            target = (*[slice(None)] * axis, slice(begin, end), *[slice(None)] * (len(window) - axis - 1))
            yield target, (*window[:axis], slice(first + begin, first + end), *window[axis + 1 :])

    def write(self, sizes: Sizes, stored: np.ndarray, parameter: np.ndarray) -> None:
        """Write a parameter (of one layer) to its window of the stored tensor."""
        stored_window: list[slice] = []
        lengths: list[int] = []
        cuts: list[slice | int] = []
        for axis in self.stored:
            start, own = self._offset_and_letters(axis, sizes)
            stored_window.append(slice(start, start + _length(own, sizes)))
            lengths += [_length((letter,), sizes) for letter in own]
            cuts += [self.part if letter.isdigit() else slice(None) for letter in own]
        view = stored[tuple(stored_window)].reshape(lengths, copy=False)  # splitting axes never needs a copy
        view[tuple(cuts)] = parameter.transpose([self.parameter.index(letter) for letter in self._letters()])

    def _offset_and_letters(self, axis: tuple[tuple[str, ...], ...], sizes: Sizes) -> tuple[int, tuple[str, ...]]:
        """Return the offset of this parameter along a stored axis, and the letters flattened into that axis."""
        if len(axis) == 1:
            return 0, axis[0]
        return sum(_length(letters, sizes) for letters in axis[: self.part]), axis[self.part]

    def _letters(self) -> list[str]:
        """Return the parameter's letters in the order of the stored tensor."""
        own = (axis[0] if len(axis) == 1 else axis[self.part] for axis in self.stored)
        return [letter for joined in own for letter in joined if not letter.isdigit()]


@functools.cache
def parse(text: str, part: int = 0) -> Layout:
    """Parse a layout: ``(h k)|(g k) d -> d g k``, 1 -> Layout(((('h', 'k'), ('g', 'k')), (('d',),)), ('d', 'g', 'k'), 1).

    Raises ValueError for a text that is no layout.

    """
    source, _, target = text.partition("->")
    axes = re.findall(r"(?:\([^)]*\)|\w+)(?:\|(?:\([^)]*\)|\w+))*", source)
    stored = tuple(tuple(tuple(letters.strip("()").split()) for letters in axis.split("|")) for axis in axes)
    layout = Layout(stored, tuple(target.split()), part)
    if any(1 < len(axis) <= part for axis in stored) or sorted(layout._letters()) != sorted(layout.parameter):
        raise ValueError(f"layout {text!r}: both sides must hold the same letters once")
    return layout


def full_window(shape: tuple[int, ...]) -> Window:
    """Return the window that covers an array of this shape."""
    return tuple(slice(0, size) for size in shape)


def _length(letters: tuple[str, ...] | list[str], sizes: Sizes) -> int:
    """Return the number of elements that the flattened letters span; a digit is its own length."""
    return math.prod(int(letter) if letter.isdigit() else sizes[letter] for letter in letters)
