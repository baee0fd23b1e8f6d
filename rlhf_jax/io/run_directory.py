"""Run directories of this package as models: model.json, tokenizer/, the newest complete checkpoint.

Written by `run` (which this room does not import).
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
    """(configuration, path of the parameters in the saved state) of a run directory. Raises InputError when it is none."""
    card = Path(path) / CARD
    if not card.is_file():
        raise InputError(f"{card}: no such file; give a run directory of a training program")
    fields = read_json(card)
    if not isinstance(fields.get("config"), dict) or not isinstance(fields.get("subtree"), str):
        raise InputError(f"{card}: damaged (needs config and subtree); train again or restore the file")
    return ModelConfig.from_json(json.dumps(fields["config"]), str(card)), fields["subtree"]


def read_template(path: str | Path) -> Template | None:
    """Read the template that a model was trained with, from its run directory or its export; None when ``path`` is neither,
    or of a version that kept none.

    Raises InputError for fields that are no template's.
    """
    card, export = Path(path) / CARD, Path(path) / TEMPLATE
    if card.is_file():
        return _template(read_json(card).get("template"), str(card))
    return _template(read_json(export), str(export)) if export.is_file() else None


def template_from(text: str, where: str) -> Template | None:
    """`read_template` of the text of a model.json. Raises InputError."""
    return _template(parse_object(text, where).get("template"), where)


def _template(fields: Any, where: str) -> Template | None:
    if fields is None:
        return None
    try:
        return Template(**fields)
    except (TypeError, InputError) as error:
        raise InputError(f"{where}: template: {error}; train again or restore the file") from error


def read_parameters(
    path: str | Path, subtree: str, saved_as: Params, like: Params, *, step: int | None = None
) -> Params:
    """Parameters of the newest checkpoint, or that of ``step``, every file of which is hashed first: those of ``like``,
    onto its shardings.

    saved_as: all that the model card promises, like: the part to read; trees of ShapeDtypeStructs. Optimizer state is
    not read. Raises DamagedCheckpoint (an older step is not what was asked for, so none is taken in its place), InputError
    for no checkpoint, or leaves that are missing, extra, reshaped or re-typed (Orbax would cast silently).
    """
    with reading_step(path, step) as place:
        return _read_parameters(place, subtree, saved_as, like)


def _read_parameters(place: Path, subtree: str, saved_as: Params, like: Params) -> Params:
    whole = verify(place)["layout"]
    saved = {name[len(subtree) + 1 :]: entry for name, entry in whole.items() if name.startswith(subtree + "/")}
    if not saved:
        raise InputError(f"{place}: the saved state has no {subtree!r}, which {CARD} names; restore {CARD}")
    check_layout(place, saved, layout(saved_as), f"{CARD} and checkpoint are not of one run")
    target: Any = like
    for key in reversed(subtree.split("/")):
        target = {key: target}
    params: Params = read_state(place, target)
    for key in subtree.split("/"):
        params = params[key]
    return params


def wrong_normalisation(gain: float, bias: float) -> str:
    """'gain = 0.0: ...' of numbers that would make every reward the same, turn their order round or make them no numbers; ''."""
    if not (math.isfinite(gain) and gain > 0 and fits_float32(gain)):
        return f"gain = {gain!r}: must be a finite number above 0, in float32 too"
    if not (math.isfinite(bias) and fits_float32(bias)):
        return f"bias = {bias!r}: must be a finite number, in float32 too"
    return ""


def normalised_scalar_head(run_dir: Path, params: Params) -> Params:
    """A reward model's head with gain and bias of reward_normalisation.json folded in: gain * (w h + b) + bias.

    Raises InputError for a reward run that has not written them yet: its rewards have another scale than it will have.
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
    if wrong := wrong_normalisation(numbers["gain"], numbers["bias"]):
        raise InputError(f"{file}: {wrong}; restore the file")
    head = params["scalar_head"]
    scaled = {"kernel": head["kernel"] * numbers["gain"], "bias": head["bias"] * numbers["gain"] + numbers["bias"]}
    return params | {"scalar_head": scaled}
