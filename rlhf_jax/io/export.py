"""Export of a model as a directory in the format of transformers: `export_pretrained`."""

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
from rlhf_jax.io.placing import leading_shape, tensor_names
from rlhf_jax.io.tensors import INDEX, SINGLE, join_names
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

    All files are written next to ``path`` and renamed at the end, so an existing directory is complete. The weights equal the
    parameters bit for bit, in their dtype; `load_pretrained` restores them.

    generation: sampling defaults of the model's source (`read_generation`); its further stop ids stay, after the tokenizer's own.
    template: conversation format of the training data. It is written as template.json, a plain format also as the tokenizer's
    chat template, and the ids that end its responses become stop ids.
    provenance: content of provenance.json.
    max_file_bytes: larger weights are split over several files with an index. It also bounds the host memory of an export,
    above one stacked parameter.

    The format is that of ``model.config.family``; head "scalar" becomes its sequence classifier with one label.
    The score of transformers has no bias: ours is stored as the tensor ``score.bias`` (when not zero), which transformers
    reports as unexpected, so its scores differ from ours by that constant. transformers scores the last token that is
    not padding, this package the last token: padding must therefore not be the end-of-sequence token.
    Raises InputError when ``path`` exists, for parameters of another model, and for a head or tokenizer that cannot be exported.

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
            write_json(directory / GENERATION, _generation_fields(fields, generation or {}))
        write_tokenizer_files(directory, tokenizer, template, provenance)


def write_tokenizer_files(
    directory: Path, tokenizer: PreTrainedTokenizerBase, template: Template | None, provenance: bytes | None
) -> None:
    """Write the tokenizer with the chat template of ``template``, template.json and provenance.json of an export."""
    if template is not None:
        chat_template = chat_template_of(template, tokenizer)
        if chat_template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = chat_template
        write_json(directory / TEMPLATE, dataclasses.asdict(template))
    save_tokenizer(tokenizer, directory)
    if provenance is not None:
        (directory / PROVENANCE).write_bytes(provenance)


def _generation_fields(fields: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source's sampling defaults with the special tokens of ``fields``.

    Stop ids of the source follow the tokenizer's end-of-sequence id.

    """
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if fields[name] is not None}
    stops = list(dict.fromkeys((ids["eos_token_id"], *end_ids(source))))
    outside = [stop for stop in stops if stop >= fields["vocab_size"]]
    if outside:
        raise InputError(f"{GENERATION}: eos_token_id: {outside} are no ids below vocab_size = {fields['vocab_size']}")
    settings = {name: value for name, value in source.items() if name != "transformers_version"}
    return settings | ids | {"eos_token_id": stops if len(stops) > 1 else stops[0]}


def _special_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return the ids of the beginning-of-sequence, end-of-sequence and padding tokens.

    Raises InputError when the model cannot be used with this tokenizer.

    """
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
    """Check that the parameters have the model's names, shapes and dtypes. Raises InputError that lists the others."""

    def layout(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(at, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for at, x in leaves}

    actual, expected = layout(params), layout(model.abstract())
    if wrong := sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)):
        differences = [
            f"{n} is {actual.get(n, 'missing')}, the model has {expected.get(n, 'no such parameter')}" for n in wrong
        ]
        raise InputError(f"params: {join_names(differences)}")
    if remote := [n for n, leaf in zip(actual, jax.tree.leaves(params), strict=True) if not _is_local(leaf)]:
        raise InputError(f"params: {join_names(remote)} lies on several hosts; export from a single process")


def _is_local(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor) of every tensor of the checkpoint; ``score.bias`` only when it is not zero.

    Only the stacked parameters that share a tensor are on the host at a time.

    """
    sizes = dimensions(config)
    rows: dict[tuple[str, range | None], list[Weight]] = {}
    for weight in weights_of(config):
        rows.setdefault((weight.tensor, weight.layers), []).append(weight)
    for weights in rows.values():
        arrays = [np.asarray(_leaf(params, weight.parameter)) for weight in weights]
        if weights[0].zero_when_absent and not arrays[0].any():
            continue
        axes = leading_shape(weights[0], config)
        for index, name in zip(np.ndindex(axes), tensor_names(weights[0], config), strict=True):
            layouts = [parse(weight.layout, weight.part) for weight in weights]
            tensor = np.empty(layouts[0].stored_shape(sizes), arrays[0].dtype)
            for layout, array in zip(layouts, arrays, strict=True):
                layout.write(sizes, tensor, array[index])
            yield name, tensor


def _leaf(params: Params, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def _write_weights(directory: Path, config: ModelConfig, params: Params, max_file_bytes: int) -> None:
    """Write the weights as one file, or as several of at most ``max_file_bytes`` (or one tensor) with an index."""
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
    file_names: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        file_names |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": file_names})
