"""Kinds of model paths: run directory, Hugging Face directory, GGUF file, the URL of one of these, or a model on the hub."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rlhf_jax.checkpoint_files.manifest import steps_among
from rlhf_jax.errors import InputError
from rlhf_jax.storage.names import CARD
from rlhf_jax.storage.remote import fetch_url, is_remote

Kind = Literal["run", "huggingface", "gguf"]
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class Location:
    """The kind of a model and its path.

    path: of the files on this machine. revision: the commit of a model from the hub, None for local paths.

    """

    kind: Kind
    path: Path
    revision: str | None = None


def locate(source: str | Path) -> Location:
    """Find the kind of the model at ``source`` and its path on this machine.

    A local path takes precedence. A hub id (``name/model`` or ``name/model@revision``) is downloaded or taken from the cache.
    So is a URL: of a run only its newest complete checkpoint, of a file only the file.
    Raises InputError when no such model exists.

    """
    path = fetch_url(str(source), _select_model_files) if is_remote(source) else Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{source}: a single file must be a .gguf; give the directory that holds the checkpoint")
        return Location("gguf", path)
    if path.is_dir():
        return Location(_directory_kind(path, str(source)), path)
    match = _HUB_ID.fullmatch(str(source))
    if match is None:
        raise InputError(f"{source}: no such file or directory (and no hub id, which looks like name/model)")
    snapshot = _download(match["repo"], match["revision"])
    return Location("huggingface", snapshot, snapshot.name)


def adapter_base(fields: Mapping[str, Any], where: Path) -> str:
    """Return the path or hub id (with the revision, when one is named) of the base model of an adapter_config.json.

    Raises InputError.

    """
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str):
        raise InputError(f"{where}: base_model_name_or_path = {name!r}: name the base model")
    if revision is not None and not isinstance(revision, str):
        raise InputError(f"{where}: revision = {revision!r}: must be a text or null")
    at_hub = not (is_remote(name) or "@" in name or Path(name).expanduser().exists())
    return f"{name}@{revision}" if revision and at_hub else name


def _select_model_files(names: Collection[str]) -> set[str]:
    """Select the files of a model from the names in its directory."""
    if CARD not in names:
        return {
            name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _PATTERNS) and "/" not in name
        }
    newest = max(steps_among(names), default=None)
    parts = ("tokenizer/", f"checkpoints/{newest}/")
    return {n for n in names if n.startswith(parts) or ("/" not in n and n.endswith((".json", ".gin")))}


def _directory_kind(path: Path, label: str) -> Kind:
    """Return the kind of a model's directory. Raises InputError when it is none.

    label: the user's name for the directory, in messages: a URL, not the path of its copy.

    """
    if (path / CARD).is_file():
        return "run"
    if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return "huggingface"
    if gguf_files := sorted(file.name for file in path.glob("*.gguf")):
        raise InputError(f"{label}: give the file itself, for instance {label.rstrip('/')}/{gguf_files[0]}")
    raise InputError(
        f"{label}: neither a run directory ({CARD}) nor a checkpoint directory (config.json); is the path complete?"
    )


@functools.cache
def _download(repo: str, revision: str | None) -> Path:
    """Return the snapshot directory of a hub model, named after its commit.

    The result is cached, so that all readers of a process see the same commit.

    """
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise InputError(
            f"{repo}: access to this model must be asked for on its hub page; then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repo}: no such directory here and no such model on the hub (private? `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise InputError(
            f"{repo}: no such directory here, and not a hub id ({' '.join(str(error).split())})"
        ) from error
    except (HfHubHTTPError, OSError) as error:  # no network, offline mode, nothing in the cache
        raise InputError(
            f"{repo}: no such directory here, and the hub cannot be reached ({type(error).__name__}): check the path, or "
            f"run `hf download {repo}` where there is a network and copy the directory"
        ) from error
