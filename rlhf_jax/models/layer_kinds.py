"""Kinds of layers, and the grouping of equal layers that are stacked and scanned together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlhf_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The kind of a layer.

    window: how many tokens it attends to, itself included (None: all before it). rope: None = no rotary positions.
    experts: whether its feed-forward part is a mixture of experts.
    """

    window: int | None = None
    rope: Rope | None = None
    experts: bool = False


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """A block of layers (``kinds``) that is repeated ``repeats`` times, starting at layer ``first``."""

    kinds: tuple[LayerKind, ...]
    first: int
    repeats: int

    def stacks(self) -> tuple[range, ...]:
        """Return for each place in the block the layers at that place: their parameters are stacked.

        Two kinds, three times, from layer 4 on: (4, 6, 8), (5, 7, 9).
        """
        period = len(self.kinds)
        end = self.first + period * self.repeats
        return tuple(range(self.first + place, end, period) for place in range(period))


def group_layers(layers: Sequence[LayerKind]) -> tuple[LayerGroup, ...]:
    """Return the layers as a repeating block plus remainder when a block repeats at least twice, else as runs of equal layers.

    s s f s s f s -> (s s f) x 2, (s) x 1; f f f s s -> (f) x 3, (s) x 2.
    """
    count = len(layers)
    for period in range(1, count // 2 + 1):
        if all(layers[index] == layers[index % period] for index in range(count)):
            repeats = count // period
            whole = LayerGroup(tuple(layers[:period]), 0, repeats)
            remainder = tuple(layers[period * repeats :])
            return (whole, LayerGroup(remainder, period * repeats, 1)) if remainder else (whole,)
    groups, first = [], 0
    for index in range(1, count + 1):
        if index == count or layers[index] != layers[first]:
            groups.append(LayerGroup((layers[first],), first, index - first))
            first = index
    return tuple(groups)
