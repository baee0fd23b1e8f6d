"""Reading of named tensors into sharded parameters, tensor by tensor.

Host memory beyond the model: one shard of one stacked parameter, and READ_NUMBERS numbers of one tensor.

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
from rlhf_jax.io.tensors import Tensors, describe_mismatches, join_names
from rlhf_jax.models import ModelConfig
from rlhf_jax.models.families import DERIVED_TENSORS, FAMILIES, Weight, dimensions, weights_of
from rlhf_jax.types import Params

READ_NUMBERS = 2**23
"""Maximum of numbers in one read of a tensor (32 MiB of float32); a row is never divided."""


def check_tensors(tensors: Tensors, config: ModelConfig) -> None:
    """Check names, shapes and dtypes of a checkpoint's tensors. Raises InputError that lists all problems.

    config: of the checkpoint. Two kinds of extra tensors are allowed: buffers of old transformers, and a copy of tied
    embeddings as output head, which has to equal them.

    """
    sizes = dimensions(config)
    expected: dict[str, tuple[int, ...]] = {}
    wrong = []
    for weight in weights_of(config):
        for name in tensor_names(weight, config):
            if name in tensors.stored or not weight.zero_when_absent:
                expected[name] = parse(weight.layout, weight.part).stored_shape(sizes)
    stored = tensors.stored
    if missing := sorted(expected.keys() - stored.keys()):
        wrong.append(f"missing: {join_names(missing)}")
    extra = sorted(name for name in stored.keys() - expected.keys() if not re.fullmatch(DERIVED_TENSORS, name))
    head = _tensor_name(FAMILIES[config.family].weights, "lm_head/kernel")
    if head in extra and config.has_lm and _equals_embeddings(tensors, config, head):
        extra.remove(head)
    if extra:
        wrong.append(f"not of this architecture: {join_names(extra)}")
    wrong += describe_mismatches(tensors, expected)
    if wrong:
        raise InputError(f"{tensors.where}: tensors {'; '.join(wrong)}")


def add_name_prefix(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Return the tensors of a bare trunk (GPT-2's own files: ``h.0.ln_1.weight``) under their names in a language model."""
    prefix = FAMILIES[config.family].prefix
    if any(name.startswith(prefix) for name in tensors.stored):
        return tensors
    prefixed = {prefix + name for name in tensors.stored} & {
        n for w in weights_of(config) for n in tensor_names(w, config)
    }
    prefixed |= {prefix + name for name in tensors.stored if re.fullmatch(DERIVED_TENSORS, prefix + name)}
    stored = {prefix + n if prefix + n in prefixed else n: where for n, where in tensors.stored.items()}

    def read(name: str, window: Window) -> np.ndarray:
        return tensors.read(name.removeprefix(prefix) if name in prefixed else name, window)

    return dataclasses.replace(tensors, stored=stored, read=read)


def tensor_names(weight: Weight, config: ModelConfig) -> list[str]:
    """Return the tensor names of a row in the order of the parameter's leading axes: layers, then experts."""
    experts = config.num_experts if "{expert}" in weight.tensor else 1
    layers = (0,) if weight.layers is None else weight.layers
    return [weight.tensor.format(layer=layer, expert=expert) for layer in layers for expert in range(experts)]


def leading_shape(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    """Return the lengths of those leading axes."""
    layers = () if weight.layers is None else (len(weight.layers),)
    return (*layers, config.num_experts) if "{expert}" in weight.tensor else layers


def load_weights(tensors: Tensors, table: Iterable[Weight], config: ModelConfig, shardings: Params) -> Params:
    """Read the parameters of ``table``'s rows onto their shards, in config.param_dtype.

    shardings: of every parameter of the table (others are ignored). Every process reads only the shards of its own devices.
    Call `check_tensors` first.

    """
    params: Params = {}
    for weight in table:
        *parents, leaf = weight.parameter.split("/")
        node, sharding_node = params, shardings
        for key in parents:
            node, sharding_node = node.setdefault(key, {}), sharding_node[key]
        node[leaf] = _read_parameter(tensors, weight, config, sharding_node[leaf])
    return params


def _read_parameter(
    tensors: Tensors, weight: Weight, config: ModelConfig, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Read one parameter. Shards that several devices hold are read once."""
    layout, sizes, dtype = parse(weight.layout, weight.part), dimensions(config), jnp.dtype(config.param_dtype)
    shape = leading_shape(weight, config) + layout.parameter_shape(sizes)
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
    row: tuple[Weight, ModelConfig],
    conversion: tuple[Layout, Mapping[str, int]],
    window: Window,
) -> None:
    """Write the part ``window`` of a parameter into ``shard`` (zeros until then), tensor by tensor."""
    weight, config = row
    layout, sizes = conversion
    axes = leading_shape(weight, config)
    names = np.array(tensor_names(weight, config), object).reshape(axes)[window[: len(axes)]]
    for index, name in np.ndenumerate(names):
        if name in tensors.stored or not weight.zero_when_absent:
            for target, source in layout.blocks(window[len(axes) :], READ_NUMBERS):
                shard[index][target] = layout.read_parameter(sizes, source, functools.partial(tensors.read, name))


def _tensor_name(table: Iterable[Weight], path: str) -> str:
    return next(weight.tensor for weight in table if weight.parameter == path)


def _equals_embeddings(tensors: Tensors, config: ModelConfig, head: str) -> bool:
    """Return whether the checkpoint's output head is a copy of its embeddings, comparing 1024 rows at a time."""
    name = _tensor_name(weights_of(config), "embed/embedding")
    if name not in tensors.stored or tensors.stored[name].shape != tensors.stored[head].shape:
        return False
    rows, width = tensors.stored[name].shape
    for start in range(0, rows, 1024):
        window = (slice(start, min(start + 1024, rows)), slice(0, width))
        if not np.array_equal(tensors.read(name, window), tensors.read(head, window)):
            return False
    return True
