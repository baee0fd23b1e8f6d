"""The decoder transformer as one Flax NNX module.

Only `models.model` uses this module; all other code uses a `Model` and a plain dict of arrays. Letters in shapes: B
rows, S columns, D hidden size, G key/value heads, K head_dim, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax.errors import InputError
from rlhf_jax.models import splash
from rlhf_jax.models.attention import Attend, attend, self_attention
from rlhf_jax.models.cache import KVCache, from_storage, to_storage
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.layer_kinds import LayerKind
from rlhf_jax.models.layout import Constrain
from rlhf_jax.models.lookup import look_up
from rlhf_jax.models.lora import LoraConfig, add_adapters, check_lora_targets
from rlhf_jax.models.moe import Routing
from rlhf_jax.models.parts import Block, Embedding, ScalarHead, hidden_norm
from rlhf_jax.models.weights import Kernel, precision_of, soft_cap, weights_first

_RESIDUAL = ("act_batch", "act_length", "act_embed")


class SeparateLayer(NamedTuple):
    """A single layer that is not stacked: its kind, graph definition and weights."""

    kind: LayerKind
    definition: Any
    weights: Any


class Decoder(nnx.Module):
    """Token table, L blocks, final norm, heads.

    Blocks of one kind are stacked and run by one scan; layers that differ in kind are scanned as a repeating block plus
    remainder (`ModelConfig.layer_groups`), each place of the block with a stack of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        lora: LoraConfig | None = None,
        *,
        dropout: bool = False,
        int8: bool = False,
        rngs: nnx.Rngs,
    ):
        self.embed = Embedding(config, config.vocab_size, "vocab", rngs=rngs)
        if config.positions == "learned":
            self.position_embed = Embedding(config, config.max_length, "positions", rngs=rngs)
        stacks = {
            path: _stack_blocks(config, config.layer(layers[0]), len(layers), rngs)
            for path, layers in config.layer_stacks()
        }
        if lora is not None:
            names = {name for stack in stacks.values() for name in add_adapters(stack, config, lora, rngs, dropout)}
            check_lora_targets(lora, names)
        if int8:
            _quantize(config, stacks.values())
        by_first = {path.removeprefix("layers/"): stack for path, stack in stacks.items()}
        self.layers: Block | nnx.Dict[Block] = by_first["layers"] if "layers" in by_first else nnx.Dict(by_first)
        self.final_norm = hidden_norm(config)
        if config.has_lm and not config.tie_embeddings:
            axes = ("embed_table", "vocab")
            self.lm_head = Kernel(config, (config.hidden_size, config.vocab_size), axes, rngs=rngs)
        if config.has_scalar:
            self.scalar_head = ScalarHead(config, rngs=rngs)
        self._config, self._columns_apart = config, False

    def keep_columns(self) -> None:
        """Keep rows and columns of [B, S, ...] separate in every matrix and in the logits, for a mesh that splits columns."""
        self._columns_apart = True
        for _, part in nnx.iter_modules(self):
            if isinstance(part, Kernel):
                part.keep_columns()

    def _embed(
        self, tokens: Int32[Array, "B S"], positions: Int32[Array, "B S"], constrain: Constrain
    ) -> Float[Array, "B S D"]:
        config = self._config
        rows = look_up(self.embed.embedding[...], tokens, config.dtype, constrain)
        if config.scale_embeddings:
            rows = rows * jnp.asarray(config.hidden_size**0.5, config.dtype)  # rounded first, as the reference does
        if config.positions == "learned":
            table = self.position_embed.embedding[...]
            rows = rows + jnp.take(table, positions, axis=0, mode="clip").astype(config.dtype)
        return constrain(rows, _RESIDUAL)

    def _groups(self) -> list[tuple[tuple[LayerKind, ...], list[Any], list[Any], Array]]:
        """Return the parts of each scan.

        The parts: kinds of the block, graph definitions and stacked weights of each place, layer numbers [repeats,
        places].
        """
        scans = []
        for group in self._config.layer_groups():
            stacks = group.stacks()
            blocks = [self.layers if isinstance(self.layers, Block) else self.layers[str(s.start)] for s in stacks]
            definitions, weights = zip(*(nnx.split(block) for block in blocks), strict=True)
            numbers = jnp.asarray([list(stack) for stack in stacks], jnp.int32).T
            scans.append((group.kinds, list(definitions), list(weights), numbers))
        return scans

    def hidden(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        segment_ids: Int32[Array, "B S"],
        constrain: Constrain,
        keep: Sequence[int] = (),
    ) -> tuple[Float[Array, "B S D"], list[Any], Routing | None]:
        """Return final hidden states, (keys, values) of the last columns, and the routing of the layers with experts.

        keep: how many columns of keys and values to return; (): none; (S,): of every layer [L, B, G, S, K]; (S, W): the
        sliding-window layers return W columns in a second pair. The routing is stacked [layers, ...], None without
        experts.
        """
        windows = {self._config.layer(index).window for index in range(self._config.num_layers)}
        attends = {window: self_attention(self._config, constrain, segment_ids, window) for window in windows}
        x, routings = self._embed(tokens, positions, constrain), []
        kv_groups: list[list[Any]] = [[] for _ in keep]

        def part(kind: LayerKind) -> int:
            return int(len(keep) > 1 and kind.window is not None)

        def last(key: Array, value: Array, kind: LayerKind) -> tuple[Array, Array]:
            first = max(0, key.shape[2] - keep[part(kind)])
            return key[:, :, first:], value[:, :, first:]

        def run(definition: Any, kind: LayerKind) -> Callable[[Array, Any], tuple[Array, Any]]:
            def block(x: Array, weights: Any) -> tuple[Array, Any]:
                layer = nnx.merge(definition, weights)
                query, key, value = layer.read(x, positions)
                x, routing = layer(x, query, key, value, attends[kind.window], constrain)
                return constrain(x, _RESIDUAL), (last(key, value, kind) if keep else None, routing)

            return _checkpoint(block, self._config)

        for kinds, definitions, weights, _ in self._groups():
            runs = [run(definition, kind) for definition, kind in zip(definitions, kinds, strict=True)]

            def body(x: Array, weights: list[Any], runs: Any = runs) -> tuple[Array, Any]:
                results = []
                for block, layer in zip(runs, weights, strict=True):
                    x, result = block(x, layer)
                    results.append(result)
                return x, results

            x, results = jax.lax.scan(body, x, weights)
            for number in range(len(keep)):
                places = [result for (result, _), kind in zip(results, kinds, strict=True) if part(kind) == number]
                kv_groups[number] += [_interleave(places)] if places else []
            routings += [routing for _, routing in results if routing is not None]
        routed = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings) if routings else None
        return (
            self.final_norm(x),
            [_concatenate(groups) if groups else _empty_keys_values(self._config, x) for groups in kv_groups],
            routed,
        )

    def decode(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        cache: KVCache,
        constrain: Constrain,
        mask: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Read more columns of every row, one or several (only one when the cache has a ring, `KVCache.recent`).

        mask: which of them hold a token (None: all). The cache is part of the carry of the layer scan and is updated in
        place.
        """
        cached_positions, zero = _positions_with(cache, positions, mask), jnp.zeros((), jnp.int32)
        places = jnp.asarray(self._places(cache), jnp.int32)

        carry = (self._embed(tokens, positions, constrain), [(part.keys, part.values) for part in cache.parts])
        for kinds, definitions, weights, numbers in self._groups():

            def body(
                carry: tuple[Array, list[Any]], scanned: Any, kinds: Any = kinds, definitions: Any = definitions
            ) -> tuple[tuple[Array, list[Any]], None]:
                x, stacks = carry
                stacks = list(stacks)
                layer_numbers, layers = scanned
                for place, (kind, definition, layer) in enumerate(zip(kinds, definitions, layers, strict=True)):
                    block, part = nnx.merge(definition, layer), _part_of(cache, kind)
                    index, (keys, values) = places[layer_numbers[place]], stacks[part]
                    query, key, value = block.read(x, positions)
                    where = (index, zero, zero, cache.parts[part].index, zero)

                    def write_column(stack: Array, column: Array, where: Any = where) -> Array:
                        return jax.lax.dynamic_update_slice(stack, column[None], where)

                    def read_layer(stack: Any, index: Any = index) -> Array:
                        layer_values = jax.tree.map(functools.partial(_layer_at, index=index), stack)
                        return from_storage(layer_values, self._config.dtype)

                    keys = jax.tree.map(write_column, keys, to_storage(key, cache.storage))
                    values = jax.tree.map(write_column, values, to_storage(value, cache.storage))
                    over_cache = self._cache_attention(cached_positions[part], positions, kind.window)
                    x, _ = block(x, query, read_layer(keys), read_layer(values), over_cache, constrain)
                    stacks[part] = (keys, values)
                return (x, stacks), None

            carry, _ = jax.lax.scan(body, carry, (numbers, weights))
        x, stacks = carry
        parts = [(*stack, positions) for stack, positions in zip(stacks, cached_positions, strict=True)]
        return self.final_norm(x), cache.advance(tokens.shape[1], parts)

    def _places(self, cache: KVCache) -> list[int]:
        """Return the index of each layer in the stack of its part of the cache."""
        parts = [_part_of(cache, self._config.layer(index)) for index in range(self._config.num_layers)]
        return [parts[:index].count(part) for index, part in enumerate(parts)]

    def _cache_attention(
        self, cached_positions: Int32[Array, "B C"], positions: Int32[Array, "B S"], window: int | None
    ) -> Attend:
        """Return attention of the tokens at ``positions`` to the cached tokens that do not come after them.

        cached_positions: -1 for an empty column.
        """
        config = self._config
        cached, own = cached_positions[:, None, :], positions[:, :, None]
        mask = cached >= 0
        if positions.shape[1] > 1:  # a single token is the last one that there is
            mask = mask & (cached <= own)
        if window is not None:
            mask = mask & (cached > own - window)
        return functools.partial(
            attend,
            mask=mask,
            precision=precision_of(config),
            scale=config.attention_scale,
            cap=config.attention_soft_cap,
        )

    def separate_layers(self) -> list[SeparateLayer]:
        """Return every layer with its own weights, transposed for products with few rows (`weights.weights_first`)."""
        layers = []
        for kinds, definitions, weights, numbers in self._groups():
            for repeat, place in itertools.product(range(numbers.shape[0]), range(len(kinds))):
                layer_weights = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], weights[place])
                block = nnx.merge(definitions[place], layer_weights)
                for _, part in nnx.iter_modules(block):
                    if isinstance(part, Kernel):
                        part.transpose_kernel()
                layers.append(SeparateLayer(kinds[place], *nnx.split(block)))
        return layers

    def decode_separately(
        self,
        tokens: Int32[Array, "B 1"],
        positions: Int32[Array, "B 1"],
        cache: KVCache,
        layers: list[SeparateLayer],
        constrain: Constrain,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """Read one more token of every row like `decode`, but layer after layer without a scan.

        No slices of a stack are made, and each layer updates a cache array of its own (`KVCache.separate_layers`).
        """
        cached_positions, x = _positions_with(cache, positions, None), self._embed(tokens, positions, constrain)
        stacks = [(list(part.keys), list(part.values)) for part in cache.parts]
        for index, layer in zip(self._places(cache), layers, strict=True):
            part, block = _part_of(cache, layer.kind), nnx.merge(layer.definition, layer.weights)
            keys, values = stacks[part]
            query, key, value = block.read(x, positions)

            def write_column(stack: Array, column: Array, part: int = part) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(stack, column, cache.parts[part].index, axis=2)

            keys[index] = jax.tree.map(write_column, keys[index], to_storage(key, cache.storage))
            values[index] = jax.tree.map(write_column, values[index], to_storage(value, cache.storage))
            layer_keys, layer_values = (
                from_storage(stack, self._config.dtype) for stack in (keys[index], values[index])
            )
            over_cache = self._cache_attention(cached_positions[part], positions, layer.kind.window)
            x, _ = block(x, query, layer_keys, layer_values, over_cache, constrain)
        parts = [
            (tuple(keys), tuple(values), part_positions)
            for (keys, values), part_positions in zip(stacks, cached_positions, strict=True)
        ]
        return self.final_norm(x), cache.advance(1, parts)

    def logits(
        self, hidden: Float[Array, "B S D"], constrain: Constrain, *, few_rows: bool = False
    ) -> Float[Array, "B S V"]:
        """Return float32 logits, computed over rows as in `Kernel`.

        few_rows: with a tied table as the left operand (`weights_first`).
        """
        tied = self._config.tie_embeddings
        table = self.embed.embedding[...] if tied else self.lm_head.kernel[...]
        rows, table = hidden.reshape(-1, hidden.shape[-1]), table.astype(self._config.dtype)
        precision = precision_of(self._config)
        if few_rows and tied:
            out = weights_first("nd,dv->nv", rows, table, inputs=1, precision=precision, result=jnp.float32)
        else:
            equation = "nd,vd->nv" if tied else "nd,dv->nv"
            if self._columns_apart:
                rows, equation = hidden, equation.replace("n", "bs")
            out = jnp.einsum(equation, rows, table, precision=precision, preferred_element_type=jnp.float32)
        return constrain(
            soft_cap(out, self._config.logit_soft_cap).reshape(*hidden.shape[:2], -1),
            ("act_batch", "act_length", "act_vocab"),
        )


def _part_of(cache: KVCache, kind: LayerKind) -> int:
    """Return the index of the cache's part (`KVCache.parts`) that holds a layer of this kind."""
    return int(cache.recent is not None and kind.window is not None)


def _positions_with(cache: KVCache, positions: Int32[Array, "B S"], mask: Bool[Array, "B S"] | None) -> list[Array]:
    """Return the positions of each part of the cache with those of the new columns written."""
    new_positions = positions if mask is None else jnp.where(mask, positions, -1)
    return [
        jax.lax.dynamic_update_slice_in_dim(part.positions, new_positions, part.index, axis=1) for part in cache.parts
    ]


def _layer_at(stack: Array, index: Array) -> Array:
    """Return stack[index]."""
    layer: Array = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
    return layer


def _checkpoint(block: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """Return ``block`` with the rematerialization of `ModelConfig.remat`."""
    if not config.remat:
        return block
    # Products with weights have no batch axes, those of attention do. Splash attention names its two results itself.
    products = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(splash.RESIDUALS),
    )
    return jax.checkpoint(block, prevent_cse=False, policy=products if config.remat == "cheap" else None)


def _stack_blocks(config: ModelConfig, kind: LayerKind, count: int, rngs: nnx.Rngs) -> Block:
    """Return ``count`` blocks of one kind, every parameter with a leading axis for them."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def blocks(rngs: nnx.Rngs) -> Block:
        return Block(config, kind, rngs=rngs)

    stack: Block = blocks(rngs)
    return stack


def _quantize(config: ModelConfig, stacks: Iterable[Block]) -> None:
    """Make every matrix of the layers int8. Raises InputError for experts, whose products are grouped."""
    if config.num_experts:
        raise InputError(
            "LoraConfig.base_dtype = 'int8': the matrices of experts are not quantised; leave it out for this model"
        )
    for stack in stacks:
        for _, part in nnx.iter_modules(stack):
            if isinstance(part, Kernel):
                part.quantize()


def _interleave(places: list[Any]) -> Any:
    """Return the arrays [repeats, ...] of each place of a block as one tree [repeats * places, ...] in the order of the layers."""
    if len(places) == 1:
        return places[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *places)


def _empty_keys_values(config: ModelConfig, x: Float[Array, "B S D"]) -> tuple[Array, Array]:
    """Return keys and values of zero layers."""
    shape = (0, x.shape[0], config.num_kv_heads, x.shape[1], config.head_dim)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def _concatenate(groups: list[Any]) -> Any:
    return groups[0] if len(groups) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups)
