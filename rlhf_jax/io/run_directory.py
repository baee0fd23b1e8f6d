"""Run directories of this package as models: model.json, tokenizer/, the newest complete checkpoint.

Written by `run` (which this room does not import): RUN_DIR/checkpoints/STEP/state holds the pytree,
STEP/host its layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhf_jax.io.json_files import read_json
from rlhf_jax.io.tensors import listed
from rlhf_jax.models import ModelConfig
from rlhf_jax.types import InputError, Params

CARD = "model.json"
NORMALISATION = "reward_normalisation.json"


def read_model_card(path: str | Path) -> tuple[ModelConfig, str]:
    """(configuration, path of the parameters in the saved state) of a run directory. Raises InputError when it is none."""
    card = Path(path) / CARD
    if not card.is_file():
        raise InputError(f"{card}: no such file; give a run directory of train_sft, train_reward or train_ppo")
    fields = read_json(card)
    if not isinstance(fields.get("config"), dict) or not isinstance(fields.get("subtree"), str):
        raise InputError(f"{card}: damaged (needs config and subtree); train again or restore the file")
    return ModelConfig.from_json(json.dumps(fields["config"]), str(card)), fields["subtree"]


def read_parameters(path: str | Path, subtree: str, saved_as: Params, like: Params) -> Params:
    """Parameters of the newest complete checkpoint: those of ``like``, onto its shardings.

    saved_as: all that the model card promises, like: the part to read; trees of ShapeDtypeStructs. Optimizer state is
    not read. Raises InputError: no checkpoint, damaged files, or leaves that are missing, extra, reshaped or re-typed
    (Orbax would cast silently).
    """
    place = _newest(Path(path).absolute())
    saved = _layout(place, subtree)
    leaves = jax.tree_util.tree_leaves_with_path(saved_as)
    wanted = {jax.tree_util.keystr(at, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for at, x in leaves}
    if wrong := sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)):
        told = [f"{name}: saved {saved.get(name)}, {CARD} says {wanted.get(name)}" for name in wrong]
        raise InputError(f"{place}: {listed(told)}; {CARD} and checkpoint are not of one run")
    target: Any = like
    for key in reversed(subtree.split("/")):
        target = {key: target}
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            params = reader.restore(place / "state", args=arguments)
    except Exception as error:
        raise InputError(
            f"{place}: damaged checkpoint ({_first_line(error)}); delete it to use an older one"
        ) from error
    for key in subtree.split("/"):
        params = params[key]
    return params  # type: ignore[no-any-return]


def normalised_scalar_head(run_dir: Path, params: Params) -> Params:
    """A reward model's head with gain and bias of reward_normalisation.json folded in: gain * (w h + b) + bias.

    Raises InputError for a reward run that has not written them yet: its rewards have another scale than it will have.
    """
    file, provenance = run_dir / NORMALISATION, run_dir / "provenance.json"
    if not file.is_file():
        if provenance.is_file() and read_json(provenance).get("stage") == "reward":
            raise InputError(f"{file}: no such file; the reward model is unfinished: give its command again")
        return params
    numbers = read_json(file)
    for name in ("gain", "bias"):
        if isinstance(numbers.get(name), bool) or not isinstance(numbers.get(name), int | float):
            raise InputError(f"{file}: {name} = {numbers.get(name)!r}: must be a number; restore the file")
    head = params["scalar_head"]
    scaled = {"kernel": head["kernel"] * numbers["gain"], "bias": head["bias"] * numbers["gain"] + numbers["bias"]}
    return params | {"scalar_head": scaled}


def _newest(run_dir: Path) -> Path:
    """The newest step whose two items were committed."""
    directory = run_dir / "checkpoints"
    steps = [entry for entry in directory.iterdir() if entry.name.isdigit()] if directory.is_dir() else []
    for step in sorted(steps, key=lambda entry: int(entry.name), reverse=True):
        parts = (step / "state" / "_METADATA", step / "host" / "metadata")
        if all(part.is_file() and part.stat().st_size > 0 for part in parts):
            return step
    raise InputError(f"{directory}: no complete checkpoint here; give a run directory that saved one")


def _layout(place: Path, subtree: str) -> dict[str, list[Any]]:
    """{path below subtree: [shape, dtype]} of what was saved."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            layout = reader.restore(place / "host", args=ocp.args.JsonRestore())["layout"]
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{place}: damaged checkpoint ({_first_line(error)}); delete it to use an older one"
        ) from error
    saved = {name[len(subtree) + 1 :]: entry for name, entry in layout.items() if name.startswith(subtree + "/")}
    if not saved:
        raise InputError(f"{place}: the saved state has no {subtree!r}, which {CARD} names; restore {CARD}")
    return saved


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
