"""Adapters in the format of the PEFT library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import Template
from rlhf_jax.errors import InputError
from rlhf_jax.io.export import write_tokenizer_files
from rlhf_jax.io.generation import FILE as GENERATION
from rlhf_jax.io.json_files import read_json, write_json
from rlhf_jax.io.layout import Layout, full_window, parse
from rlhf_jax.io.new_directory import new_directory
from rlhf_jax.io.tensors import Tensors, describe_mismatches, join_names, open_file
from rlhf_jax.models import LoraConfig, Model, ModelConfig, lora
from rlhf_jax.models.families import dimensions, weights_of
from rlhf_jax.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEAD = {"scalar_head/kernel": ("score.weight", "o d -> d o"), "scalar_head/bias": ("score.bias", "o -> o")}
_SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}

_READ = {"r", "lora_alpha", "lora_dropout"}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
    "use_rslora": (None, False, True),
    "bias": ("none",),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    # pissa, olora, corda, loftq and lora_ga change the base as well, and an unknown name may do so
    "init_lora_weights": (True, None, False, "gaussian", "eva", "orthogonal", "mica"),
}
"""Fields that change the computation -> their supported values, the first one when absent."""
_NO_EFFECT = {
    "base_model_name_or_path",  # `load_pretrained` reads both
    "revision",
    "target_modules",  # follows from the tensors
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "fan_in_fan_out",  # layout of the base matrix; A and B do not depend on it
    "megatron_core",
    "ensure_weight_tying",  # of embeddings and saved modules, which are refused
    "runtime_config",
    "loftq_config",  # settings of initialisations: init_lora_weights names the one used
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "exclude_modules",
    "layers_pattern",
    "qalora_group_size",  # has an effect only with use_qalora
}
_OFF: tuple[Any, ...] = (None, False, [], {})
"""Values of a PEFT field whose feature is switched off."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of an adapter file.

    name: PEFT's. parameter: path of the parameter. layer: its index in the stack, None when it is not stacked.

    """

    name: str
    parameter: str
    layer: int | None
    layout: Layout


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix that can have an adapter.

    inside: its name inside a layer, as in `LoraConfig.targets`. stack: path of its parameter without ``/kernel``.
    module: its name in the checkpoint, with ``{layer}`` for the number. a, b: layouts.

    """

    inside: str
    stack: str
    layers: range
    module: str
    a: str
    b: str

    def tensors(self) -> Iterator[_Tensor]:
        """Yield the tensors of all its layers."""
        for side, layout in (("lora_a", self.a), ("lora_b", self.b)):
            for index, layer in enumerate(self.layers):
                name = f"{_PREFIX}{self.module.format(layer=layer)}.{_SIDES[side]}.weight"
                yield _Tensor(name, f"{self.stack}/{side}", index, parse(layout))


def _matrices(config: ModelConfig) -> list[_Matrix]:
    """Return the matrices of the layers that are tensors of their own in a checkpoint.

    Matrices that are stored fused with others (GPT-2's c_attn, Phi-3's qkv_proj) have no A and B of their own and are left out.

    """
    matrices = []
    for weight in weights_of(config):
        if weight.layers is None or not weight.parameter.endswith("/kernel") or "{expert}" in weight.tensor:
            continue
        stack = weight.parameter.removesuffix("/kernel")
        inside = re.sub(r"^layers/(\d+/)?", "", stack)
        layout = parse(weight.layout, weight.part)
        inputs = 2 if inside == "attention/output" else 1
        ins, outs = layout.parameter[:inputs], layout.parameter[inputs:]
        if sorted(layout.stored) != sorted(((ins,), (outs,))):
            continue
        a = f"r ({' '.join(ins)}) -> {' '.join(ins)} r"
        b = f"({' '.join(outs)}) r -> r {' '.join(outs)}"
        matrices.append(_Matrix(inside, stack, weight.layers, weight.tensor.removesuffix(".weight"), a, b))
    return matrices


def _head_tensors(config: ModelConfig) -> list[_Tensor]:
    if not config.has_scalar:
        return []
    return [_Tensor(_PREFIX + name, path, None, parse(layout)) for path, (name, layout) in _HEAD.items()]


def export_adapter(
    path: str | Path,
    model: Model,
    trained: Params,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    *,
    generation: Mapping[str, Any] | None = None,
    template: Template | None = None,
    provenance: bytes | None = None,
) -> None:
    """Write the adapters of a run as a directory that ``peft`` loads onto ``base``: adapter_config.json, adapter_model.safetensors
    and the tokenizer.

    model: with its ``lora``.
    trained: adapters, and the scalar head of a reward or value model, which becomes PEFT's saved module ``score`` (its bias, which
    PEFT does not have, as the tensor ``score.bias`` when it is not zero). Numbers are written bit for bit.
    generation, template, provenance: as in `export_pretrained`.
    Raises InputError when ``path`` exists, and for a matrix that checkpoints of the family store fused with others.

    """
    if model.lora is None:
        raise InputError(f"{path}: the model has no adapters; export it whole")
    settings, config = model.lora, model.config
    matrices = {matrix.stack: matrix for matrix in _matrices(config)}
    adapted = [at for at, _ in lora.adapted_kernels(trained)]
    if joined := sorted(set(adapted) - matrices.keys()):
        raise InputError(
            f"LoraConfig.targets: {join_names(joined)}: stored joined with others in checkpoints of family {config.family!r}, "
            "where PEFT has one adapter for all of them; export the merged model"
        )
    sizes = dimensions(config) | {"r": settings.rank}
    tensors = {}
    for tensor in [t for at in adapted for t in matrices[at].tensors()] + _head_tensors(config):
        parameter = np.asarray(_leaf(trained, tensor.parameter))
        if tensor.parameter == "scalar_head/bias" and not parameter.any():
            continue
        stored = np.empty(tensor.layout.stored_shape(sizes), parameter.dtype)
        tensor.layout.write(sizes, stored, parameter if tensor.layer is None else parameter[tensor.layer])
        tensors[tensor.name] = stored
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.has_lm else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted({matrices[at].module.split("{layer}.")[1] for at in adapted}),
        "modules_to_save": ["score"] if config.has_scalar else None,
        "bias": "none",
        "inference_mode": True,
    }
    with new_directory(path) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        write_json(directory / CONFIG, fields)
        if generation:
            write_json(directory / GENERATION, generation)
        write_tokenizer_files(directory, tokenizer, template, provenance)


def is_adapter(path: Path) -> bool:
    """Return whether the directory holds an adapter in PEFT's format."""
    return (path / CONFIG).is_file()


def read_adapter(path: str | Path, config: ModelConfig) -> tuple[LoraConfig, Params, bool]:
    """Read an adapter directory: (settings, trained parameters as float32 arrays, whether they include a scalar head).

    config: of the base. Raises InputError for damaged files, for unsupported settings that change the computation, and for
    tensors that are missing, of another model, of another shape or of an unsupported dtype.

    """
    path = Path(path)
    fields = read_json(path / CONFIG)
    _check_fields(fields, path / CONFIG)
    with_head = any(name == f"{_PREFIX}score.weight" for name in open_file(path / WEIGHTS).stored)
    if "score" in (fields.get("modules_to_save") or []) and not with_head:
        raise InputError(
            f"{path / CONFIG}: modules_to_save names 'score', but {WEIGHTS} has no {_PREFIX}score.weight; save the adapter again"
        )
    tensors = open_file(path / WEIGHTS)
    adapted_config = config.replace(head="scalar") if with_head else config
    expected, targets = [], []
    for matrix in _matrices(config):
        parts = list(matrix.tensors())
        if any(part.name in tensors.stored for part in parts):
            expected += parts
            targets.append(matrix.inside)
    expected += [
        part
        for part in _head_tensors(adapted_config)
        if part.parameter != "scalar_head/bias" or part.name in tensors.stored
    ]
    try:
        settings = LoraConfig(
            rank=fields["r"],
            alpha=fields["lora_alpha"],
            rslora=bool(fields.get("use_rslora")),
            dropout=float(fields.get("lora_dropout") or 0.0),
            targets="|".join(sorted(set(targets))),
        )
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{path / CONFIG}: {error}") from error
    sizes = dimensions(config) | {"r": settings.rank}
    _check_tensors(tensors, expected, sizes)
    return settings, _assemble(tensors, expected, sizes, adapted_config), with_head


def _check_fields(fields: Mapping[str, Any], where: Path) -> None:
    """Check adapter_config.json. Raises InputError naming each field that may change the computation in an unsupported way."""
    if fields.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type = {fields.get('peft_type')!r}: only LORA adapters are read")
    if missing := sorted(name for name in ("r", "lora_alpha") if fields.get(name) is None):
        raise InputError(f"{where}: {', '.join(missing)} is missing; take the file from where the adapter was saved")
    dropout = fields.get("lora_dropout")
    if dropout is not None and (isinstance(dropout, bool) or not isinstance(dropout, int | float)):
        raise InputError(f"{where}: lora_dropout = {dropout!r}: must be a number")
    supported = _READ | _NO_EFFECT
    wrong = [
        f"{name} = {value!r}"
        for name, value in fields.items()
        if name not in supported and not _is_among(value, _ALLOWED.get(name, _OFF))
    ]
    if wrong:
        raise InputError(
            f"{where}: {'; '.join(sorted(wrong))}: not understood; merge the adapter with peft instead "
            "(merge_and_unload, then save_pretrained)"
        )


def _is_among(value: Any, choices: tuple[Any, ...]) -> bool:
    """Return whether the value is one of the choices; 0 is not False."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


def _check_tensors(tensors: Tensors, expected: list[_Tensor], sizes: Mapping[str, int]) -> None:
    """Check names, shapes and dtypes of the tensors. Raises InputError that lists what is missing, extra or different."""
    shapes = {tensor.name: tensor.layout.stored_shape(sizes) for tensor in expected}
    stored, wrong = tensors.stored, []
    if missing := sorted(shapes.keys() - stored.keys()):
        wrong.append(f"missing: {join_names(missing)}")
    if extra := sorted(stored.keys() - shapes.keys()):
        wrong.append(f"not of this model: {join_names(extra)}")
    wrong += describe_mismatches(tensors, shapes)
    if not shapes:
        wrong.append("none of this model")
    if wrong:
        raise InputError(f"{tensors.where}: adapter tensors {'; '.join(wrong)}")


def _assemble(tensors: Tensors, expected: list[_Tensor], sizes: Mapping[str, int], config: ModelConfig) -> Params:
    """Build the parameter tree of the tensors, with stacked layers. An adapter is small, so every process reads all of it."""
    stacks: dict[str, list[np.ndarray]] = {}
    for tensor in expected:
        window = full_window(tensor.layout.parameter_shape(sizes))

        def read(part: tuple[slice, ...], name: str = tensor.name) -> np.ndarray:
            return np.asarray(tensors.read(name, part), np.float32)

        stacks.setdefault(tensor.parameter, []).append(tensor.layout.read_parameter(sizes, window, read))
    params: Params = {}
    if config.has_scalar and "scalar_head/bias" not in stacks:
        stacks["scalar_head/bias"] = [np.zeros(1, np.float32)]
    for path, parts in stacks.items():
        *parents, leaf = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(parts[0] if path.startswith(lora.HEAD) else np.stack(parts))
    return params


def _leaf(params: Params, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params
