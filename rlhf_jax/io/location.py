"""What a path given by a user is: a run directory, a Hugging Face directory, a GGUF file, one of these behind a URL, or a model on
the hub."""

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
from rlhf_jax.storage.remote import fetched, is_remote

Kind = Literal["run", "huggingface", "gguf"]
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class Location:
    """path: where the files lie on this machine. revision: the commit of a model from the hub, None for local paths."""

    kind: Kind
    path: Path
    revision: str | None = None


def locate(given: str | Path) -> Location:
    """Find out what ``given`` is; a hub id (``name/model`` or ``name/model@revision``) is downloaded or taken from the cache,
    what is behind a URL too: of a run its newest whole checkpoint, of a file it alone.

    What exists locally is local. Raises InputError when there is no such thing anywhere.
    """
    path = fetched(str(given), _of_a_model) if is_remote(given) else Path(given).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{given}: a single file must be a .gguf; give the directory that holds the checkpoint")
        return Location("gguf", path)
    if path.is_dir():
        return Location(_kind_of_directory(path, str(given)), path)
    match = _HUB_ID.fullmatch(str(given))
    if match is None:
        raise InputError(f"{given}: no such file or directory (and no hub id, which looks like name/model)")
    snapshot = _download(match["repo"], match["revision"])
    return Location("huggingface", snapshot, snapshot.name)


def adapter_base(fields: Mapping[str, Any], where: Path) -> str:
    """What `locate` finds the base of an adapter_config.json by: a path, or the hub id with the revision that is named.

    Raises InputError.
    """
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str):
        raise InputError(f"{where}: base_model_name_or_path = {name!r}: name the base model")
    if revision is not None and not isinstance(revision, str):
        raise InputError(f"{where}: revision = {revision!r}: must be a text or null")
    at_hub = not (is_remote(name) or "@" in name or Path(name).expanduser().exists())
    return f"{name}@{revision}" if revision and at_hub else name


def _of_a_model(names: Collection[str]) -> set[str]:
    """Of the files of a directory those that are read."""
    if CARD not in names:
        return {name for name in names if any(fnmatch.fnmatch(name, wanted) for wanted in _WANTED) and "/" not in name}
    newest = max(steps_among(names), default=None)
    parts = ("tokenizer/", f"checkpoints/{newest}/")
    return {n for n in names if n.startswith(parts) or ("/" not in n and n.endswith((".json", ".gin")))}


def _kind_of_directory(path: Path, given: str) -> Kind:
    """given: what the user calls it, in messages: a URL, not where its copy lies."""
    if (path / CARD).is_file():
        return "run"
    if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return "huggingface"
    if found := sorted(file.name for file in path.glob("*.gguf")):
        raise InputError(f"{given}: give the file itself, for instance {given.rstrip('/')}/{found[0]}")
    raise InputError(
        f"{given}: neither a run directory ({CARD}) nor a checkpoint directory (config.json); is the path complete?"
    )


@functools.cache
def _download(repo: str, revision: str | None) -> Path:
    """The snapshot directory of a hub model, named after its commit. Once per process: all its readers see one commit."""
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
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
