"""JSON objects in files of models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.storage.files import json_text, read_object


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file. Raises InputError as `rlhf_jax.storage.files` does."""
    return read_object(path, "give a complete checkpoint")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with sorted keys, as UTF-8."""
    path.write_text(json_text(content, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8")
