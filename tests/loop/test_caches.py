"""Tests of private directories for compiled programs, and of checks of thousands of runs."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.launch import check_bindings
from rlhf_jax.loop import cold_start


def test_a_cache_of_a_pipeline_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cache = Path(cold_start.cache_environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"])
    assert cache.parent == tmp_path and stat.S_IMODE(cache.stat().st_mode) == 0o700
    for mode in (0o770, 0o707, 0o722):
        cache.chmod(mode)
        with pytest.raises(
            InputError, match=r"compilation_cache: others may write into it, and compiled programs in it are run"
        ):
            cold_start.make_private_cache(cache)
    cache.chmod(0o755)
    cold_start.make_private_cache(cache)  # others may read
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        cold_start.make_private_cache(cache)


def test_a_cache_of_the_users_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    assert cold_start.cache_environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"] == "/mine"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "dangling"])
def test_a_path_that_is_no_directory_is_named(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "cache"
    place.write_text("") if kind == "file" else place.symlink_to(tmp_path / "absent" / "deeper")
    with pytest.raises(InputError, match="cache: cannot make it"):
        cold_start.make_private_cache(place)


def test_bindings_of_thousands_of_runs_are_no_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument of a program has at most 128 KiB on Linux."""
    calls = []

    def run(command, **options):
        calls.append((command, options["input"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    commands = [check_bindings.Command("train_ppo", ("a.gin",), (f"run.seed = {n}", "x" * 100)) for n in range(2000)]
    check_bindings.check(commands)
    ((command, text),) = calls
    assert max(map(len, command)) < 1000 and len(text) > 200_000
