"""`Model`: a static description plus pure functions of (params, inputs). Params are a plain nested dict of arrays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from rlhf_jax.errors import InputError
from rlhf_jax.models import folding, int8, lora
from rlhf_jax.models.cache import KVCache, Storage, ring_of, to_storage
from rlhf_jax.models.config import Head, ModelConfig
from rlhf_jax.models.decoder import Decoder, SeparateLayer
from rlhf_jax.models.folding import Fold
from rlhf_jax.models.layout import Constrain, unconstrained
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.moe import Routing, load_balancing_loss
from rlhf_jax.models.weights import Matrix
from rlhf_jax.types import Params, Rng

nnx.use_eager_sharding(False)  # shardings come from jit's out_shardings; logical names are only labels


@functools.lru_cache(maxsize=64)
def _abstract(
    config: ModelConfig,
    lora: LoraConfig | None = None,
    dropout: bool = False,
    int8: bool = False,
    columns_apart: bool = False,
) -> tuple[Any, Any]:
    module = nnx.eval_shape(lambda: Decoder(config, lora, dropout=dropout, int8=int8, rngs=nnx.Rngs(0)))
    if columns_apart:
        module.keep_columns()
    return nnx.split(module, nnx.Param)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder transformer. Hashable and without arrays: pass it to jitted functions by closure or as a static argument.

    config: the architecture. constrain: the sharding of activations over a mesh (`parallel.ActivationConstraint`).
    lora: adapters beside the matrices (`models.lora`). int8: the matrices of the layers are int8 (`models.int8`).
    fold: how rows of different lengths are combined before reading (`models.folding`), None: not combined.
    """

    config: ModelConfig
    constrain: Constrain = unconstrained
    lora: LoraConfig | None = None
    int8: bool = False
    fold: Fold | None = None

    def with_head(self, head: Head) -> Model:
        """Return the model with the same trunk and another head."""
        return dataclasses.replace(self, config=self.config.replace(head=head))

    def folded(self, fold: Fold | None) -> Model:
        """Return the same model with another ``fold``."""
        return dataclasses.replace(self, fold=fold)

    def abstract(self) -> Params:
        """Return the parameters as ShapeDtypeStructs."""
        return nnx.to_pure_dict(_abstract(self.config, self.lora, int8=self.int8)[1])

    def logical_axes(self) -> Params:
        """Return the logical axis names of each parameter: a tree like the parameters with a tuple of names per leaf."""
        specs = nnx.to_pure_dict(nnx.get_partition_spec(_abstract(self.config, self.lora, int8=self.int8)[1]))
        axes: Params = jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
        return axes

    def matrices(self) -> Params:
        """Return which parameters are matrices (`models.weights.Matrix`): a tree like the parameters with a bool per leaf."""
        state = _abstract(self.config, self.lora, int8=self.int8)[1]
        flags = {path: isinstance(leaf, Matrix) for path, leaf in nnx.to_flat_state(state)}
        return dict(nnx.traversals.unflatten_mapping(flags))

    def init(self, rng: Rng) -> Params:
        """Return randomly initialized parameters (`models.weights` and `models.parts` give the distributions)."""
        module = Decoder(self.config, self.lora, rngs=nnx.Rngs(params=rng))
        params: Params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return int8.quantized_tree(params, self.abstract()) if self.int8 else params

    def _module(self, params: Params) -> Decoder:
        """Return the network over ``params``: a tree with adapters, with dropout keys, or the base alone."""
        adapted = next(lora.adapted_kernels(params), None)
        adapters = None if adapted is None else self.lora
        dropout = adapted is not None and lora.DROPOUT_KEY in adapted[1]
        columns_apart = self.constrain.parts("act_length") > 1
        module: Decoder = nnx.merge(_abstract(self.config, adapters, dropout, self.int8, columns_apart)[0], params)
        return module

    def hidden(
        self,
        params: Params,
        tokens: Int32[Array, "B S"],
        *,
        positions: Int32[Array, "B S"] | None = None,
        segment_ids: Int32[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Return the final hidden states in compute_dtype. Defaults: positions 0.., one segment per row."""
        positions, segment_ids = _defaults(tokens, positions, segment_ids)
        return self._read(params, tokens, positions, segment_ids)[0]

    def _read(
        self, params: Params, tokens: Array, positions: Array, segment_ids: Array
    ) -> tuple[Array, Routing | None, Array]:
        """Return (final hidden states [B, S, D], routing, mask of the columns with a token in the rows that the network read)."""
        module = self._module(params)
        if self.fold is None or self.fold.columns is None:
            hidden, _, routing = module.hidden(tokens, positions, segment_ids, self.constrain)
            return hidden, routing, segment_ids > 0
        parts = self.constrain.parts("act_batch")
        folded, place, fits = folding.fold(tokens, positions, segment_ids, self.fold.columns, parts)
        hidden, _, routing = module.hidden(*folded, self.constrain)
        return folding.unfold(hidden, place, fits, parts), routing, folded[2] > 0

    def hidden_and_router_loss(
        self,
        params: Params,
        tokens: Int32[Array, "B S"],
        *,
        positions: Int32[Array, "B S"] | None = None,
        segment_ids: Int32[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, ""]]:
        """Return `hidden` and the `load_balancing_loss` of its tokens (segment > 0) times config.router_coefficient.

        The loss is 0 for a model without experts.
        """
        positions, segment_ids = _defaults(tokens, positions, segment_ids)
        hidden, routing, token_mask = self._read(params, tokens, positions, segment_ids)
        if routing is None:
            return hidden, jnp.zeros((), jnp.float32)
        return hidden, self.config.router_coefficient * load_balancing_loss(routing, token_mask)

    def logits(self, params: Params, hidden: Float[Array, "B S D"], *, few_rows: bool = False) -> Float[Array, "B S V"]:
        """Return float32 logits of hidden states. few_rows: use the product that is fastest on a CPU when B * S is small."""
        if not self.config.has_lm:
            raise InputError(f"a model with head {self.config.head!r} has no logits: load it with head='lm'")
        return self._module(params).logits(hidden, self.constrain, few_rows=few_rows)

    def scalars(self, params: Params, hidden: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """Return the float32 output of the scalar head on hidden states."""
        if not self.config.has_scalar:
            raise InputError(f"a model with head {self.config.head!r} has no scalar: load it with head='scalar'")
        return self._module(params).scalar_head(hidden)

    def apply(
        self,
        params: Params,
        tokens: Int32[Array, "B S"],
        *,
        positions: Int32[Array, "B S"] | None = None,
        segment_ids: Int32[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Return logits of whole sequences. For training use `hidden` with `ops.hidden_logprobs`: [B, S, V] float32 is large."""
        return self.logits(params, self.hidden(params, tokens, positions=positions, segment_ids=segment_ids))

    def prefill(
        self,
        params: Params,
        tokens: Int32[Array, "B P"],
        mask: Bool[Array, "B P"],
        positions: Int32[Array, "B P"],
        capacity: int,
        storage: Storage = "compute",
        window: int | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """Read left-padded prompts; return the last column's hidden state and a cache of ``capacity`` >= P columns.

        storage: the format of the cache (the prompts themselves are read with keys and values in compute_dtype).
        window: columns of the cache of sliding-window layers (`KVCache.recent`), None: all.
        """
        segment_ids, width = mask.astype(jnp.int32), tokens.shape[1]
        keep = (width,) if window is None else (width, window)
        hidden, read, _ = self._module(params).hidden(tokens, positions, segment_ids, self.constrain, keep)
        (keys, values), *sliding = [(to_storage(keys, storage), to_storage(values, storage)) for keys, values in read]
        token_positions = jnp.where(mask, positions, -1)
        cache = KVCache(keys, values, token_positions, jnp.asarray(width, jnp.int32), storage=storage).pad_columns(
            capacity
        )
        recent = None if window is None else self._shard_cache(ring_of(*sliding[0], token_positions, window, storage))
        return hidden[:, -1:], dataclasses.replace(self._shard_cache(cache), recent=recent)

    def _shard_cache(self, cache: KVCache) -> KVCache:
        """Return the cache with keys and values sharded over the mesh."""
        keys, values = jax.tree.map(
            lambda stack: self.constrain(stack, KVCache.LOGICAL_AXES), (cache.keys, cache.values)
        )
        return dataclasses.replace(cache, keys=keys, values=values)

    def prefill_after(
        self,
        params: Params,
        tokens: Int32[Array, "B P"],
        mask: Bool[Array, "B P"],
        positions: Int32[Array, "B P"],
        cache: KVCache,
        chunk: int,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """Read left-padded prompts after the tokens in ``cache``; return the same as `prefill`.

        chunk: columns that are read at a time (0: all at once): attention then needs scores of chunk x columns of the
        cache, not of P x P. Only the first chunk may be shorter.
        """
        chunk = min(chunk or tokens.shape[1], tokens.shape[1])
        module, first = self._module(params), tokens.shape[1] % chunk or chunk

        def read(cache: KVCache, columns: Any) -> tuple[KVCache, Array]:
            hidden, cache = module.decode(columns[0], columns[2], cache, self.constrain, columns[1])
            return cache, hidden[:, -1:]

        columns = (tokens, mask, positions)
        cache, hidden = read(cache, jax.tree.map(lambda x: x[:, :first], columns))
        if first < tokens.shape[1]:
            chunks = jax.tree.map(lambda x: x[:, first:].reshape(x.shape[0], -1, chunk).swapaxes(0, 1), columns)
            cache, last = jax.lax.scan(read, cache, chunks)
            hidden = last[-1]
        return hidden, cache

    def separate_layers(self, params: Params) -> list[SeparateLayer]:
        """Return a copy of every layer's weights for `decode`, in the layout for products with few rows on a CPU."""
        return self._module(params).separate_layers()

    def decode(
        self,
        params: Params,
        tokens: Int32[Array, "B 1"],
        positions: Int32[Array, "B 1"],
        cache: KVCache,
        layers: list[SeparateLayer] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """Read one more token of every row; return its hidden state and the cache.

        layers: `separate_layers` of params; the cache must then be `separate_layers`.
        """
        module = self._module(params)
        if layers is None:
            return module.decode(tokens, positions, cache, self.constrain)
        return module.decode_separately(tokens, positions, cache, layers, self.constrain)


def _defaults(tokens: Array, positions: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    return positions, segment_ids


def parameter_count(params: Params) -> int:
    """Return the number of parameters of the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
