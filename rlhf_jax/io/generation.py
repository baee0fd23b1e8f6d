"""The generation config of a model, wherever it lies: how its source wants to be sampled, and which ids end a response."""

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
    """Read the generation config of a model: generation_config.json, what a run keeps of its base's, or what a .gguf file says.

    Without the file, the end ids of config.json count, as in transformers; an adapter in PEFT's format has its base's
    unless it holds one. Empty when nothing is said. Raises InputError for a damaged file.
    """
    path = location.path
    if location.kind == "run":
        return _checked(_object(read_json(path / CARD).get("generation") or {}, path / CARD), path / CARD)
    if location.kind == "gguf":
        fields = open_gguf(path)[2]
        ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in _GGUF_ENDS]
        return {"eos_token_id": list(dict.fromkeys(end for end in ids if end is not None))}
    for file in (path / FILE, path / "adapter_config.json", path / "config.json"):
        if not file.is_file():
            continue
        fields = read_json(file)
        if file.name == FILE:
            return _checked(fields, file)
        if file.name == "config.json":
            ends = fields.get("eos_token_id")
            return {} if ends is None else _checked({"eos_token_id": ends}, file)
        return read_generation(locate(adapter_base(fields, file)))
    return {}


def _object(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{file}: generation = {value!r}: must be an object; restore the file")
    return value


def _checked(fields: dict[str, Any], file: Path) -> dict[str, Any]:
    end_ids(fields, str(file))
    return {name: value for name, value in fields.items() if name != "transformers_version"}
