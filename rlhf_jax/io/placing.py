"""From named tensors to parameters on their shards, tensor by tensor.

Host memory above the model: one shard of one stacked parameter, and READ_NUMBERS numbers of one tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.io.layout import Layout, Window, parse
from rlhf_jax.io.tensors import Tensors, listed, wrong_kinds
from rlhf_jax.models import ModelConfig
from rlhf_jax.models.families import DERIVED_TENSORS, FAMILIES, Weight, dimensions, weights_of
from rlhf_jax.types import Params

READ_NUMBERS = 2**23
"""Most numbers of a tensor that one read takes (32 MiB of float32); a row is read whole, however long."""


def check_tensors(tensors: Tensors, config: ModelConfig) -> None:
    """Raises InputError listing every tensor that is missing, extra, of another shape, or of a dtype that is not read.

    config: of the checkpoint. Two kinds of extra tensors are let through: buffers of old transformers, and a copy of tied
    embeddings as output head, which has to equal them.
    """
    sizes = dimensions(config)
    expected: dict[str, tuple[int, ...]] = {}
    wrong = []
    for weight in weights_of(config):
        for name in names_of(weight, config):
            if name in tensors.stored or not weight.zero_when_absent:
                expected[name] = parse(weight.layout, weight.part).their_shape(sizes)
    stored = tensors.stored
    if missing := sorted(expected.keys() - stored.keys()):
        wrong.append(f"missing: {listed(missing)}")
    extra = sorted(name for name in stored.keys() - expected.keys() if not re.fullmatch(DERIVED_TENSORS, name))
    head = _their_name(FAMILIES[config.family].weights, "lm_head/kernel")
    if head in extra and config.has_lm and _equals_the_embeddings(tensors, config, head):
        extra.remove(head)
    if extra:
        wrong.append(f"not of this architecture: {listed(extra)}")
    wrong += wrong_kinds(tensors, expected)
    if wrong:
        raise InputError(f"{tensors.where}: tensors {'; '.join(wrong)}")


def with_base_names(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Tensors of a bare trunk (GPT-2's own files: ``h.0.ln_1.weight``) under the names that they have in a model."""
    prefix = FAMILIES[config.family].prefix
    if any(name.startswith(prefix) for name in tensors.stored):
        return tensors
    ours = {prefix + name for name in tensors.stored} & {n for w in weights_of(config) for n in names_of(w, config)}
    ours |= {prefix + name for name in tensors.stored if re.fullmatch(DERIVED_TENSORS, prefix + name)}
    stored = {prefix + n if prefix + n in ours else n: where for n, where in tensors.stored.items()}

    def read(name: str, window: Window) -> np.ndarray:
        return tensors.read(name.removeprefix(prefix) if name in ours else name, window)

    return dataclasses.replace(tensors, stored=stored, read=read)


def names_of(weight: Weight, config: ModelConfig) -> list[str]:
    """The tensor names of a row in the order of the parameter's leading axes: of layers, then of experts."""
    experts = config.num_experts if "{expert}" in weight.tensor else 1
    layers = (0,) if weight.layers is None else weight.layers
    return [weight.tensor.format(layer=layer, expert=expert) for layer in layers for expert in range(experts)]


def stacked(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    """The lengths of those leading axes."""
    layers = () if weight.layers is None else (len(weight.layers),)
    return (*layers, config.num_experts) if "{expert}" in weight.tensor else layers


def place(tensors: Tensors, table: Iterable[Weight], config: ModelConfig, shardings: Params) -> Params:
    """The parameters of ``table``'s rows, in config.param_dtype, on their shards.

    shardings: one per parameter (others are ignored). Every process reads only what its own devices hold. Call
    `check_tensors` first.
    """
    params: Params = {}
    for weight in table:
        *parents, leaf = weight.parameter.split("/")
        node, at = params, shardings
        for key in parents:
            node, at = node.setdefault(key, {}), at[key]
        node[leaf] = _parameter(tensors, weight, config, at[leaf])
    return params


def _parameter(tensors: Tensors, weight: Weight, config: ModelConfig, sharding: jax.sharding.Sharding) -> jax.Array:
    """One parameter. Shards that several devices hold are read once."""
    layout, sizes, dtype = parse(weight.layout, weight.part), dimensions(config), jnp.dtype(config.param_dtype)
    shape = stacked(weight, config) + layout.our_shape(sizes)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = (part.indices(size) for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(tuple((start, stop) for start, stop, _ in bounds), []).append(device)
    pieces = []
    for bounds_of_shard, devices in holders.items():
        shard = np.zeros([stop - start for start, stop in bounds_of_shard], dtype)
        _fill(shard, tensors, (weight, config), (layout, sizes), tuple(slice(*pair) for pair in bounds_of_shard))
        for device in devices:
            # Waiting keeps the host from holding the next shard while this one is still being copied.
            pieces.append(jax.block_until_ready(jax.device_put(shard, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _fill(
    shard: np.ndarray,
    tensors: Tensors,
    which: tuple[Weight, ModelConfig],
    how: tuple[Layout, Mapping[str, int]],
    window: Window,
) -> None:
    """Write the part ``window`` of a parameter into ``shard`` (zeros until then), tensor by tensor."""
    weight, config = which
    layout, sizes = how
    axes = stacked(weight, config)
    names = np.array(names_of(weight, config), object).reshape(axes)[window[: len(axes)]]
    for place, name in np.ndenumerate(names):
        if name in tensors.stored or not weight.zero_when_absent:
            for target, source in layout.blocks(window[len(axes) :], READ_NUMBERS):
                shard[place][target] = layout.to_ours(sizes, source, functools.partial(tensors.read, name))


def _their_name(table: Iterable[Weight], ours: str) -> str:
    return next(weight.tensor for weight in table if weight.parameter == ours)


def _equals_the_embeddings(tensors: Tensors, config: ModelConfig, head: str) -> bool:
    """Whether the checkpoint's output head is a copy of its embeddings, looked at a thousand rows at a time."""
    name = _their_name(weights_of(config), "embed/embedding")
    if name not in tensors.stored or tensors.stored[name].shape != tensors.stored[head].shape:
        return False
    rows, width = tensors.stored[name].shape
    for start in range(0, rows, 1024):
        window = (slice(start, min(start + 1024, rows)), slice(0, width))
        if not np.array_equal(tensors.read(name, window), tensors.read(head, window)):
            return False
    return True
