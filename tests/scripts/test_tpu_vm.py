"""scripts/tpu_vm.sh: the commands of a dry run, pasted into a shell that has a pretended gcloud; what is refused."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "NAME": "ppo",
    "ZONE": "us-east5-a",
    "PROJECT": "mine",
    "ACCELERATOR": "v5p-32",
    "VERSION": "v2-alpha-tpuv5",
    "REPO": "https://example.org/me/rlhf_jax",
    "BUCKET": "gs://mine/runs",
    "RUN_DIR": "runs/x",
    "DRY_RUN": "1",
}


def script(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    command = ["bash", str(ROOT / "scripts" / "tpu_vm.sh"), *arguments]
    return subprocess.run(command, env={**environment, **settings}, capture_output=True, text=True, timeout=60)


def test_create_asks_for_the_slice() -> None:
    completions = script("create", **SETTINGS, SPOT="1")
    assert completions.returncode == 0 and completions.stdout.split() == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "ppo",
        "--node-id=ppo",
        "--zone=us-east5-a",
        "--project=mine",
        "--accelerator-type=v5p-32",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
    ]
    assert "--spot" not in script("create", **SETTINGS).stdout


def test_the_loop_is_create_setup_run_wait() -> None:
    completions = script("loop", "experiments/train_ppo.py", "--gin_file=a.gin", **SETTINGS)
    assert completions.returncode == 0, completions.stderr
    lines = completions.stdout.splitlines()
    assert ["queued-resources create" in lines[0], "git" in lines[1], "cat" in lines[-1]] == [True] * 3
    assert all("--worker=all" in line for line in lines[1:])
    assert script("sync", **SETTINGS).stdout.splitlines()[1].split() == [
        "gcloud",
        "storage",
        "rsync",
        "-r",
        "gs://mine/runs/runs/x",
        "runs/x",
    ]
    assert script("delete", **SETTINGS).stdout.split()[3:5] == ["queued-resources", "delete"]
    assert "--worker=0" in script("logs", **SETTINGS).stdout


def test_several_hosts_get_one_directory() -> None:
    """What setup mounts is what a run directory must lie in."""
    shared = {**SETTINGS, "SHARED": "10.0.0.2:/share", "RUN_DIR": "shared/x"}
    (line,) = script("setup", **shared).stdout.splitlines()
    words = shlex.split(line)
    assert "--worker=all" in words
    command = words[-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    assert "mount -t nfs -o hard,actimeo=1,lookupcache=none 10.0.0.2:/share shared" in command
    assert "EXTRAS=dev,tpu,gcs scripts/setup.sh" in command
    assert "nfs" not in script("setup", **SETTINGS).stdout
    assert "--sync=gs://mine/runs/shared/x" in script("run", "a.py", **shared).stdout


def test_the_command_reaches_the_host_as_it_was_given(tmp_path: Path) -> None:
    """A pretended gcloud runs what it is told by --command: python gets the very arguments, quotes and blanks included."""
    for name, text in {
        "bin/gcloud": 'for a in "$@"; do case $a in --command=*) (cd "$HOME" && bash -c "${a#--command=}") ;; esac; done',
        "rlhf_jax/.venv/bin/python": 'printf "<%s>" "$@"',
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    settings = {**SETTINGS, "DRY_RUN": "0", "HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    inputs = ["experiments/train_ppo.py", "--gin_bindings=X = 'a b'", '--gin_bindings=Y = "$HOME"']
    completions = script("run", *inputs, **settings)
    assert completions.returncode == 0, completions.stderr
    waited = script("wait", **settings)
    assert waited.returncode == 0, waited.stderr
    log = (tmp_path / "rlhf_jax" / "run.log").read_text()
    assert log == "".join(
        f"<{argument}>" for argument in [*inputs, "--distributed=auto", "--sync=gs://mine/runs/runs/x"]
    )


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        ((), "", "give one of create"),
        (("start",), "", "give one of create"),
        (("run",), "", "give the command line"),
        (("create",), "ZONE", "ZONE is not set"),
        (("run", "x.py"), "BUCKET", "BUCKET is not set"),
        (("run", "x.py", "SHARED"), "", "RUN_DIR=runs/x does not lie in shared/"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], without: str, message: str) -> None:
    shared = {"SHARED": "10.0.0.2:/share"} if "SHARED" in arguments else {}
    completions = script(*arguments, **{key: value for key, value in SETTINGS.items() if key != without}, **shared)
    assert completions.returncode == 2 and message in completions.stderr and completions.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    completions = subprocess.run(
        ["shellcheck", str(ROOT / "scripts" / "tpu_vm.sh")], capture_output=True, text=True, timeout=60
    )
    assert completions.returncode == 0, completions.stdout
