"""Loading of a model in any supported format: `load_pretrained`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rlhf_jax.errors import InputError
from rlhf_jax.io.adapters import AdapterSource, merge_adapters, read_adapter_card, read_adapters
from rlhf_jax.io.gguf_file import open_gguf
from rlhf_jax.io.json_files import read_json
from rlhf_jax.io.location import Location, adapter_base, locate
from rlhf_jax.io.peft_files import CONFIG as ADAPTER_CONFIG
from rlhf_jax.io.peft_files import is_adapter, read_adapter
from rlhf_jax.io.placing import add_name_prefix, check_tensors, load_weights
from rlhf_jax.io.run_directory import normalise_scalar_head, read_model_card, read_parameters
from rlhf_jax.io.tensors import Tensors, join_names, open_safetensors
from rlhf_jax.io.tokenizers import check_vocabulary, load_tokenizer, tokenizer_from_gguf
from rlhf_jax.models import Head, Model, ModelConfig, lora, unconstrained
from rlhf_jax.models.families import config_from_hf, weights_of
from rlhf_jax.parallel import RULES, ActivationConstraint, MeshConfig, init_sharded, make_mesh, tree_shardings
from rlhf_jax.parallel.rules import Rules
from rlhf_jax.storage.names import TOKENIZER
from rlhf_jax.types import Params, Rng


class Pretrained(NamedTuple):
    """A loaded model: ``model, params, tokenizer = load_pretrained(path)``."""

    model: Model
    params: Params
    tokenizer: PreTrainedTokenizerBase


def load_pretrained(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    head: Head | None = None,
    param_dtype: str | None = None,
    max_length: int | None = None,
    rng: Rng | None = None,
) -> Pretrained:
    """Load a model onto its shards from a run directory, a Hugging Face directory, a .gguf file (with the tokenizer.json beside it,
    when there is one), the URL of one of these, or a hub id.

    mesh: None = the first device. rules: sharding rules of the weights.
    head: None = the checkpoint's own; "scalar" on a language model keeps the trunk and initializes a scalar head from ``rng``,
    "lm+scalar" likewise. A reward run with reward_normalisation.json gets gain and bias folded into its scalar head.
    param_dtype: dtype of the parameters; None = a run's own, else float32; conversions round to nearest even.
    max_length: at most the checkpoint's; with positions stretched by "longrope" it decides which factors are used
    (`models.RopeScaling`).
    Raises InputError naming file, field or tensors, and the remedy.

    """
    opened = _open(locate(path))
    check_vocabulary(opened.tokenizer, opened.config.vocab_size, str(path), every_id=False)
    config = opened.config.replace(
        head=_select_head(opened.config.head, head, rng, path),
        param_dtype=param_dtype or opened.config.param_dtype,
        max_length=_select_length(opened.config, max_length, path),
    )
    model = Model(config, unconstrained if mesh is None else ActivationConstraint(mesh))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh, rules)
    params = opened.read(config, shardings)
    if param_dtype == "float16":
        _check_overflow(params, path)
    if "scalar_head" in shardings and "scalar_head" not in params:

        def fresh(rng: Rng) -> Params:
            return {"scalar_head": model.init(rng)["scalar_head"]}

        params |= init_sharded(fresh, shardings, mesh, rng)
    return Pretrained(model, params, opened.tokenizer)


def describe_pretrained(
    path: str | Path, *, max_length: int | None = None
) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """Return configuration (as saved, but for ``max_length``) and tokenizer of a model without reading its weights.

    Raises InputError as `load_pretrained` does.

    """
    opened = _open(locate(path))
    check_vocabulary(opened.tokenizer, opened.config.vocab_size, str(path), every_id=False)
    return opened.config.replace(max_length=_select_length(opened.config, max_length, path)), opened.tokenizer


class _Opened(NamedTuple):
    """A checkpoint whose headers were read.

    config: as saved.
    read: (requested configuration, shardings) -> the parameters that the checkpoint and the request share, in the requested dtype.

    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    read: Callable[[ModelConfig, Params], Params]


def _select_length(saved: ModelConfig, requested: int | None, path: str | Path) -> int:
    """Return the max_length to load with. Raises InputError for one that the checkpoint cannot have."""
    if requested is None or requested == saved.max_length:
        return saved.max_length
    if requested > saved.max_length:
        raise InputError(
            f"{path}: max_length = {requested}: the model was made for {saved.max_length} tokens; give at most that"
        )
    if saved.positions == "learned":
        raise InputError(
            f"{path}: max_length = {requested}: its table of positions has {saved.max_length} rows; leave it out"
        )
    return requested


def _select_head(saved: Head, requested: Head | None, rng: Rng | None, path: str | Path) -> Head:
    """Return the head to load with.

    Raises InputError when the checkpoint has no language-model head, or ``rng`` is missing for a new scalar head.

    """
    if requested is None or requested == saved:
        return saved
    if "lm" in requested and "lm" not in saved:
        raise InputError(
            f"{path}: holds a reward or value model (head {saved!r}), which has no language-model head: head={requested!r} "
            "cannot be loaded from it; give the language model that it was made from"
        )
    if "scalar" in requested and "scalar" not in saved and rng is None:
        raise InputError(
            f"{path}: has no scalar head: it is no reward or value model, and a fresh head would score at random; give a "
            "run of train_reward (or rng=jax.random.key(...), to train the fresh head)"
        )
    return requested


def _check_overflow(params: Params, path: str | Path) -> None:
    """Check that float16, whose largest number is 65504, can represent all parameters. Raises InputError."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if wrong := [jax.tree_util.keystr(at, simple=True, separator="/") for at, x in leaves if not jnp.isfinite(x).all()]:
        raise InputError(f"{path}: {join_names(wrong)}: numbers that float16 cannot hold; choose another param_dtype")


def _open(location: Location) -> _Opened:
    if location.kind == "run":
        return _open_run(location.path)
    if location.kind == "gguf":
        fields, tensors, metadata = open_gguf(location.path)
        beside = location.path.parent
        # Some kinds of tokenizer cannot be built from the metadata.
        has_own = (beside / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(beside) if has_own else tokenizer_from_gguf(metadata, str(location.path))
        return _open_huggingface(fields, str(location.path), tensors, tokenizer)
    if is_adapter(location.path):
        return _open_peft(location.path)
    file = location.path / "config.json"
    return _open_huggingface(read_json(file), str(file), open_safetensors(location.path), load_tokenizer(location.path))


def _open_huggingface(
    fields: Mapping[str, Any], where: str, tensors: Tensors, tokenizer: PreTrainedTokenizerBase
) -> _Opened:
    """Open a checkpoint of Hugging Face's layout. where: source of ``fields``, for messages."""
    saved = config_from_hf(fields, where)
    tensors = add_name_prefix(tensors, saved)
    check_tensors(tensors, saved)

    def read(requested: ModelConfig, shardings: Params) -> Params:
        needed = weights_of(requested)
        return load_weights(tensors, [weight for weight in weights_of(saved) if weight in needed], requested, shardings)

    return _Opened(saved, tokenizer, read)


def _open_run(run_dir: Path, step: int | None = None) -> _Opened:
    """Open a run directory of this package. step: of its checkpoint, None = the newest."""
    saved, subtree = read_model_card(run_dir)
    source = read_adapter_card(run_dir)
    if source is not None:
        return _open_adapted_run(run_dir, saved, subtree, source)

    def read(requested: ModelConfig, shardings: Params) -> Params:
        shared = {name: tree for name, tree in Model(saved).abstract().items() if name in shardings}
        like = jax.tree.map(_abstract_leaf, shared, {name: shardings[name] for name in shared})
        params = read_parameters(run_dir, subtree, Model(saved).abstract(), like, step=step)
        if requested.head == "scalar" and saved.has_scalar:
            params = normalise_scalar_head(run_dir, params)
        cast: Params = jax.tree.map(lambda leaf: leaf.astype(requested.param_dtype), params)
        return cast

    return _Opened(saved, load_tokenizer(run_dir / TOKENIZER), read)


def _open_adapted_run(run_dir: Path, saved: ModelConfig, subtree: str, source: AdapterSource) -> _Opened:
    """Open a run that trained adapters: its base model with the adapters merged in."""
    location = locate(source.base)
    base = _open_run(location.path, source.base_step) if location.kind == "run" else _open(location)

    def read(requested: ModelConfig, shardings: Params) -> Params:
        frozen, _ = lora.split(base.read(requested, shardings))
        trained = read_adapters(run_dir, subtree, Model(saved, lora=source.lora), shardings)
        params = merge_adapters(frozen, trained, source.lora, requested, shardings)
        return normalise_scalar_head(run_dir, params) if requested.head == "scalar" and saved.has_scalar else params

    return _Opened(saved, load_tokenizer(run_dir / TOKENIZER), read)


def _open_peft(directory: Path) -> _Opened:
    """Open an adapter in PEFT's format: the base model that it names, with the adapter merged in."""
    fields = read_json(directory / ADAPTER_CONFIG)
    base = _open(locate(adapter_base(fields, directory / ADAPTER_CONFIG)))
    settings, trained, with_head = read_adapter(directory, base.config)

    def read(requested: ModelConfig, shardings: Params) -> Params:
        frozen, head = lora.split(base.read(requested, shardings))
        adapters = head | {name: tree for name, tree in trained.items() if name in shardings}
        return merge_adapters(frozen, adapters, settings, requested, shardings)

    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(directory) if has_tokenizer else base.tokenizer
    return _Opened(base.config.replace(head="scalar") if with_head else base.config, tokenizer, read)


def _abstract_leaf(leaf: Any, sharding: Any) -> Any:
    struct: Any = jax.ShapeDtypeStruct
    return struct(leaf.shape, leaf.dtype, sharding=sharding)
