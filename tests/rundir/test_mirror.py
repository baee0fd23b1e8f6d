"""Tests of --sync: resuming on another machine, incomplete steps, ownership of the URL, errors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import jax.numpy as jnp
import pytest
from doubling_run import train
from forked_programs import Result, Server

from rlhf_jax.checkpoint_files.manifest import saved_steps, steps_among, verify
from rlhf_jax.config import BoundConfig
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.rundir import mirror
from rlhf_jax.storage.remote import list_files

ROOT = Path(__file__).resolve().parents[2]
URL = "memory://bucket/runs/x"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    """The file system of --sync=URL."""
    monkeypatch.setattr(mirror, "sync_url", lambda: URL)
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


def write(run_dir: Path, text: str) -> None:
    """Run a program that writes one file and no checkpoints."""
    config = BoundConfig(f"run.text = {text!r}\n", f"run.text = {text!r}\n")
    loop = LoopConfig(tensorboard=False, progress=False)
    with open_run(run_dir, stage="toy", bound=config, seed=0, loop=loop, output="out.txt") as run:
        run.write("out.txt", text)


def remote_files(store: Any) -> set[str]:
    return set(list_files(store, "/bucket/runs/x"))


def local_files(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {".lock"}


def test_another_machine_resumes_the_run(store: Any, tmp_path: Path) -> None:
    assert train(tmp_path / "one", 3) == [1, 2, 3]
    assert remote_files(store) == local_files(tmp_path / "one") and steps_among(remote_files(store)) == [
        2,
        3,
    ]  # retention goes there too
    shutil.rmtree(tmp_path / "one")
    assert train(tmp_path / "other", 5) == [4, 5]
    for step in saved_steps(tmp_path / "other"):
        verify(tmp_path / "other" / "checkpoints" / str(step))
    assert remote_files(store) == local_files(tmp_path / "other") and steps_among(remote_files(store)) == [4, 5]
    lines = [json.loads(line) for line in store.cat_file("/bucket/runs/x/metrics.jsonl").decode().splitlines()]
    assert [(line["step"], line["w"]) for line in lines] == [(1, 1), (2, 3), (3, 7), (4, 15), (5, 31)]
    assert [p["resumed_step"] for p in json.loads(store.cat_file("/bucket/runs/x/provenance.json"))["launches"]] == [
        0,
        3,
    ]


def test_nothing_is_downloaded_when_up_to_date(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", 2)
    monkeypatch.setattr(mirror, "download", None)
    assert train(tmp_path / "run", 3) == [3]


def test_step_without_a_manifest_is_ignored(store: Any, tmp_path: Path) -> None:
    train(tmp_path / "one", 3)
    store.rm("/bucket/runs/x/checkpoints/3/manifest.json")
    assert train(tmp_path / "other", 3) == [3]
    assert steps_among(remote_files(store)) == [2, 3]


def test_logs_go_before_a_step_and_its_manifest_last(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, put = [], type(store).put_file
    monkeypatch.setattr(
        type(store), "put_file", lambda self, a, b: (order.append(b.split("x/", 1)[1]), put(self, a, b))
    )
    train(tmp_path / "run", 1)
    step = [name for name in order if name.startswith("checkpoints/1/")]
    assert len(step) > 2 and step[-1] == "checkpoints/1/manifest.json"
    assert max(order.index("metrics.jsonl"), order.index("provenance.json")) < order.index(step[0])


def test_failed_upload_is_reported_and_repeated(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put = type(store).put_file

    def broken(self: Any, path: str, to: str) -> None:
        if "/state/" in to:
            raise ConnectionError("no route")
        put(self, path, to)

    monkeypatch.setattr(type(store), "put_file", broken)
    with pytest.raises(RunStopped, match=f"{URL}: cannot copy the run there .*no route.* the same command copies it"):
        train(tmp_path / "run", 2)
    assert saved_steps(tmp_path / "run") == [1, 2] and steps_among(remote_files(store)) == []
    monkeypatch.setattr(type(store), "put_file", put)
    assert train(tmp_path / "run", 2) == []
    assert steps_among(remote_files(store)) == [1, 2] and remote_files(store) == local_files(tmp_path / "run")


def test_other_content_at_the_url_is_an_error(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/runs/x/thesis.pdf", b"%PDF")
    with pytest.raises(InputError, match="holds files and no run"):
        train(tmp_path / "a", 1)
    store.store.clear()
    train(tmp_path / "a", 1)
    before = {name: store.cat_file(f"/bucket/runs/x/{name}") for name in remote_files(store)}
    with pytest.raises(InputError, match="a run of stage 'toy', this is 'sft'"):
        train(tmp_path / "b", 1, stage="sft")
    with pytest.raises(InputError, match="seed changed from 0 to 1"):
        train(tmp_path / "c", 1, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "sync_url", lambda: None)
        train(tmp_path / "d", 2)
    provenance = json.loads((tmp_path / "d" / "provenance.json").read_text())
    provenance["launches"][0]["time"] = "2000-01-01T00:00:00Z"
    (tmp_path / "d" / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(InputError, match="another run than"):
        train(tmp_path / "d", 3)
    assert {name: store.cat_file(f"/bucket/runs/x/{name}") for name in remote_files(store)} == before
    assert not (tmp_path / "b").exists()


def test_remote_start_without_steps_is_overwritten(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start failed early and uploaded its record; the next one saved a step and was killed before its upload."""
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "sync_url", lambda: None)
        train(tmp_path / "run", 1)
    early = {"stage": "toy", "launches": [{"time": "2000-01-01T00:00:00Z"}]}
    store.pipe("/bucket/runs/x/provenance.json", json.dumps(early).encode())
    assert train(tmp_path / "run", 2) == [2] and remote_files(store) == local_files(tmp_path / "run")


def test_runs_without_steps_are_compared_by_output(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output counts as a step."""
    write(tmp_path / "one", "one")
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "sync_url", lambda: None)
        write(tmp_path / "two", "two")
    provenance = json.loads((tmp_path / "two" / "provenance.json").read_text())
    provenance["launches"][0]["time"] = "2000-01-01T00:00:00Z"
    (tmp_path / "two" / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(InputError, match=f"{URL}: another run than {tmp_path}/two"):
        write(tmp_path / "two", "two")
    assert store.cat_file("/bucket/runs/x/out.txt") == b"one"
    with pytest.raises(InputError, match="run.text changed from 'one' to 'three'"):
        write(tmp_path / "three", "three")
    write(tmp_path / "four", "one")
    assert remote_files(store) == local_files(tmp_path / "four")


def train_with_change(run_dir: Path, at_step: int, do: Any, total: int = 3) -> None:
    """Train, and call ``do()`` before step ``at_step``, when the uploads of earlier steps have ended."""
    settings = LoopConfig(save_every=1, keep=2, tensorboard=False, progress=False)
    config = BoundConfig(f"run.steps = {total}\n", f"run.steps = {total}\n")
    with open_run(run_dir, stage="toy", bound=config, seed=0, loop=settings) as run:
        for step in run.steps(0, total):
            if step == at_step:
                do()
            run.log(step, {"w": 1.0})
            run.save(step, {"w": jnp.zeros(2)}, {})


def test_two_runs_on_one_url_one_is_refused(store: Any, tmp_path: Path) -> None:
    """Regression: two runs started on an empty URL and overwrote each other's files."""

    def other() -> None:
        with pytest.raises(InputError, match=r"in use by another run \(stage toy, seed 1, .*, or remove owner\.json"):
            train_with_change(tmp_path / "second", 1, lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        opened = mirror.Mirror.claim
        seeds = iter((1, 0))
        patch.setattr(mirror.Mirror, "claim", lambda self, stage, seed, text: opened(self, stage, next(seeds), text))
        train_with_change(tmp_path / "first", 1, other)
    assert remote_files(store) == local_files(tmp_path / "first") and not (tmp_path / "second").exists()


def test_a_later_start_takes_the_url_over(store: Any, tmp_path: Path) -> None:
    """A start of the same run on another machine: the earlier one uploads nothing more and stops."""
    with pytest.raises(RunStopped, match=f"{URL}: taken over by another start .*let one of the two end"):
        train_with_change(tmp_path / "one", 1, lambda: train_with_change(tmp_path / "two", 9, None))
    assert remote_files(store) == local_files(tmp_path / "two")


def test_a_missing_mark_stops_the_run(store: Any, tmp_path: Path) -> None:
    """The start that took the URL over has already ended."""
    with pytest.raises(RunStopped, match="its mark is gone"):
        train_with_change(tmp_path / "one", 1, lambda: store.rm("/bucket/runs/x/owner.json"))
    assert remote_files(store) == set()


def test_the_mark_of_a_killed_start(store: Any, tmp_path: Path) -> None:
    """A mark of the same run, or of the same directory with another configuration, is replaced."""
    mark = {"stage": "toy", "seed": 0, "operative": "run.steps = 5\n", "host": "lost", "directory": "/lost/run"}
    store.pipe("/bucket/runs/x/owner.json", json.dumps(mark).encode())
    assert train(tmp_path / "run", 1) == [1]
    shutil.rmtree(tmp_path / "run")
    store.store.clear()
    mark |= {"operative": "run.rate = 5\n", "host": os.uname().nodename, "directory": str(tmp_path / "run")}
    store.pipe("/bucket/runs/x/owner.json", json.dumps(mark).encode())
    assert train(tmp_path / "run", 1) == [1] and remote_files(store) == local_files(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    store.store.clear()
    store.pipe("/bucket/runs/x/owner.json", b"{")  # torn
    assert train(tmp_path / "run", 1) == [1]


def test_download_order_survives_a_kill(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", "one")
    order, load = [], mirror.download
    monkeypatch.setattr(
        mirror, "download", lambda fs, path, *arguments: (order.append(path), load(fs, path, *arguments))
    )
    write(tmp_path / "two", "one")
    names = [path.split("x/", 1)[1] for path in order]
    assert names[0] == "provenance.json" and names[-1] == "out.txt" and len(names) > 3


def test_a_name_that_leaves_the_directory_is_refused(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "one", 1)
    find = type(store).find
    monkeypatch.setattr(
        type(store), "find", lambda self, root, detail: find(self, root, detail=True) | {f"{root}/../../x": {"size": 1}}
    )
    with pytest.raises(InputError, match="'../../x' lies elsewhere"):
        train(tmp_path / "two", 1)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("text", ["", "{}", '{"stage": "toy", "launches": []}', '{"sta'])
def test_damaged_remote_provenance_is_named(store: Any, tmp_path: Path, text: str) -> None:
    store.pipe("/bucket/runs/x/provenance.json", text.encode())
    with pytest.raises(InputError, match=f"{URL}: provenance.json is damaged there; .* give --sync another URL"):
        train(tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "--sync='': no URL; give one"),
        ("gs:/bucket/x", "--sync='gs:/bucket/x': no URL; give one"),
        ("klingon://x", "--sync=klingon://x: Protocol not known: klingon"),
        (
            "file://{here}/run",
            "--sync=file://.*: the run directory, .*/run, or one in the other; give it another place",
        ),
        ("file://{here}/run/copy", "or one in the other"),
        ("file://{here}", "or one in the other"),
    ],
)
def test_invalid_urls(url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a path without a scheme made a directory of that name in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "sync_url", lambda: url.format(here=tmp_path))
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", 1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_uploaded_after_an_input_error(store: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="best_metric"):
        train(tmp_path / "run", 1, keep_best=1, best_metric="nothing", evaluate_every=1, log_every=1)
    assert remote_files(store) == set()


def test_a_run_directory_is_local(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a run lives in a local directory; --sync=URL keeps a copy"):
        train("gs://bucket/x", 1)  # type: ignore[arg-type]


def test_sync_flag(server: Server, tmp_path: Path) -> None:
    """A program is killed in the middle of its run and started again in another directory."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import gin, os, signal, sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport doubling_run\n"
        "from rlhf_jax.config import bound_config; from rlhf_jax.launch import launch\n"
        "@gin.configurable\ndef run(run_dir, steps, kill=False):\n"
        "    bound_config()\n    doubling_run.train(run_dir, steps)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if kill else None\n"
        "launch(run)\n"
    )
    url = f"file://{tmp_path}/bucket/run"

    def start(directory: str, *more: str) -> Result:
        bindings = [f"--gin_bindings={text}" for text in (f"run.run_dir = '{tmp_path / directory}'", *more)]
        return server(tmp_path, [str(program), f"--sync={url}", *bindings])

    assert start("one", "run.steps = 2", "run.kill = True").returncode == -9
    shutil.rmtree(tmp_path / "one")
    result = start("two", "run.steps = 3")
    assert result.returncode == 0, result.stderr
    assert f"fetched from {url} (steps [1, 2])" in result.stderr
    assert saved_steps(tmp_path / "two") == saved_steps(tmp_path / "bucket" / "run") == [2, 3]  # no empty directories
    refused = start("two", "run.steps = 1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
