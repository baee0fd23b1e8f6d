"""Runs of adapters: model.json names the base and the settings, the checkpoint holds the adapters."""

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
from rlhf_jax.io.run_directory import normalised_scalar_head, read_model_card, read_parameters
from rlhf_jax.io.tokenizers import load_tokenizer
from rlhf_jax.models import LoraConfig, Model, ModelConfig, int8, lora
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.storage.names import CARD, TOKENIZER
from rlhf_jax.types import Params


class AdapterSource(NamedTuple):
    """lora: settings. base: what `load_pretrained` loads the frozen model from; base_step: its checkpoint when it is a run."""

    lora: LoraConfig
    base: str
    base_step: int | None


def adapter_card(settings: LoraConfig, base: str) -> dict[str, Any]:
    """The ``adapter`` entry of model.json. A local base is kept by its absolute path, a run also by its step: it may be
    trained further meanwhile."""
    location = locate(base)
    step = newest_to_read(location.path) if location.kind == "run" else None
    there = str(Path(base).absolute()) if Path(base).exists() else base
    return {"lora": dataclasses.asdict(settings), "base": there, "base_step": step}


def read_adapter_card(run_dir: Path) -> AdapterSource | None:
    """None for a run that trained everything. Raises InputError for a damaged card."""
    fields = read_json(run_dir / CARD).get("adapter")
    if fields is None:
        return None
    try:
        return AdapterSource(LoraConfig(**fields["lora"]), str(fields["base"]), fields["base_step"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{run_dir / CARD}: adapter: damaged ({error}); restore the file") from error


def read_adapters(run_dir: Path, subtree: str, model: Model, shardings: Params) -> Params:
    """What the newest checkpoint of a run of adapters trained. model: with its adapters. shardings: of the parameters under
    the wanted head; adapters, which are small, lie whole on every device. Raises InputError as `read_parameters` does."""
    trained = lora.split(model.abstract())[1]
    mesh = jax.tree.leaves(shardings)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    wanted = {name: tree for name, tree in trained.items() if name != lora.HEAD or lora.HEAD in shardings}
    struct: Any = jax.ShapeDtypeStruct
    like = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype, sharding=everywhere), wanted)
    return read_parameters(run_dir, subtree, trained, like)


def merged(base: Params, trained: Params, settings: LoraConfig, config: ModelConfig, shardings: Params) -> Params:
    """Base and adapters as one model, on its shards (those of the parameters that there are). Adapters that were trained over
    an int8 base are merged into the numbers that they were trained over, not into those that it was made from."""
    if settings.int8:
        base = int8.rounded_tree(base, Model(config, int8=True).abstract())

    def merge(base: Params, trained: Params) -> Params:
        return lora.merge(lora.combine(base, trained), settings)

    there = {name: shardings[name] for name in shardings if name in base or name in trained}
    made: Params = jax.jit(merge, out_shardings=there)(base, trained)
    return made


class Adapter(NamedTuple):
    """What a run of adapters trained, by itself: model with its ``lora``, adapters (and scalar head), tokenizer, and what the
    base was loaded from."""

    model: Model
    trained: Params
    tokenizer: PreTrainedTokenizerBase
    base: str


def load_adapter(run_dir: str | Path) -> Adapter:
    """The newest checkpoint of a run of adapters, on the first device, without its base. A reward model's normalisation is
    folded into its head. Raises InputError for a run that trained everything."""
    run_dir = Path(run_dir)
    config, subtree = read_model_card(run_dir)
    source = read_adapter_card(run_dir)
    if source is None:
        raise InputError(f"{run_dir}: trained no adapters; export the whole model")
    model = Model(config, lora=source.lora)
    everywhere = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    shardings = jax.tree.map(lambda _: everywhere, model.abstract())
    trained = read_adapters(run_dir, subtree, model, shardings)
    if config.head == "scalar":
        trained = normalised_scalar_head(run_dir, trained)
    return Adapter(model, trained, load_tokenizer(run_dir / TOKENIZER), source.base)
