"""How one stored tensor and one parameter hold the same numbers: `models.families.Weight.layout` put to work.

A layout such as ``(h k) d -> d h k`` is read left to right on import and right to left on export. Windows let an
import read only the part that a shard needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Window = tuple[slice, ...]
"""Start and stop along each axis of an array (step 1, both given)."""
Sizes = Mapping[str, int]
"""Length of each letter."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """theirs: for each axis of the stored tensor what lies one after the other along it, each the letters that are joined
    (a digit: so many parameters interleaved); ours: the axes of the parameter; part: which of those that share an axis
    it is.
    """

    theirs: tuple[tuple[tuple[str, ...], ...], ...]
    ours: tuple[str, ...]
    part: int = 0

    def their_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The stored tensor's shape."""
        return tuple(sum(_length(one, sizes) for one in axis) for axis in self.theirs)

    def our_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The parameter's shape (of one layer)."""
        return tuple(sizes[letter] for letter in self.ours)

    def to_ours(self, sizes: Sizes, window: Window, read: Callable[[Window], np.ndarray]) -> np.ndarray:
        """The part ``window`` of the parameter, from ``read(window of the stored tensor)``.

        An axis joining several letters is read in whole blocks of its first letter; the rest is cut afterwards.
        """
        wanted = dict(zip(self.ours, window, strict=True))
        theirs: list[slice] = []
        lengths: list[int] = []
        cuts: list[slice | int] = []
        for axis in self.theirs:
            start, (first, *rest) = self._own(axis, sizes)
            block, part = _length(rest, sizes), wanted[first]
            theirs.append(slice(start + part.start * block, start + part.stop * block))
            lengths += [part.stop - part.start, *(_length((letter,), sizes) for letter in rest)]
            cuts += [slice(None), *(self.part if letter.isdigit() else wanted[letter] for letter in rest)]
        letters = self._letters()
        stored = read(tuple(theirs)).reshape(lengths)[tuple(cuts)]
        return stored.transpose([letters.index(letter) for letter in self.ours])

    def blocks(self, window: Window, numbers: int) -> Iterator[tuple[Window, Window]]:
        """``window`` cut along the stored tensor's rows into parts of at most ``numbers`` numbers, or of one row: (where the
        part lies inside the window, the part)."""
        axis = self.ours.index(self._letters()[0])
        lengths = [part.stop - part.start for part in window]
        row = math.prod(lengths[:axis] + lengths[axis + 1 :])
        step = max(1, numbers // max(1, row))
        for begin in range(0, lengths[axis], step):
            end, first = min(begin + step, lengths[axis]), window[axis].start
            target = (*[slice(None)] * axis, slice(begin, end), *[slice(None)] * (len(window) - axis - 1))
            yield target, (*window[:axis], slice(first + begin, first + end), *window[axis + 1 :])

    def write(self, sizes: Sizes, stored: np.ndarray, parameter: np.ndarray) -> None:
        """Put a whole parameter (of one layer) into its place in the stored tensor."""
        theirs: list[slice] = []
        lengths: list[int] = []
        cuts: list[slice | int] = []
        for axis in self.theirs:
            start, own = self._own(axis, sizes)
            theirs.append(slice(start, start + _length(own, sizes)))
            lengths += [_length((letter,), sizes) for letter in own]
            cuts += [self.part if letter.isdigit() else slice(None) for letter in own]
        view = stored[tuple(theirs)].reshape(lengths, copy=False)  # splitting axes never needs a copy
        view[tuple(cuts)] = parameter.transpose([self.ours.index(letter) for letter in self._letters()])

    def _own(self, axis: tuple[tuple[str, ...], ...], sizes: Sizes) -> tuple[int, tuple[str, ...]]:
        """Where along a stored axis this parameter begins, and the letters joined there."""
        if len(axis) == 1:
            return 0, axis[0]
        return sum(_length(one, sizes) for one in axis[: self.part]), axis[self.part]

    def _letters(self) -> list[str]:
        """The parameter's letters in the order of the stored tensor."""
        own = (axis[0] if len(axis) == 1 else axis[self.part] for axis in self.theirs)
        return [letter for joined in own for letter in joined if not letter.isdigit()]


@functools.cache
def parse(text: str, part: int = 0) -> Layout:
    """``(h k)|(g k) d -> d g k``, 1 -> Layout(((('h', 'k'), ('g', 'k')), (('d',),)), ('d', 'g', 'k'), 1).

    ValueError for a table row that is none.
    """
    left, _, right = text.partition("->")
    axes = re.findall(r"(?:\([^)]*\)|\w+)(?:\|(?:\([^)]*\)|\w+))*", left)
    theirs = tuple(tuple(tuple(one.strip("()").split()) for one in axis.split("|")) for axis in axes)
    layout = Layout(theirs, tuple(right.split()), part)
    if any(1 < len(axis) <= part for axis in theirs) or sorted(layout._letters()) != sorted(layout.ours):
        raise ValueError(f"layout {text!r}: both sides must hold the same letters once")
    return layout


def whole(shape: tuple[int, ...]) -> Window:
    """The window that is everything."""
    return tuple(slice(0, size) for size in shape)


def _length(letters: tuple[str, ...] | list[str], sizes: Sizes) -> int:
    """How many elements the joined letters span; a digit is its own length."""
    return math.prod(int(letter) if letter.isdigit() else sizes[letter] for letter in letters)
