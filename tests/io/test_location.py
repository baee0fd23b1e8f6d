"""Kinds of model paths; the hub is replaced by a function, except in one offline test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from llama_files import llama_fields, llama_tensors, write_checkpoint

from rlhf_jax.errors import InputError
from rlhf_jax.io import Location, load_pretrained, locate
from rlhf_jax.io.location import _download

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A hub that has one small model, as a snapshot named after its commit; yields the list of requests."""
    snapshot = write_checkpoint(tmp_path / "snapshots" / COMMIT, llama_fields(), llama_tensors(llama_fields()))
    requests = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in allow_patterns)
        requests.append((repo, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _download.cache_clear()
    yield requests
    _download.cache_clear()


def test_a_hub_id_is_downloaded_once_and_known_by_its_commit(hub: list[tuple[str, str | None]]) -> None:
    first = locate("name/model")
    assert first.kind == "huggingface" and first.revision == COMMIT
    assert locate("name/model") == first
    assert locate("name.x/model-1.5@refs/pr/1") == first
    assert load_pretrained("name/model").model.config.hidden_size == 32
    assert hub == [("name/model", None), ("name.x/model-1.5", "refs/pr/1")]


def test_a_local_path_takes_precedence(hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name" / "model").mkdir(parents=True)
    (tmp_path / "name" / "model" / "config.json").write_text("{}")
    assert locate("name/model") == Location("huggingface", Path("name/model"))
    (tmp_path / "name" / "model" / "model.json").write_text("{}")
    assert locate("name/model").kind == "run"
    (tmp_path / "x.GGUF").write_bytes(b"")
    assert locate(tmp_path / "x.GGUF") == Location("gguf", tmp_path / "x.GGUF")
    assert hub == []


def test_missing_paths_are_refused(hub: list[Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "a.gguf").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path, words in {
        "absent": "no such file or directory",
        "empty": "neither a run directory .model.json. nor a checkpoint directory .config.json.",
        "quantised": "give the file itself, for instance .*a.gguf",
        "model.safetensors": "must be a .gguf; give the directory",
    }.items():
        with pytest.raises(InputError, match=words):
            locate(tmp_path / path)
    assert hub == []


def fail(error: type[Exception]) -> Any:
    response: Any = SimpleNamespace(headers={}, request=None)

    def snapshot_download(*_: Any, **__: Any) -> str:
        if error in (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise error("what the hub says\non several lines", response=response)
        raise error("what the library says\non several lines")

    return snapshot_download


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "access to this model must be asked for"),
        (RepositoryNotFoundError, "no such directory here and no such model on the hub"),
        (RevisionNotFoundError, "the hub has no revision 'v1'"),
        (LocalEntryNotFoundError, "no such directory here, and the hub cannot be reached"),
        (ConnectionError, "no such directory here, and the hub cannot be reached"),
    ],
)
def test_each_failure_of_the_hub_is_one_line(
    error: type[Exception], words: str, hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(error))
    with pytest.raises(InputError, match=f"^runs/absent: {words}") as caught:
        locate("runs/absent@v1")
    assert "\n" not in str(caught.value)


def test_offline_is_one_clear_line() -> None:
    """The tests run with HF_HUB_OFFLINE=1, so this uses the real library without network."""
    _download.cache_clear()
    with pytest.raises(InputError, match="^runs/absent: no such directory here, and the hub cannot be reached"):
        load_pretrained("runs/absent")
