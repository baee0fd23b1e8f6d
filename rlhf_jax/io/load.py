"""`load_pretrained`: a model from wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rlhf_jax.errors import InputError
from rlhf_jax.io.adapters import AdapterSource, merged, read_adapter_card, read_adapters
from rlhf_jax.io.gguf_file import open_gguf
from rlhf_jax.io.json_files import read_json
from rlhf_jax.io.location import Location, adapter_base, locate
from rlhf_jax.io.peft_files import CONFIG as ADAPTER_CONFIG
from rlhf_jax.io.peft_files import is_adapter, read_adapter
from rlhf_jax.io.placing import check_tensors, place, with_base_names
from rlhf_jax.io.run_directory import normalised_scalar_head, read_model_card, read_parameters
from rlhf_jax.io.tensors import Tensors, listed, open_safetensors
from rlhf_jax.io.tokenizers import check_vocabulary, load_tokenizer, tokenizer_from_gguf
from rlhf_jax.models import Head, Model, ModelConfig, lora, unconstrained
from rlhf_jax.models.families import config_from_hf, weights_of
from rlhf_jax.parallel import RULES, ActivationConstraint, MeshConfig, init_sharded, make_mesh, tree_shardings
from rlhf_jax.parallel.rules import Rules
from rlhf_jax.storage.names import TOKENIZER
from rlhf_jax.types import Params, Rng


class Pretrained(NamedTuple):
    """A model ready to use: ``model, params, tokenizer = load_pretrained(path)``."""

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
    """A model from a run directory, a Hugging Face directory, a .gguf file (with the tokenizer.json beside it, when there is one)
    the URL of one of these, or a hub id, its weights on their shards.

    mesh: None = everything on the first device. rules: how weights lie on the mesh. head: None = the checkpoint's own;
    "scalar" on a language model keeps the trunk and draws a fresh scalar head from ``rng``, "lm+scalar" likewise.
    A reward run with reward_normalisation.json gets gain and bias folded into its scalar head. param_dtype: dtype of the
    parameters, float32 or a run's own when None; conversions round to nearest even. max_length: shorter than the
    checkpoint's; with positions stretched by "longrope" it decides which factors are taken (`models.RopeScaling`).
    Raises InputError naming file, field or tensors, and the remedy.
    """
    opened = _open(locate(path))
    check_vocabulary(opened.tokenizer, opened.config.vocab_size, str(path), every_id=False)
    config = opened.config.replace(
        head=_chosen_head(opened.config.head, head, rng, path),
        param_dtype=param_dtype or opened.config.param_dtype,
        max_length=_chosen_length(opened.config, max_length, path),
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
    """Configuration (as saved, but for ``max_length``) and tokenizer of what `load_pretrained` would load; no weights are read.

    Raises InputError as `load_pretrained` does.
    """
    opened = _open(locate(path))
    check_vocabulary(opened.tokenizer, opened.config.vocab_size, str(path), every_id=False)
    return opened.config.replace(max_length=_chosen_length(opened.config, max_length, path)), opened.tokenizer


class _Opened(NamedTuple):
    """A checkpoint whose headers were read. config: as saved. read: (wanted configuration, shardings) -> the parameters
    that both have, in the wanted dtype."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    read: Callable[[ModelConfig, Params], Params]


def _chosen_length(saved: ModelConfig, wanted: int | None, path: str | Path) -> int:
    """The max_length to load with. Raises InputError for one that the checkpoint cannot have."""
    if wanted is None or wanted == saved.max_length:
        return saved.max_length
    if wanted > saved.max_length:
        raise InputError(
            f"{path}: max_length = {wanted}: the model was made for {saved.max_length} tokens; give at most that"
        )
    if saved.positions == "learned":
        raise InputError(
            f"{path}: max_length = {wanted}: its table of positions has {saved.max_length} rows; leave it out"
        )
    return wanted


def _chosen_head(saved: Head, wanted: Head | None, rng: Rng | None, path: str | Path) -> Head:
    """The head to load under. Raises InputError when the checkpoint has no language-model head or no key was given."""
    if wanted is None or wanted == saved:
        return saved
    if "lm" in wanted and "lm" not in saved:
        raise InputError(
            f"{path}: holds a reward or value model (head {saved!r}), which has no language-model head: head={wanted!r} "
            "cannot be loaded from it; give the language model that it was made from"
        )
    if "scalar" in wanted and "scalar" not in saved and rng is None:
        raise InputError(
            f"{path}: has no scalar head: it is no reward or value model, and a fresh head would score at random; give a "
            "run of train_reward (or rng=jax.random.key(...), to train the fresh head)"
        )
    return wanted


def _check_overflow(params: Params, path: str | Path) -> None:
    """float16 ends at 65504, where float32 and bfloat16 go on."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if wrong := [jax.tree_util.keystr(at, simple=True, separator="/") for at, x in leaves if not jnp.isfinite(x).all()]:
        raise InputError(f"{path}: {listed(wrong)}: numbers that float16 cannot hold; choose another param_dtype")


def _open(location: Location) -> _Opened:
    if location.kind == "run":
        return _open_run(location.path)
    if location.kind == "gguf":
        fields, tensors, metadata = open_gguf(location.path)
        beside = location.path.parent
        own = (
            beside / "tokenizer.json"
        ).is_file()  # of kinds that the metadata cannot say, or that we do not make of them
        tokenizer = load_tokenizer(beside) if own else tokenizer_from_gguf(metadata, str(location.path))
        return _open_foreign(fields, str(location.path), tensors, tokenizer)
    if is_adapter(location.path):
        return _open_peft(location.path)
    file = location.path / "config.json"
    return _open_foreign(read_json(file), str(file), open_safetensors(location.path), load_tokenizer(location.path))


def _open_foreign(
    fields: Mapping[str, Any], where: str, tensors: Tensors, tokenizer: PreTrainedTokenizerBase
) -> _Opened:
    """A checkpoint of Hugging Face's layout. where: what holds ``fields``."""
    saved = config_from_hf(fields, where)
    tensors = with_base_names(tensors, saved)
    check_tensors(tensors, saved)

    def read(wanted: ModelConfig, shardings: Params) -> Params:
        needed = weights_of(wanted)
        return place(tensors, [weight for weight in weights_of(saved) if weight in needed], wanted, shardings)

    return _Opened(saved, tokenizer, read)


def _open_run(run_dir: Path, step: int | None = None) -> _Opened:
    """A run directory of ours. step: of its checkpoint, None = the newest."""
    saved, subtree = read_model_card(run_dir)
    source = read_adapter_card(run_dir)
    if source is not None:
        return _open_adapted_run(run_dir, saved, subtree, source)

    def read(wanted: ModelConfig, shardings: Params) -> Params:
        both = {name: tree for name, tree in Model(saved).abstract().items() if name in shardings}
        like = jax.tree.map(_placed, both, {name: shardings[name] for name in both})
        params = read_parameters(run_dir, subtree, Model(saved).abstract(), like, step=step)
        if wanted.head == "scalar" and saved.has_scalar:
            params = normalised_scalar_head(run_dir, params)
        cast: Params = jax.tree.map(lambda leaf: leaf.astype(wanted.param_dtype), params)
        return cast

    return _Opened(saved, load_tokenizer(run_dir / TOKENIZER), read)


def _open_adapted_run(run_dir: Path, saved: ModelConfig, subtree: str, source: AdapterSource) -> _Opened:
    """A run that trained adapters: its base with them merged in."""
    location = locate(source.base)
    base = _open_run(location.path, source.base_step) if location.kind == "run" else _open(location)

    def read(wanted: ModelConfig, shardings: Params) -> Params:
        frozen, _ = lora.split(base.read(wanted, shardings))
        trained = read_adapters(run_dir, subtree, Model(saved, lora=source.lora), shardings)
        params = merged(frozen, trained, source.lora, wanted, shardings)
        return normalised_scalar_head(run_dir, params) if wanted.head == "scalar" and saved.has_scalar else params

    return _Opened(saved, load_tokenizer(run_dir / TOKENIZER), read)


def _open_peft(directory: Path) -> _Opened:
    """An adapter in PEFT's format: the base that it names, with the adapter merged in."""
    fields = read_json(directory / ADAPTER_CONFIG)
    base = _open(locate(adapter_base(fields, directory / ADAPTER_CONFIG)))
    settings, trained, with_head = read_adapter(directory, base.config)

    def read(wanted: ModelConfig, shardings: Params) -> Params:
        frozen, head = lora.split(base.read(wanted, shardings))
        there = head | {name: tree for name, tree in trained.items() if name in shardings}
        return merged(frozen, there, settings, wanted, shardings)

    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(directory) if has_tokenizer else base.tokenizer
    return _Opened(base.config.replace(head="scalar") if with_head else base.config, tokenizer, read)


def _placed(leaf: Any, sharding: Any) -> Any:
    struct: Any = jax.ShapeDtypeStruct
    return struct(leaf.shape, leaf.dtype, sharding=sharding)
