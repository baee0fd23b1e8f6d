"""The generation config of a model in any supported format: the source's sampling defaults and the ids that end a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_jax.data import end_ids
from rlhf_jax.errors import InputError
from rlhf_jax.io.gguf_file import open_gguf
from rlhf_jax.io.json_files import read_json
from rlhf_jax.io.location import Location, adapter_base, locate
from rlhf_jax.storage.names import CARD

FILE = "generation_config.json"
_GGUF_ENDS = ("eos", "eot", "eom")


def read_generation(location: Location) -> dict[str, Any]:
    """Read the generation config of a model.

    Its source is generation_config.json, the base's settings in model.json of a run directory, or the metadata of a .gguf file.
    Without generation_config.json the end ids of config.json are used, as in transformers; an adapter in PEFT's format has the
    settings of its base unless it has its own file. Empty when no settings are stored. Raises InputError for a damaged file.

    """
    path = location.path
    if location.kind == "run":
        return _check_fields(_check_object(read_json(path / CARD).get("generation") or {}, path / CARD), path / CARD)
    if location.kind == "gguf":
        fields = open_gguf(path)[2]
        ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in _GGUF_ENDS]
        return {"eos_token_id": list(dict.fromkeys(end for end in ids if end is not None))}
    for file in (path / FILE, path / "adapter_config.json", path / "config.json"):
        if not file.is_file():
            continue
        fields = read_json(file)
        if file.name == FILE:
            return _check_fields(fields, file)
        if file.name == "config.json":
            ends = fields.get("eos_token_id")
            return {} if ends is None else _check_fields({"eos_token_id": ends}, file)
        return read_generation(locate(adapter_base(fields, file)))
    return {}


def _check_object(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: generation = {value!r}: must be an object; restore the file")
    return value


def _check_fields(fields: dict[str, Any], file: Path) -> dict[str, Any]:
    end_ids(fields, str(file))
    return {name: value for name, value in fields.items() if name != "transformers_version"}
