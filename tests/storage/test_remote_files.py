"""Files behind URLs: downloaded once, verified, one version per process; models and data from URLs; errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from rlhf_jax.data import read_rows
from rlhf_jax.errors import InputError
from rlhf_jax.io import export_pretrained, load_pretrained, locate
from rlhf_jax.models import Model
from rlhf_jax.rundir.provenance import describe
from rlhf_jax.storage import remote
from rlhf_jax.storage.inputs import Input
from rlhf_jax.storage.remote import CONTENT, cache_directory, fetch_url
from rlhf_jax.testing import byte_tokenizer, random_params, tiny_config


@pytest.fixture(autouse=True)
def a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Provide an empty cache, and a process that has fetched nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_copies", {})
    yield
    fsspec.filesystem("memory").store.clear()


def another_process() -> None:
    remote._copies.clear()


def put(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", content)


def copies() -> list[Path]:
    return [path for path in cache_directory().glob("*") if path.is_dir()]


def test_a_file_keeps_its_name_and_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    put({"data/a.jsonl": b'{"x": 1}\n'})
    first = fetch_url("memory://bucket/data/a.jsonl")
    assert first.name == "a.jsonl" and first.read_bytes() == b'{"x": 1}\n'
    monkeypatch.setattr(remote, "download", None)  # nothing is copied any more
    another_process()
    assert fetch_url("memory://bucket/data/a.jsonl") == first


def test_another_version_is_another_copy_and_a_process_sees_one() -> None:
    put({"a.txt": b"old"})
    old = fetch_url("memory://bucket/a.txt")
    put({"a.txt": b"new"})
    assert fetch_url("memory://bucket/a.txt") == old and old.read_text() == "old"
    another_process()
    assert fetch_url("memory://bucket/a.txt").read_text() == "new" and old.read_text() == "old"


def test_a_copy_that_was_changed_is_fetched_again() -> None:
    put({"d/a.txt": b"right", "d/b.txt": b"too"})
    place = fetch_url("memory://bucket/d")
    (place / "a.txt").write_text("wrong")
    another_process()
    assert (fetch_url("memory://bucket/d") / "a.txt").read_text() == "right" and copies() == [place]


def test_a_truncated_or_different_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put({"a.txt": b"whole"})
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(type(store), "get_file", lambda self, path, to: Path(to).write_bytes(b"who"))
    with pytest.raises(InputError, match="3 of 5 bytes came"):
        fetch_url("memory://bucket/a.txt")
    monkeypatch.setattr(type(store), "get_file", lambda self, path, to: Path(to).write_bytes(b"whole"))
    monkeypatch.setattr(type(store), "info", lambda self, path: {"size": 5, "md5Hash": "AAAA", "type": "file"})
    with pytest.raises(InputError, match="another md5"):
        fetch_url("memory://bucket/a.txt")
    assert copies() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/absent", "no such file or directory"),
        ("klingon://bucket/x", "Protocol not known: klingon"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("s3://bucket/x", "pip install s3fs"),
        ("zip://x::file:///absent.zip", r"cannot open it \(FileNotFoundError: .*absent.zip"),
        ("reference://x", r"cannot open it \(TypeError: "),
    ],
)
def test_unreachable_urls_are_one_line_errors(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gcsfs", "s3fs"):  # also where they are installed
        monkeypatch.setitem(sys.modules, package, None)
    for use in (fetch_url, locate, lambda url: list(read_rows(f"{url}/a.jsonl"))):
        with pytest.raises(InputError, match=message) as caught:
            use(url)
        assert "\n" not in str(caught.value) and url in str(caught.value)


def test_an_invalid_model_is_named_by_its_url() -> None:
    """The error does not name the path of the copy."""
    put({"d/notes.json": b"{}", "a.txt": b"x"})
    with pytest.raises(InputError, match="^memory://bucket/d: neither a run directory"):
        locate("memory://bucket/d")
    with pytest.raises(InputError, match="^memory://bucket/a.txt: a single file must be a .gguf"):
        locate("memory://bucket/a.txt")


def test_a_name_that_leaves_the_directory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put({"d/a.txt": b"x"})
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(type(store), "find", lambda self, root, detail: {f"{root}/../a.txt": {"size": 1}})
    with pytest.raises(InputError, match="'../a.txt' lies elsewhere"):
        fetch_url("memory://bucket/d")
    assert copies() == []


def test_rows_are_read_from_a_url(tmp_path: Path) -> None:
    put({"rows.jsonl": b'{"x": 1}\n\n{"x": 2}\n'})
    assert list(read_rows("memory://bucket/rows.jsonl")) == [(1, {"x": 1}), (3, {"x": 2})]
    (tmp_path / "rows.jsonl").write_bytes(b'{"x": 1}\n\n{"x": 2}\n')
    remote_input, local_input = (
        describe(Input("data", str(path))) for path in ("memory://bucket/rows.jsonl", tmp_path / "rows.jsonl")
    )
    assert (
        remote_input["path"] == "memory://bucket/rows.jsonl"
        and remote_input["fingerprint"] == local_input["fingerprint"]
    )


def test_a_model_is_read_from_a_url(tmp_path: Path) -> None:
    model = Model(tiny_config(vocab_size=300))
    params = random_params(model, 0)
    export_pretrained(tmp_path / "exported", model, params, byte_tokenizer())
    (tmp_path / "exported" / "training_args.bin").write_bytes(b"not read")
    url = f"file://{tmp_path}/exported"
    loaded = load_pretrained(url)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load_pretrained(tmp_path / "exported").params)
    place = locate(url).path
    assert not (place / "training_args.bin").exists() and (place / "config.json").exists()
    assert place.is_relative_to(cache_directory())


def test_only_the_newest_complete_step_of_a_run_is_fetched() -> None:
    steps = {f"checkpoints/{step}/state/x": b"x" for step in (1, 2, 3)}
    whole = {f"checkpoints/{step}/manifest.json": b"{}" for step in (1, 2)}  # 3 was being copied
    put(
        {
            f"run/{name}": content
            for name, content in {**steps, **whole, "model.json": b"{}", "metrics.jsonl": b""}.items()
        }
    )
    location = locate("memory://bucket/run")
    names = {path.relative_to(location.path).as_posix() for path in location.path.rglob("*") if path.is_file()}
    assert location.kind == "run"
    assert names == {"model.json", "checkpoints/2/state/x", "checkpoints/2/manifest.json", CONTENT}
    assert json.loads((location.path / CONTENT).read_text()).keys() == names - {CONTENT}
