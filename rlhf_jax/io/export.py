"""`export_pretrained`: a directory that transformers (and what reads its format) loads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import Template, chat_template_of, end_ids, response_ends
from rlhf_jax.errors import InputError
from rlhf_jax.io.generation import FILE as GENERATION
from rlhf_jax.io.json_files import write_json
from rlhf_jax.io.layout import parse
from rlhf_jax.io.new_directory import new_directory
from rlhf_jax.io.placing import names_of, stacked
from rlhf_jax.io.tensors import INDEX, SINGLE, listed
from rlhf_jax.io.tokenizers import largest_token, save_tokenizer
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.models.families import Weight, config_to_hf, dimensions, weights_of
from rlhf_jax.storage.names import PROVENANCE, TEMPLATE
from rlhf_jax.types import Params

MAX_FILE_BYTES = 4 * 2**30


def export_pretrained(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation: Mapping[str, Any] | None = None,
    template: Template | None = None,
    provenance: bytes | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write config.json, generation_config.json, safetensors files and the tokenizer with its chat template to ``path``.

    Everything is written next to ``path`` and renamed at the end: a directory that exists is complete. Numbers are the
    parameters bit for bit, in their dtype; `load_pretrained` gives them back. generation: how the model's source wants to be
    sampled (`read_generation`); further stop ids stay, the tokenizer's own come first. template: how the conversations were
    written that the model learned from: it becomes template.json, a plain format also the tokenizer's chat template, and
    what it ends a response with is among the stop ids. provenance: content of provenance.json. max_file_bytes: weights
    beyond it are split over several files with an index; also the host memory that an export takes, above one stacked
    parameter.

    The format is that of ``model.config.family``; head "scalar" becomes its sequence classifier with one label.
    transformers' score has no bias: ours is stored as the tensor ``score.bias`` (when not zero), which transformers
    reports as unexpected, so its scores differ from ours by that constant. transformers scores the last token that is
    not padding, ours the last token: padding must therefore not be the end-of-sequence token.
    Raises InputError: ``path`` exists, parameters of another model, a head or tokenizer that cannot be exported.
    """
    if model.lora is not None or model.int8:
        raise InputError(
            "model: has adapters or int8 matrices; export the run (experiments/export.py), which merges them"
        )
    fields = config_to_hf(model.config) | _special_ids(model.config, tokenizer)
    _check_params(model, params)
    if template is not None:
        generation = {**(generation or {}), "eos_token_id": list(response_ends(tokenizer, template, generation).ids)}
    with new_directory(path) as directory:
        _write_weights(directory, model.config, params, max_file_bytes)
        write_json(directory / "config.json", fields)
        if model.config.has_lm:
            write_json(directory / GENERATION, _generation(fields, generation or {}))
        write_text_side(directory, tokenizer, template, provenance)


def write_text_side(
    directory: Path, tokenizer: PreTrainedTokenizerBase, template: Template | None, provenance: bytes | None
) -> None:
    """Write what an export holds beside weights: the tokenizer with the chat template that ``template`` is, template.json
    and provenance.json."""
    if template is not None:
        written = chat_template_of(template, tokenizer)
        if written is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = written
        write_json(directory / TEMPLATE, dataclasses.asdict(template))
    save_tokenizer(tokenizer, directory)
    if provenance is not None:
        (directory / PROVENANCE).write_bytes(provenance)


def _generation(fields: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The source's sampling defaults with the special tokens of ``fields``; other stop ids of the source are kept behind
    the tokenizer's end of sequence."""
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if fields[name] is not None}
    stops = list(dict.fromkeys((ids["eos_token_id"], *end_ids(source))))
    outside = [stop for stop in stops if stop >= fields["vocab_size"]]
    if outside:
        raise InputError(f"{GENERATION}: eos_token_id: {outside} are no ids below vocab_size = {fields['vocab_size']}")
    kept = {name: value for name, value in source.items() if name != "transformers_version"}
    return kept | ids | {"eos_token_id": stops if len(stops) > 1 else stops[0]}


def _special_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Beginning, end and padding of the tokenizer. Raises InputError when the model cannot be used with it."""
    if (largest := largest_token(tokenizer)[0]) >= config.vocab_size:
        raise InputError(
            f"tokenizer: its {len(tokenizer)} tokens do not fit vocab_size = {config.vocab_size}: the largest id is {largest}"
        )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise InputError(
            "tokenizer: has no end-of-sequence token; set tokenizer.eos_token (eos_token in its tokenizer_config.json)"
        )
    if config.has_scalar and (pad is None or pad == eos):
        raise InputError(
            f"tokenizer: pad_token is {'absent' if pad is None else 'eos_token'}: transformers scores the last token that "
            "is not padding, which would not be the last token; set tokenizer.pad_token "
            "(--pad_token of experiments/export.py) to a token that ends no text"
        )
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}


def _check_params(model: Model, params: Params) -> None:
    """Raises InputError listing the parameters that are not the model's."""

    def layout(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(at, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for at, x in leaves}

    given, wanted = layout(params), layout(model.abstract())
    if wrong := sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)):
        told = [f"{n} is {given.get(n, 'missing')}, the model has {wanted.get(n, 'no such parameter')}" for n in wrong]
        raise InputError(f"params: {listed(told)}")
    if remote := [n for n, leaf in zip(given, jax.tree.leaves(params), strict=True) if not _is_here(leaf)]:
        raise InputError(f"params: {listed(remote)} lies on several hosts; export from a single process")


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every (name, tensor), on the host only the stacked parameters that share a tensor; ``score.bias`` only when it says
    something."""
    sizes = dimensions(config)
    rows: dict[tuple[str, range | None], list[Weight]] = {}
    for weight in weights_of(config):
        rows.setdefault((weight.tensor, weight.layers), []).append(weight)
    for weights in rows.values():
        hosts = [np.asarray(_leaf(params, weight.parameter)) for weight in weights]
        if weights[0].zero_when_absent and not hosts[0].any():
            continue
        axes = stacked(weights[0], config)
        for place, name in zip(np.ndindex(axes), names_of(weights[0], config), strict=True):
            layouts = [parse(weight.layout, weight.part) for weight in weights]
            tensor = np.empty(layouts[0].their_shape(sizes), hosts[0].dtype)
            for layout, host in zip(layouts, hosts, strict=True):
                layout.write(sizes, tensor, host[place])
            yield name, tensor


def _leaf(params: Params, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def _write_weights(directory: Path, config: ModelConfig, params: Params, max_file_bytes: int) -> None:
    """One file, or as many as keep each at ``max_file_bytes`` (a single larger tensor has its own), and the index."""
    parts: list[list[str]] = []
    part: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(part, directory / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(part))
        part.clear()

    total = 0
    for name, tensor in _tensors(config, params):
        total += tensor.nbytes
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > max_file_bytes:
            flush()
        part[name] = tensor
    flush()
    if len(parts) == 1:
        (directory / "part-0").rename(directory / SINGLE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        places |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
