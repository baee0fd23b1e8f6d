"""The decoder transformer as one Flax NNX module.

Only `models.model` sees this module; everyone else sees a `Model` and a plain dict of arrays. Letters in shapes: B rows,
S columns, D hidden size, G key/value heads, K head_dim, V vocabulary, L layers.
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
from rlhf_jax.models.cache import KVCache, restored, stored
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
    """One layer by itself: its kind, graph definition and weights."""

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
            path: _stacked(config, config.layer(layers[0]), len(layers), rngs) for path, layers in config.layer_stacks()
        }
        if lora is not None:
            named = {name for stack in stacks.values() for name in add_adapters(stack, config, lora, rngs, dropout)}
            check_lora_targets(lora, named)
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
        """For a mesh that splits columns: `Kernel.keep_columns` of every matrix, and of the logits."""
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
        """For each scan: the kinds of its block, graph definitions and stacked weights of each place, layer numbers
        [repeats, places]."""
        found = []
        for group in self._config.layer_groups():
            stacks = group.stacks()
            blocks = [self.layers if isinstance(self.layers, Block) else self.layers[str(s.start)] for s in stacks]
            definitions, weights = zip(*(nnx.split(block) for block in blocks), strict=True)
            numbers = jnp.asarray([list(stack) for stack in stacks], jnp.int32).T
            found.append((group.kinds, list(definitions), list(weights), numbers))
        return found

    def hidden(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        segment_ids: Int32[Array, "B S"],
        constrain: Constrain,
        keep: Sequence[int] = (),
    ) -> tuple[Float[Array, "B S D"], list[Any], Routing | None]:
        """Final hidden states, (keys, values) of the last columns, and the routing of the layers with experts, stacked
        [layers, ...] (None without experts). keep: how many columns of keys and values; (S,): of every layer
        [L, B, G, S, K]; (S, W): W of the layers that slide, which then come second."""
        windows = {self._config.layer(index).window for index in range(self._config.num_layers)}
        attends = {window: self_attention(self._config, constrain, segment_ids, window) for window in windows}
        x, routings = self._embed(tokens, positions, constrain), []
        kept: list[list[Any]] = [[] for _ in keep]

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

            return _recomputed(block, self._config)

        for kinds, definitions, weights, _ in self._groups():
            runs = [run(definition, kind) for definition, kind in zip(definitions, kinds, strict=True)]

            def body(x: Array, weights: list[Any], runs: Any = runs) -> tuple[Array, Any]:
                found = []
                for block, layer in zip(runs, weights, strict=True):
                    x, one = block(x, layer)
                    found.append(one)
                return x, found

            x, found = jax.lax.scan(body, x, weights)
            for number in range(len(keep)):
                places = [one for (one, _), kind in zip(found, kinds, strict=True) if part(kind) == number]
                kept[number] += [_interleaved(places)] if places else []
            routings += [routing for _, routing in found if routing is not None]
        routed = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings) if routings else None
        return (
            self.final_norm(x),
            [_concatenated(groups) if groups else _nothing(self._config, x) for groups in kept],
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
        """More columns for every row, one or several (one, when the cache has a ring, `KVCache.recent`). mask: which of them
        hold a token (None: all). The cache travels in the carry of the layer scan and is updated in place."""
        known, zero = _positions_with(cache, positions, mask), jnp.zeros((), jnp.int32)
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

                    def written(stack: Array, column: Array, where: Any = where) -> Array:
                        return jax.lax.dynamic_update_slice(stack, column[None], where)

                    def seen(stack: Any, index: Any = index) -> Array:
                        kept = jax.tree.map(functools.partial(_one_of, index=index), stack)
                        return restored(kept, self._config.dtype)

                    keys = jax.tree.map(written, keys, stored(key, cache.storage))
                    values = jax.tree.map(written, values, stored(value, cache.storage))
                    over_cache = self._over_cache(known[part], positions, kind.window)
                    x, _ = block(x, query, seen(keys), seen(values), over_cache, constrain)
                    stacks[part] = (keys, values)
                return (x, stacks), None

            carry, _ = jax.lax.scan(body, carry, (numbers, weights))
        x, stacks = carry
        parts = [(*stack, positions) for stack, positions in zip(stacks, known, strict=True)]
        return self.final_norm(x), cache.after(tokens.shape[1], parts)

    def _places(self, cache: KVCache) -> list[int]:
        """The place of each layer in the stack of its part of the cache."""
        parts = [_part_of(cache, self._config.layer(index)) for index in range(self._config.num_layers)]
        return [parts[:index].count(part) for index, part in enumerate(parts)]

    def _over_cache(self, known: Int32[Array, "B C"], positions: Int32[Array, "B S"], window: int | None) -> Attend:
        """Attention of the tokens at ``positions`` to the cached ones at ``known`` (-1: none) that are not behind them."""
        config = self._config
        cached, own = known[:, None, :], positions[:, :, None]
        seen = cached >= 0
        if positions.shape[1] > 1:  # a single token is the last one that there is
            seen = seen & (cached <= own)
        if window is not None:
            seen = seen & (cached > own - window)
        return functools.partial(
            attend,
            mask=seen,
            precision=precision_of(config),
            scale=config.attention_scale,
            cap=config.attention_soft_cap,
        )

    def separate_layers(self) -> list[SeparateLayer]:
        """Every layer with weights of its own, turned for products with few rows (`weights.weights_first`)."""
        layers = []
        for kinds, definitions, weights, numbers in self._groups():
            for repeat, place in itertools.product(range(numbers.shape[0]), range(len(kinds))):
                one = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], weights[place])
                block = nnx.merge(definitions[place], one)
                for _, part in nnx.iter_modules(block):
                    if isinstance(part, Kernel):
                        part.turn()
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
        """As `decode`, layer after layer without a loop: nothing is sliced from a stack, and each layer updates a cache of
        its own (`KVCache.separated`)."""
        known, x = _positions_with(cache, positions, None), self._embed(tokens, positions, constrain)
        stacks = [(list(part.keys), list(part.values)) for part in cache.parts]
        for index, layer in zip(self._places(cache), layers, strict=True):
            part, block = _part_of(cache, layer.kind), nnx.merge(layer.definition, layer.weights)
            keys, values = stacks[part]
            query, key, value = block.read(x, positions)

            def written(stack: Array, column: Array, part: int = part) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(stack, column, cache.parts[part].index, axis=2)

            keys[index] = jax.tree.map(written, keys[index], stored(key, cache.storage))
            values[index] = jax.tree.map(written, values[index], stored(value, cache.storage))
            seen_keys, seen_values = (restored(stack, self._config.dtype) for stack in (keys[index], values[index]))
            over_cache = self._over_cache(known[part], positions, layer.kind.window)
            x, _ = block(x, query, seen_keys, seen_values, over_cache, constrain)
        parts = [(tuple(keys), tuple(values), held) for (keys, values), held in zip(stacks, known, strict=True)]
        return self.final_norm(x), cache.after(1, parts)

    def logits(
        self, hidden: Float[Array, "B S D"], constrain: Constrain, *, few_rows: bool = False
    ) -> Float[Array, "B S V"]:
        """Float32 logits, over rows as in `Kernel`. few_rows: with a tied table as the left operand (`weights_first`)."""
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
    """Which of the cache's `parts` holds a layer of this kind."""
    return int(cache.recent is not None and kind.window is not None)


def _positions_with(cache: KVCache, positions: Int32[Array, "B S"], mask: Bool[Array, "B S"] | None) -> list[Array]:
    """Of each part of the cache, with those of new columns written."""
    held = positions if mask is None else jnp.where(mask, positions, -1)
    return [jax.lax.dynamic_update_slice_in_dim(part.positions, held, part.index, axis=1) for part in cache.parts]


def _one_of(stack: Array, index: Array) -> Array:
    """stack[index]."""
    one: Array = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
    return one


def _recomputed(block: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """``block`` with what `ModelConfig.remat` wants of its backward pass."""
    if not config.remat:
        return block
    # A product with weights has no batch axes; those of attention have. Splash attention keeps its own two results.
    products = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(splash.RESIDUALS),
    )
    return jax.checkpoint(block, prevent_cse=False, policy=products if config.remat == "cheap" else None)


def _stacked(config: ModelConfig, kind: LayerKind, count: int, rngs: nnx.Rngs) -> Block:
    """``count`` blocks of one kind, every parameter with a leading axis for them."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def blocks(rngs: nnx.Rngs) -> Block:
        return Block(config, kind, rngs=rngs)

    made: Block = blocks(rngs)
    return made


def _quantize(config: ModelConfig, stacks: Iterable[Block]) -> None:
    """Every matrix of the layers as int8. Raises InputError for experts, whose products are grouped."""
    if config.num_experts:
        raise InputError(
            "LoraConfig.base_dtype = 'int8': the matrices of experts are not quantised; leave it out for this model"
        )
    for stack in stacks:
        for _, part in nnx.iter_modules(stack):
            if isinstance(part, Kernel):
                part.quantize()


def _interleaved(places: list[Any]) -> Any:
    """Arrays [repeats, ...] of each place of a block as one tree [repeats * places, ...] in the order of the layers."""
    if len(places) == 1:
        return places[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *places)


def _nothing(config: ModelConfig, x: Float[Array, "B S D"]) -> tuple[Array, Array]:
    """Keys and values of no layers."""
    shape = (0, x.shape[0], config.num_kv_heads, x.shape[1], config.head_dim)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def _concatenated(groups: list[Any]) -> Any:
    return groups[0] if len(groups) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups)
