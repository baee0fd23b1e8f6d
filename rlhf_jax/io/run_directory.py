"""Run directories of this package as models: model.json, tokenizer/ and the newest complete checkpoint.

They are written by `rundir`, which this package does not import.

"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rlhf_jax.checkpoint_files.manifest import check_layout, layout, read_state, verify
from rlhf_jax.checkpoint_files.reading import reading_step
from rlhf_jax.data import Template
from rlhf_jax.errors import InputError, fits_float32
from rlhf_jax.io.json_files import read_json
from rlhf_jax.models import ModelConfig
from rlhf_jax.storage.files import parse_object
from rlhf_jax.storage.names import CARD, NORMALISATION, PROVENANCE, TEMPLATE
from rlhf_jax.types import Params


def read_model_card(path: str | Path) -> tuple[ModelConfig, str]:
    """Read from the model.json of a run directory the model's configuration and the path of its parameters in the saved state.

    Raises InputError when ``path`` is not a run directory or its model.json is damaged.
    """
    card = Path(path) / CARD
    if not card.is_file():
        raise InputError(f"{card}: no such file; give a run directory of a training program")
    fields = read_json(card)
    if not isinstance(fields.get("config"), dict) or not isinstance(fields.get("subtree"), str):
        raise InputError(f"{card}: damaged (needs config and subtree); train again or restore the file")
    return ModelConfig.from_json(json.dumps(fields["config"]), str(card)), fields["subtree"]


def read_template(path: str | Path) -> Template | None:
    """Read the template that a model was trained with, from its run directory or its export; None when none is stored.

    Raises InputError for invalid fields.

    """
    card, export = Path(path) / CARD, Path(path) / TEMPLATE
    if card.is_file():
        return _build_template(read_json(card).get("template"), str(card))
    return _build_template(read_json(export), str(export)) if export.is_file() else None


def parse_template(text: str, where: str) -> Template | None:
    """Parse the template in the text of a model.json; None when it has none. Raises InputError."""
    return _build_template(parse_object(text, where).get("template"), where)


def _build_template(fields: Any, where: str) -> Template | None:
    if fields is None:
        return None
    try:
        return Template(**fields)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: template: {error}; train again or restore the file") from error


def read_parameters(
    path: str | Path, subtree: str, saved_as: Params, like: Params, *, step: int | None = None
) -> Params:
    """Read the parameters in ``like`` from the newest checkpoint, or that of ``step``, after hashing all its files.

    saved_as: all parameters of the model card. like: the part to read, with shardings. Both are trees of ShapeDtypeStructs.
    Optimizer state is not read. Raises DamagedCheckpoint (no older step is used in its place), and InputError for no checkpoint, or
    for parameters that are missing, extra, or of another shape or dtype (Orbax would cast silently).

    """
    with reading_step(path, step) as step_dir:
        return _read_parameters(step_dir, subtree, saved_as, like)


def _read_parameters(step_dir: Path, subtree: str, saved_as: Params, like: Params) -> Params:
    saved_layout = verify(step_dir)["layout"]
    saved = {name[len(subtree) + 1 :]: entry for name, entry in saved_layout.items() if name.startswith(subtree + "/")}
    if not saved:
        raise InputError(f"{step_dir}: the saved state has no {subtree!r}, which {CARD} names; restore {CARD}")
    check_layout(step_dir, saved, layout(saved_as), f"{CARD} and checkpoint are not of one run")
    target: Any = like
    for key in reversed(subtree.split("/")):
        target = {key: target}
    params: Params = read_state(step_dir, target)
    for key in subtree.split("/"):
        params = params[key]
    return params


def normalisation_problem(gain: float, bias: float) -> str:
    """Return 'gain = 0.0: ...' for numbers that would equate, reverse or overflow the rewards; '' for valid numbers."""
    if not (math.isfinite(gain) and gain > 0 and fits_float32(gain)):
        return f"gain = {gain!r}: must be a finite number above 0, in float32 too"
    if not (math.isfinite(bias) and fits_float32(bias)):
        return f"bias = {bias!r}: must be a finite number, in float32 too"
    return ""


def normalise_scalar_head(run_dir: Path, params: Params) -> Params:
    """Return ``params`` with the reward model's head times gain plus bias of reward_normalisation.json: gain * (w h + b) + bias.

    Raises InputError for a reward run that has not written the file yet, since its rewards would have another scale.

    """
    file, provenance = run_dir / NORMALISATION, run_dir / PROVENANCE
    if not file.is_file():
        if provenance.is_file() and read_json(provenance).get("stage") == "reward":
            raise InputError(f"{file}: no such file; the reward model is unfinished: give its command again")
        return params
    numbers = read_json(file)
    for name in ("gain", "bias"):
        if isinstance(numbers.get(name), bool) or not isinstance(numbers.get(name), int | float):
            raise InputError(f"{file}: {name} = {numbers.get(name)!r}: must be a number; restore the file")
    if wrong := normalisation_problem(numbers["gain"], numbers["bias"]):
        raise InputError(f"{file}: {wrong}; restore the file")
    head = params["scalar_head"]
    scaled = {"kernel": head["kernel"] * numbers["gain"], "bias": head["bias"] * numbers["gain"] + numbers["bias"]}
    return params | {"scalar_head": scaled}
