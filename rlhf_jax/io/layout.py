"""How one stored tensor and one parameter hold the same numbers: `models.families.Weight.layout` put to work.

A layout such as ``(h k) d -> d h k`` is read left to right on import and right to left on export. Windows let an
import read only the part that a shard needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

Window = tuple[slice, ...]
"""Start and stop along each axis of an array (step 1, both given)."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """theirs: for each axis of the stored tensor the letters it joins. ours: the axes of the parameter."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored tensor's shape. sizes: length of each letter."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.theirs)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The parameter's shape (of one layer)."""
        return tuple(sizes[letter] for letter in self.ours)

    def to_ours(self, sizes: Mapping[str, int], window: Window, read: Callable[[Window], np.ndarray]) -> np.ndarray:
        """The part ``window`` of the parameter, from ``read(window of the stored tensor)``.

        An axis joining several letters is read in whole blocks of its first letter; the rest is cut afterwards.
        """
        wanted = dict(zip(self.ours, window, strict=True))
        theirs, lengths, cuts = [], [], []
        for first, *rest in self.theirs:
            block, part = math.prod(sizes[letter] for letter in rest), wanted[first]
            theirs.append(slice(part.start * block, part.stop * block))
            lengths += [part.stop - part.start, *(sizes[letter] for letter in rest)]
            cuts += [slice(None), *(wanted[letter] for letter in rest)]
        letters = [letter for group in self.theirs for letter in group]
        stored = read(tuple(theirs)).reshape(lengths)[tuple(cuts)]
        return stored.transpose([letters.index(letter) for letter in self.ours])

    def to_theirs(self, sizes: Mapping[str, int], parameter: np.ndarray) -> np.ndarray:
        """The stored tensor (contiguous) of a whole parameter (of one layer)."""
        letters = [letter for group in self.theirs for letter in group]
        moved = parameter.transpose([self.ours.index(letter) for letter in letters])
        return np.ascontiguousarray(moved).reshape(self.their_shape(sizes))


@functools.cache
def parse(text: str) -> Layout:
    """``(h k) d -> d h k`` -> Layout((('h', 'k'), ('d',)), ('d', 'h', 'k')). ValueError for a table row that is none."""
    left, _, right = text.partition("->")
    groups = tuple(tuple((joined or single).split()) for joined, single in re.findall(r"\(([^)]*)\)|(\w+)", left))
    layout = Layout(groups, tuple(right.split()))
    if sorted(letter for group in layout.theirs for letter in group) != sorted(layout.ours):
        raise ValueError(f"layout {text!r}: both sides must hold the same letters once")
    return layout


def whole(shape: tuple[int, ...]) -> Window:
    """The window that is everything."""
    return tuple(slice(0, size) for size in shape)
