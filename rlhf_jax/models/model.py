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
from rlhf_jax.models.cache import KVCache, Storage, ring_of, stored
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

    config: the architecture. constrain: how activations are laid out over a mesh (`parallel.ActivationConstraint`).
    lora: adapters beside the matrices (`models.lora`). int8: the matrices of the layers are int8 (`models.int8`). fold: how
    rows of different lengths are read and predicted (`models.folding`), None: as they come.
    """

    config: ModelConfig
    constrain: Constrain = unconstrained
    lora: LoraConfig | None = None
    int8: bool = False
    fold: Fold | None = None

    def with_head(self, head: Head) -> Model:
        """The same trunk under another head."""
        return dataclasses.replace(self, config=self.config.replace(head=head))

    def folded(self, fold: Fold | None) -> Model:
        """The same model reading rows so."""
        return dataclasses.replace(self, fold=fold)

    def abstract(self) -> Params:
        """The parameters as ShapeDtypeStructs."""
        return nnx.to_pure_dict(_abstract(self.config, self.lora, int8=self.int8)[1])

    def logical_axes(self) -> Params:
        """The logical axis names of each parameter: a tree like the parameters with a tuple of names per leaf."""
        specs = nnx.to_pure_dict(nnx.get_partition_spec(_abstract(self.config, self.lora, int8=self.int8)[1]))
        axes: Params = jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
        return axes

    def matrices(self) -> Params:
        """Which parameters are matrices (`models.weights.Matrix`): a tree like the parameters with a bool per leaf."""
        state = _abstract(self.config, self.lora, int8=self.int8)[1]
        flags = {path: isinstance(leaf, Matrix) for path, leaf in nnx.to_flat_state(state)}
        return dict(nnx.traversals.unflatten_mapping(flags))

    def init(self, rng: Rng) -> Params:
        """Freshly drawn parameters (`models.weights` and `models.parts` give the distributions)."""
        module = Decoder(self.config, self.lora, rngs=nnx.Rngs(params=rng))
        params: Params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return int8.quantized_tree(params, self.abstract()) if self.int8 else params

    def _module(self, params: Params) -> Decoder:
        """The network over ``params``: a tree with adapters, with dropout keys, or the base alone."""
        given = next(lora.adapted_kernels(params), None)
        adapters = None if given is None else self.lora
        dropout = given is not None and lora.DROPOUT_KEY in given[1]
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
        """Final hidden states in compute_dtype. Defaults: positions 0.., one segment per row."""
        positions, segment_ids = _defaults(tokens, positions, segment_ids)
        return self._read(params, tokens, positions, segment_ids)[0]

    def _read(
        self, params: Params, tokens: Array, positions: Array, segment_ids: Array
    ) -> tuple[Array, Routing | None, Array]:
        """(final hidden states [B, S, D], routing, which of the columns that the network saw hold a token)."""
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
        """`hidden`, and the `load_balancing_loss` of its tokens (segment > 0) times config.router_coefficient; 0 for a model
        without experts."""
        positions, segment_ids = _defaults(tokens, positions, segment_ids)
        hidden, routing, held = self._read(params, tokens, positions, segment_ids)
        if routing is None:
            return hidden, jnp.zeros((), jnp.float32)
        return hidden, self.config.router_coefficient * load_balancing_loss(routing, held)

    def logits(self, params: Params, hidden: Float[Array, "B S D"], *, few_rows: bool = False) -> Float[Array, "B S V"]:
        """Float32 logits of hidden states. few_rows: as a CPU multiplies them fastest when B * S is small."""
        if not self.config.has_lm:
            raise InputError(f"a model with head {self.config.head!r} has no logits: load it with head='lm'")
        return self._module(params).logits(hidden, self.constrain, few_rows=few_rows)

    def scalars(self, params: Params, hidden: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """Float32 output of the scalar head on hidden states."""
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
        """Logits of whole sequences. For training use `hidden` with `ops.hidden_logprobs`: [B, S, V] float32 is large."""
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
        """Read left-padded prompts: the last column's hidden state and a cache of ``capacity`` >= P columns, kept as
        ``storage`` says (the prompts themselves are read with keys and values as they are). window: columns of the layers
        that slide (`KVCache.recent`), None: all."""
        segment_ids, width = mask.astype(jnp.int32), tokens.shape[1]
        keep = (width,) if window is None else (width, window)
        hidden, read, _ = self._module(params).hidden(tokens, positions, segment_ids, self.constrain, keep)
        (keys, values), *sliding = [(stored(keys, storage), stored(values, storage)) for keys, values in read]
        held = jnp.where(mask, positions, -1)
        cache = KVCache(keys, values, held, jnp.asarray(width, jnp.int32), storage=storage).widened(capacity)
        recent = None if window is None else self._laid(ring_of(*sliding[0], held, window, storage))
        return hidden[:, -1:], dataclasses.replace(self._laid(cache), recent=recent)

    def _laid(self, cache: KVCache) -> KVCache:
        """With keys and values where they belong on the mesh."""
        keys, values = jax.tree.map(
            lambda stack: self.constrain(stack, KVCache.LOGICAL_AXES), (cache.keys, cache.values)
        )
        return dataclasses.replace(cache, keys=keys, values=values)

    def read_on(
        self,
        params: Params,
        tokens: Int32[Array, "B P"],
        mask: Bool[Array, "B P"],
        positions: Int32[Array, "B P"],
        cache: KVCache,
        chunk: int,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """`prefill` behind what ``cache`` holds, ``chunk`` columns at a time (0: all at once): attention then needs scores of
        chunk x columns of the cache, not of P x P. The first chunk is the one that may be shorter."""
        chunk = min(chunk or tokens.shape[1], tokens.shape[1])
        module, first = self._module(params), tokens.shape[1] % chunk or chunk

        def read(cache: KVCache, columns: Any) -> tuple[KVCache, Array]:
            hidden, cache = module.decode(columns[0], columns[2], cache, self.constrain, columns[1])
            return cache, hidden[:, -1:]

        columns = (tokens, mask, positions)
        cache, hidden = read(cache, jax.tree.map(lambda x: x[:, :first], columns))
        if first < tokens.shape[1]:
            rest = jax.tree.map(lambda x: x[:, first:].reshape(x.shape[0], -1, chunk).swapaxes(0, 1), columns)
            cache, last = jax.lax.scan(read, cache, rest)
            hidden = last[-1]
        return hidden, cache

    def separate_layers(self, params: Params) -> list[SeparateLayer]:
        """For `decode`: a copy of every layer's weights by itself, laid out for products with few rows on a CPU."""
        return self._module(params).separate_layers()

    def decode(
        self,
        params: Params,
        tokens: Int32[Array, "B 1"],
        positions: Int32[Array, "B 1"],
        cache: KVCache,
        layers: list[SeparateLayer] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """One token further for every row. layers: `separate_layers` of params; the cache must then be `separated`."""
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
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
