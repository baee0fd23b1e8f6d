"""Runs that train adapters: model.json names the base model and the LoRA settings, the checkpoint contains the adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from transformers import PreTrainedTokenizerBase

from rlhf_jax.checkpoint_files.reading import newest_to_read
from rlhf_jax.errors import InputError
from rlhf_jax.io.json_files import read_json
from rlhf_jax.io.location import locate
from rlhf_jax.io.run_directory import normalise_scalar_head, read_model_card, read_parameters
from rlhf_jax.io.tokenizers import load_tokenizer
from rlhf_jax.models import LoraConfig, Model, ModelConfig, int8, lora
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.storage.names import CARD, TOKENIZER
from rlhf_jax.types import Params


class AdapterSource(NamedTuple):
    """The settings and the base of adapters.

    lora: settings. base: path or hub id of the frozen model, for `load_pretrained`. base_step: checkpoint of the base when it is
    a run directory, else None.

    """

    lora: LoraConfig
    base: str
    base_step: int | None


def adapter_card(settings: LoraConfig, base: str) -> dict[str, Any]:
    """Build the ``adapter`` entry of model.json.

    A local base is stored by its absolute path; a run directory also by its step, since it may be trained further.

    """
    location = locate(base)
    step = newest_to_read(location.path) if location.kind == "run" else None
    base_path = str(Path(base).absolute()) if Path(base).exists() else base
    return {"lora": dataclasses.asdict(settings), "base": base_path, "base_step": step}


def read_adapter_card(run_dir: Path) -> AdapterSource | None:
    """Read the ``adapter`` entry of model.json; None for a run that trained all parameters.

    Raises InputError for a damaged entry.

    """
    fields = read_json(run_dir / CARD).get("adapter")
    if fields is None:
        return None
    try:
        return AdapterSource(LoraConfig(**fields["lora"]), str(fields["base"]), fields["base_step"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{run_dir / CARD}: adapter: damaged ({error}); restore the file") from error


def read_adapters(run_dir: Path, subtree: str, model: Model, shardings: Params) -> Params:
    """Read the trained parameters of a run of adapters from its newest checkpoint, replicated on every device.

    model: with its adapters. shardings: of the parameters under the requested head.
    Raises InputError as `read_parameters` does.

    """
    trained = lora.split(model.abstract())[1]
    mesh = jax.tree.leaves(shardings)[0].mesh
    replicated = NamedSharding(mesh, PartitionSpec())
    selected = {name: tree for name, tree in trained.items() if name != lora.HEAD or lora.HEAD in shardings}
    struct: Any = jax.ShapeDtypeStruct
    like = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, sharding=replicated), selected)
    return read_parameters(run_dir, subtree, trained, like)


def merge_adapters(
    base: Params, trained: Params, settings: LoraConfig, config: ModelConfig, shardings: Params
) -> Params:
    """Merge adapters into their base model, sharded by the entries of ``shardings`` that the model has.

    Adapters that were trained over an int8 base are merged into its dequantized weights, since they were trained over those and not
    over the original weights.

    """
    if settings.int8:
        base = int8.rounded_tree(base, Model(config, int8=True).abstract())

    def merge(base: Params, trained: Params) -> Params:
        return lora.merge(lora.combine(base, trained), settings)

    out_shardings = {name: shardings[name] for name in shardings if name in base or name in trained}
    params: Params = jax.jit(merge, out_shardings=out_shardings)(base, trained)
    return params


class Adapter(NamedTuple):
    """Adapters without their base model.

    model: with its ``lora``. trained: adapters and scalar head. base: path or hub id of the base model.

    """

    model: Model
    trained: Params
    tokenizer: PreTrainedTokenizerBase
    base: str


def load_adapter(run_dir: str | Path) -> Adapter:
    """Load the newest checkpoint of a run of adapters onto the first device, without its base.

    A reward model's normalisation is folded into its head. Raises InputError for a run that trained all parameters.

    """
    run_dir = Path(run_dir)
    config, subtree = read_model_card(run_dir)
    source = read_adapter_card(run_dir)
    if source is None:
        raise InputError(f"{run_dir}: trained no adapters; export the whole model")
    model = Model(config, lora=source.lora)
    replicated = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, model.abstract())
    trained = read_adapters(run_dir, subtree, model, shardings)
    if config.head == "scalar":
        trained = normalise_scalar_head(run_dir, trained)
    return Adapter(model, trained, load_tokenizer(run_dir / TOKENIZER), source.base)
