"""Kinds of layers, their grouping into blocks, and scans that compute the same as a layer at a time."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlhf_jax.models import Model
from rlhf_jax.models.layer_kinds import LayerKind, group_layers
from rlhf_jax.testing import random_params, tiny_config

F, S, E = LayerKind(), LayerKind(window=4), LayerKind(experts=True)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([F], [([F], 0, 1)]),
        ([F] * 5, [([F], 0, 5)]),
        ([S, S, F, S, S, F, S], [([S, S, F], 0, 2), ([S], 6, 1)]),  # Gemma 3 in small
        ([F, F, F, S, S], [([F], 0, 3), ([S], 3, 2)]),  # Qwen 2 with max_window_layers
        ([F, S], [([F], 0, 1), ([S], 1, 1)]),
        ([F, E, S, F, E], [([F], 0, 1), ([E], 1, 1), ([S], 2, 1), ([F], 3, 1), ([E], 4, 1)]),
    ],
)
def test_groups_by_hand(layers, expected):
    assert [(list(group.kinds), group.first, group.repeats) for group in group_layers(layers)] == expected


def test_stacks_by_hand():
    config = tiny_config(num_layers=8, layer_pattern=("sliding", "sliding", "full"), sliding_window=4)
    assert [(path, list(layers)) for path, layers in config.layer_stacks()] == [
        ("layers/0", [0, 3]),
        ("layers/1", [1, 4]),
        ("layers/2", [2, 5]),
        ("layers/6", [6]),
        ("layers/7", [7]),
    ]
    alike = config.replace(layer_pattern=("sliding",))
    assert [(path, list(layers)) for path, layers in alike.layer_stacks()] == [("layers", list(range(8)))]


def test_parameters_are_stacked_like_layer_stacks():
    model = Model(tiny_config(num_layers=5, layer_pattern=("sliding", "full"), sliding_window=4))
    layers = model.abstract()["layers"]
    assert {name: stack["mlp"]["up"]["kernel"].shape[0] for name, stack in layers.items()} == {"0": 2, "1": 2, "4": 1}
    assert model.logical_axes()["layers"]["4"]["mlp"]["up"]["kernel"] == ("layers", "embed", "mlp")


def test_equivalent_kinds_of_layers_give_equal_logits():
    """The same weights in one stack, and in a block of two kinds of layers that compute the same: a window longer than the rows."""
    one = Model(tiny_config(num_layers=5))
    other = Model(tiny_config(num_layers=5, layer_pattern=("full", "sliding"), sliding_window=1000))
    params = random_params(one, 0)
    stacks = {
        path.removeprefix("layers/"): jax.tree.map(lambda leaf, layers=layers: leaf[list(layers)], params["layers"])
        for path, layers in other.config.layer_stacks()
    }
    tokens = np.random.default_rng(0).integers(3, 60, (2, 7)).astype(np.int32)
    first = jax.jit(one.apply)(params, tokens)
    np.testing.assert_allclose(jax.jit(other.apply)(params | {"layers": stacks}, tokens), first, rtol=1e-5, atol=1e-5)
