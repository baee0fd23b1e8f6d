"""A second start of the same run compiles nothing."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from experiment_processes import command, finish, start
from forked_programs import Server

from rlhf_jax.errors import InputError
from rlhf_jax.loop.cold_start import watch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_second_start_takes_every_program_from_the_cache(tmp_path: Path) -> None:
    reports = []
    for _ in range(2):
        run = command("train_sft", "configs/smoke/base.gin", RUN_DIR=tmp_path / "run")
        more = [f"--compilation_cache={tmp_path / 'cache'}", "--gin_bindings=run.steps = 2"]
        _, stderr = finish(start([*run, *more]))
        reports.append(
            re.search(r"first step done [\d.]+ s after the start \((\d+) programs compiled, (\d+) from", stderr)
        )
        shutil.rmtree(tmp_path / "run")  # the same run again, from its beginning
    first, second = reports
    assert first and second
    assert int(first[1]) > 5 and int(first[2]) < int(first[1])
    assert int(second[1]) == 0 and int(second[2]) >= int(first[1])


PROGRAM = """
PRELUDE
import jax, jax.numpy as jnp, os, sys
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] or None)  # as when it is imported
from rlhf_jax.loop import cold_start
cold_start.watch(sys.argv[1] or None)
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((50, 50))).block_until_ready()
cold_start.report_first_step()
"""


BUCKET = """
import fsspec, os
from fsspec.implementations.dirfs import DirFileSystem

class Bucket(DirFileSystem):  # gs:// as a directory: the very way of JAX's cache through etils and fsspec, without a network
    protocol = "gs"
    def __init__(self, **_):
        super().__init__(path=os.environ["XDG_CACHE_HOME"], fs=fsspec.filesystem("file", auto_mkdir=True))
    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://")

for name in ("gs", "gcs"):
    fsspec.register_implementation(name, Bucket, clobber=True)
"""


Start = Callable[..., tuple[str, str]]


@pytest.fixture
def start_with(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that runs the program with a flag, a home for caches and more of its environment."""

    def call(flag: str, cache_home: Path, prelude: str = "", **more: str) -> tuple[str, str]:
        local = tmp_path_factory.mktemp("start")
        (local / "program.py").write_text(PROGRAM.replace("PRELUDE", prelude))
        environment = {"XDG_CACHE_HOME": str(cache_home), "JAX_COMPILATION_CACHE_DIR": ""} | more
        result = server(local, ["program.py", flag], environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip(), result.stderr

    return call


def test_programs_are_kept_by_default_and_found_again(start_with: Start, tmp_path: Path) -> None:
    cache_home = tmp_path / "cache"
    directory, first = start_with("", cache_home)
    assert directory == str(cache_home / "rlhf_jax" / "compiled")
    assert re.search(r"\([1-9]\d* programs compiled, 0 from the cache\)", first)
    _, second = start_with("", cache_home)
    assert re.search(r"\(0 programs compiled, [1-9]\d* from the cache\)", second)


def test_a_cache_in_a_bucket(start_with: Start, tmp_path: Path) -> None:
    """What one machine compiled another finds there."""
    directory, first = start_with("gs://mine/cache", tmp_path, BUCKET)
    assert directory == "gs://mine/cache" and re.search(r"\([1-9]\d* programs compiled, 0 from the cache\)", first)
    assert list((tmp_path / "mine" / "cache").glob("*-cache"))
    _, second = start_with("gs://mine/cache", tmp_path, BUCKET)
    assert re.search(r"\(0 programs compiled, [1-9]\d* from the cache\)", second)


def test_a_bucket_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match="gs://mine/cache: .* pip install gcsfs"):
        watch("gs://mine/cache")


def test_environment_overrides_default_and_off_overrides_both(start_with: Start, tmp_path: Path) -> None:
    own_cache = str(tmp_path / "mine")
    assert start_with("", tmp_path / "cache", JAX_COMPILATION_CACHE_DIR=own_cache)[0] == own_cache
    directory, message = start_with("off", tmp_path / "cache", JAX_COMPILATION_CACHE_DIR=own_cache)
    assert directory == "None" and "(no compilation cache)" in message
    assert not (tmp_path / "cache").exists()


def test_without_a_place_to_keep_them_programs_are_compiled(start_with: Start, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    directory, message = start_with("", tmp_path / "cache")
    assert directory == "None" and "(no compilation cache)" in message
