"""--sync: the run directory at a URL. A machine is lost, another one goes on; a half copied step is never taken for whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import jax.numpy as jnp
import pytest
from doubling_run import train

from rlhf_jax.checkpoint_files.manifest import saved_steps, steps_among, verify
from rlhf_jax.config import BoundConfig
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.rundir import mirror
from rlhf_jax.storage.remote import listing

ROOT = Path(__file__).resolve().parents[2]
URL = "memory://bucket/runs/x"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    """Where --sync=URL leads."""
    monkeypatch.setattr(mirror, "sync_url", lambda: URL)
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


def write(run_dir: Path, text: str) -> None:
    """A run without checkpoints."""
    config = BoundConfig(f"run.text = {text!r}\n", f"run.text = {text!r}\n")
    loop = LoopConfig(tensorboard=False, progress=False)
    with open_run(run_dir, stage="toy", bound=config, seed=0, loop=loop, output="out.txt") as run:
        run.write("out.txt", text)


def there(store: Any) -> set[str]:
    return set(listing(store, "/bucket/runs/x"))


def here(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {".lock"}


def test_another_machine_goes_on_where_one_was_lost(store: Any, tmp_path: Path) -> None:
    assert train(tmp_path / "one", 3) == [1, 2, 3]
    assert there(store) == here(tmp_path / "one") and steps_among(there(store)) == [2, 3]  # retention goes there too
    shutil.rmtree(tmp_path / "one")
    assert train(tmp_path / "other", 5) == [4, 5]
    for step in saved_steps(tmp_path / "other"):
        verify(tmp_path / "other" / "checkpoints" / str(step))
    assert there(store) == here(tmp_path / "other") and steps_among(there(store)) == [4, 5]
    lines = [json.loads(line) for line in store.cat_file("/bucket/runs/x/metrics.jsonl").decode().splitlines()]
    assert [(line["step"], line["w"]) for line in lines] == [(1, 1), (2, 3), (3, 7), (4, 15), (5, 31)]
    assert [p["resumed_step"] for p in json.loads(store.cat_file("/bucket/runs/x/provenance.json"))["launches"]] == [
        0,
        3,
    ]


def test_a_machine_that_has_it_all_fetches_nothing(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", 2)
    monkeypatch.setattr(mirror, "download", None)
    assert train(tmp_path / "run", 3) == [3]


def test_a_step_without_its_manifest_is_not_taken(store: Any, tmp_path: Path) -> None:
    train(tmp_path / "one", 3)
    store.rm("/bucket/runs/x/checkpoints/3/manifest.json")
    assert train(tmp_path / "other", 3) == [3]
    assert steps_among(there(store)) == [2, 3]


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


def test_what_cannot_be_copied_is_told_and_copied_by_the_same_command(
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
    assert saved_steps(tmp_path / "run") == [1, 2] and steps_among(there(store)) == []
    monkeypatch.setattr(type(store), "put_file", put)
    assert train(tmp_path / "run", 2) == []
    assert steps_among(there(store)) == [1, 2] and there(store) == here(tmp_path / "run")


def test_what_is_something_else_is_left_alone(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/runs/x/thesis.pdf", b"%PDF")
    with pytest.raises(InputError, match="holds files and no run"):
        train(tmp_path / "a", 1)
    store.store.clear()
    train(tmp_path / "a", 1)
    before = {name: store.cat_file(f"/bucket/runs/x/{name}") for name in there(store)}
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
    assert {name: store.cat_file(f"/bucket/runs/x/{name}") for name in there(store)} == before
    assert not (tmp_path / "b").exists()


def test_a_start_without_a_step_is_nothing_to_lose(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied by a start that failed early; the next one saved a step and was killed before it could copy."""
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "sync_url", lambda: None)
        train(tmp_path / "run", 1)
    early = {"stage": "toy", "launches": [{"time": "2000-01-01T00:00:00Z"}]}
    store.pipe("/bucket/runs/x/provenance.json", json.dumps(early).encode())
    assert train(tmp_path / "run", 2) == [2] and there(store) == here(tmp_path / "run")


def test_a_run_that_saves_no_steps_is_not_another(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is what there is to lose."""
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
    assert there(store) == here(tmp_path / "four")


def changing(run_dir: Path, at_step: int, do: Any, total: int = 3) -> None:
    """`train`, with ``do()`` before a step, which begins after the copies of the steps before have ended."""
    settings = LoopConfig(save_every=1, keep=2, tensorboard=False, progress=False)
    config = BoundConfig(f"run.steps = {total}\n", f"run.steps = {total}\n")
    with open_run(run_dir, stage="toy", bound=config, seed=0, loop=settings) as run:
        for step in run.steps(0, total):
            if step == at_step:
                do()
            run.log(step, {"w": 1.0})
            run.save(step, {"w": jnp.zeros(2)}, {})


def test_two_runs_on_one_url_one_is_refused(store: Any, tmp_path: Path) -> None:
    """Both started on an empty URL; each copied over the other's files, and a mixture stayed there."""

    def other() -> None:
        with pytest.raises(InputError, match=r"in use by another run \(stage toy, seed 1, .*, or remove owner\.json"):
            changing(tmp_path / "second", 1, lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        opened = mirror.Mirror.claim
        seeds = iter((1, 0))
        patch.setattr(mirror.Mirror, "claim", lambda self, stage, seed, text: opened(self, stage, next(seeds), text))
        changing(tmp_path / "first", 1, other)
    assert there(store) == here(tmp_path / "first") and not (tmp_path / "second").exists()


def test_a_later_start_takes_the_url_over(store: Any, tmp_path: Path) -> None:
    """Of the same run, on another machine: the earlier one copies nothing more, and stops."""
    with pytest.raises(RunStopped, match=f"{URL}: taken over by another start .*let one of the two end"):
        changing(tmp_path / "one", 1, lambda: changing(tmp_path / "two", 9, None))
    assert there(store) == here(tmp_path / "two")


def test_a_mark_that_is_gone_is_not_ours(store: Any, tmp_path: Path) -> None:
    """The start that took over has ended already."""
    with pytest.raises(RunStopped, match="its mark is gone"):
        changing(tmp_path / "one", 1, lambda: store.rm("/bucket/runs/x/owner.json"))
    assert there(store) == set()


def test_the_mark_of_a_killed_start(store: Any, tmp_path: Path) -> None:
    """Of the same run, or of the same directory with another configuration: no other start can be using it."""
    mark = {"stage": "toy", "seed": 0, "operative": "run.steps = 5\n", "host": "lost", "directory": "/lost/run"}
    store.pipe("/bucket/runs/x/owner.json", json.dumps(mark).encode())
    assert train(tmp_path / "run", 1) == [1]
    shutil.rmtree(tmp_path / "run")
    store.store.clear()
    mark |= {"operative": "run.rate = 5\n", "host": os.uname().nodename, "directory": str(tmp_path / "run")}
    store.pipe("/bucket/runs/x/owner.json", json.dumps(mark).encode())
    assert train(tmp_path / "run", 1) == [1] and there(store) == here(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    store.store.clear()
    store.pipe("/bucket/runs/x/owner.json", b"{")  # torn
    assert train(tmp_path / "run", 1) == [1]


def test_fetched_in_an_order_that_a_kill_survives(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", "one")
    order, load = [], mirror.download
    monkeypatch.setattr(mirror, "download", lambda fs, path, *rest: (order.append(path), load(fs, path, *rest)))
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
def test_a_damaged_record_there_is_named(store: Any, tmp_path: Path, text: str) -> None:
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
def test_where_no_copy_can_be(url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path without a scheme made a directory of that name where the command was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "sync_url", lambda: url.format(here=tmp_path))
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", 1)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_used_is_not_copied(store: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="best_metric"):
        train(tmp_path / "run", 1, keep_best=1, best_metric="nothing", evaluate_every=1, log_every=1)
    assert there(store) == set()


def test_a_run_directory_is_local(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a run lives in a local directory; --sync=URL keeps a copy"):
        train("gs://bucket/x", 1)  # type: ignore[arg-type]


def test_the_flag(tmp_path: Path) -> None:
    """Of every experiment; a machine is lost in the middle of its run."""
    program = tmp_path / "program.py"
    program.write_text(
        "import gin, os, signal, doubling_run\nfrom rlhf_jax.config import bound_config; from rlhf_jax.launch import launch\n"
        "@gin.configurable\ndef run(run_dir, steps, kill=False):\n"
        "    bound_config()\n    doubling_run.train(run_dir, steps)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if kill else None\n"
        "launch(run)\n"
    )
    url, settings = f"file://{tmp_path}/bucket/run", {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}

    def start(directory: str, *more: str) -> subprocess.CompletedProcess[str]:
        bindings = [f"--gin_bindings={text}" for text in (f"run.run_dir = '{tmp_path / directory}'", *more)]
        command = [sys.executable, str(program), f"--sync={url}", *bindings]
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)

    assert start("one", "run.steps = 2", "run.kill = True").returncode == -9
    shutil.rmtree(tmp_path / "one")
    done = start("two", "run.steps = 3")
    assert done.returncode == 0, done.stderr
    assert f"fetched from {url} (steps [1, 2])" in done.stderr
    assert saved_steps(tmp_path / "two") == saved_steps(tmp_path / "bucket" / "run") == [2, 3]  # no empty directories
    refused = start("two", "run.steps = 1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
