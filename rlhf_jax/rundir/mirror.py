"""Copies of the run directory at a URL (--sync=gs://bucket/runs/x), for preemptible machines.

Opening the run downloads the copy that an earlier machine uploaded; after every checkpoint, and at the end, new files are
uploaded in the background. Logs and model cards are uploaded before a checkpoint, and its manifest last: a step whose manifest
is at the URL is complete, and so are its metrics. One machine writes: the first process of a run. URL/owner.json names its
start while it runs. A later start of the same run takes the URL over, and the earlier one stops at its next upload.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from fsspec.implementations.local import LocalFileSystem

from rlhf_jax.checkpoint_files.manifest import checkpoint_dir, latest_step, saved_steps, steps_among
from rlhf_jax.config.parsing import changes
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.parallel.distributed import broadcast_from_first
from rlhf_jax.rundir.checkpoints import SAVING
from rlhf_jax.rundir.provenance import read_provenance
from rlhf_jax.rundir.resume import check_stage, lock, make_directory
from rlhf_jax.storage.names import CHECKPOINTS, MANIFEST, PROFILE, PROVENANCE
from rlhf_jax.storage.remote import download, is_remote, list_files, open_store, sync_url, wrap_errors


def _is_same_run(mark: dict[str, Any], identity: dict[str, Any]) -> bool:
    if any(mark.get(key) != identity[key] for key in ("stage", "seed")) or not isinstance(mark.get("operative"), str):
        return False
    return all(change.allowed for change in changes(mark["operative"], identity["operative"]))


def _owner_words(mark: dict[str, Any]) -> str:
    names = ("stage", "seed", "directory", "host", "process", "time")
    return ", ".join(f"{name} {mark[name]}" for name in names if name in mark) or "its mark is gone"


def _utc_time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def open_mirror(directory: Path, stage: str, output: str | None = None) -> Mirror | None:
    """Return the mirror of a run after the first process has downloaded the copy at the URL; None without --sync.

    output: see `open_run`.
    """
    url = sync_url()
    if url is None:
        return None
    if not is_remote(url):
        raise InputError(
            f"--sync={url!r}: no URL; give one, for instance gs://bucket/runs/x or file:///mnt/disk/runs/x"
        )
    try:
        mirror = Mirror(directory, url)
    except InputError as error:
        raise InputError(f"--sync={error}") from error
    if jax.process_index() == 0:
        check_stage(directory, stage)
        mirror.fetch(stage, output)
    broadcast_from_first(0)  # the other processes read the directory next
    return mirror


OWNER = "owner.json"


class LostOwnership(InputError):
    """Another start has taken the URL over."""


class Mirror:
    """The copy of a run directory at a URL.

    directory: of the run, on this machine.
    url: of the copy; holds nothing or a run.
    """

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url
        self._fs, self._root = open_store(url)
        if isinstance(self._fs, LocalFileSystem):
            local, remote = directory.resolve(), Path(self._root).resolve()
            if local.is_relative_to(remote) or remote.is_relative_to(local):
                raise InputError(f"{url}: the run directory, {directory}, or one in the other; give it another place")
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._pending: Future[None] | None = None
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of the uploaded files
        self._mark: dict[str, Any] = {}

    def fetch(self, stage: str, output: str | None = None) -> None:
        """Download the run at the URL when its newest step is newer than those of this machine.

        A step without a manifest is ignored.
        output: the file that a run without checkpoints writes; it counts as a step.
        Raises InputError when the URL holds files that are no run, a run of another stage, or another run than ``directory``.
        """
        with wrap_errors(self.url, "fetch the run"):
            files = self._listing()
            if not files:
                return
            if PROVENANCE not in files:
                raise InputError(f"{self.url}: holds files and no run ({min(files)}); give --sync another URL")
            remote_stage, first_launch = self._read_identity()
            if remote_stage != stage:
                raise InputError(
                    f"{self.url}: a run of stage {remote_stage!r}, this is {stage!r}; give --sync another URL"
                )
            steps, record = steps_among(files), read_provenance(self.directory)
            newest = latest_step(self.directory) or int(output is not None and (self.directory / output).is_file())
            newest_remote = max(steps, default=int(output in files))
            if newest and newest_remote and record is not None and record["launches"][0] != first_launch:
                raise InputError(f"{self.url}: another run than {self.directory}; give --sync or run_dir another place")
            if not newest_remote:  # no complete step: there is nothing to resume
                return
            if newest >= newest_remote and record is not None:
                return
            make_directory(self.directory)
            with lock(self.directory):
                self._fetch(files, steps, output)
            print(f"{self.directory}: fetched from {self.url} (steps {steps})", file=sys.stderr)

    def _listing(self) -> dict[str, dict[str, Any]]:
        return {name: entry for name, entry in list_files(self._fs, self._root).items() if name != OWNER}

    # ---- ownership of the URL

    def claim(self, stage: str, seed: int, operative: str) -> None:
        """Write owner.json, so that the URL belongs to this start; an earlier start of the same run loses it.

        Raises InputError when another run owns the URL and has uploaded no step yet: only its mark shows that the URL is in use.
        """
        location = {"host": os.uname().nodename, "directory": str(self.directory)}
        identity = {"stage": stage, "seed": seed, "operative": operative}
        with wrap_errors(self.url, "mark it as this run's"):
            owner = self._owner()
            is_same_run = owner and (
                _is_same_run(owner, identity) or all(owner.get(k) == v for k, v in location.items())
            )
            if owner and not is_same_run and not steps_among(self._listing()):
                raise InputError(
                    f"{self.url}: in use by another run ({_owner_words(owner)}); give --sync another URL, or remove "
                    f"{OWNER} there when that run is over"
                )
            self._mark = {
                "start": secrets.token_hex(16),
                "time": _utc_time(),
                "process": os.getpid(),
                **location,
                **identity,
            }
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{OWNER}", (json.dumps(self._mark, indent=1) + "\n").encode())

    def _owner(self) -> dict[str, Any]:
        """Return the content of owner.json; {} when it is missing or unreadable."""
        try:
            mark = json.loads(self._fs.cat_file(f"{self._root}/{OWNER}"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return mark if isinstance(mark, dict) else {}

    def _check_owner(self) -> None:
        owner = self._owner()
        if owner.get("start") != self._mark["start"]:
            raise LostOwnership(
                f"{self.url}: taken over by another start ({_owner_words(owner)}); nothing more is copied there from "
                f"{self.directory}: let one of the two end, or give this one another --sync"
            )

    def _release(self) -> None:
        """Remove owner.json when it still names this start."""
        if self._mark and self._owner().get("start") == self._mark["start"]:
            self._fs.rm_file(f"{self._root}/{OWNER}")
            if isinstance(self._fs, LocalFileSystem):
                with contextlib.suppress(OSError):  # a directory that was made for owner.json alone
                    self._fs.rmdir(self._root)

    def _read_identity(self) -> tuple[str, dict[str, Any]]:
        """Return (stage, first launch) of the run at the URL."""
        text = self._fs.cat_file(f"{self._root}/{PROVENANCE}")
        try:
            record = json.loads(text)
            return str(record["stage"]), dict(record["launches"][0])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"{self.url}: {PROVENANCE} is damaged there; remove what is there, or give --sync another URL"
            ) from error

    def _fetch(self, files: dict[str, Any], steps: list[int], output: str | None) -> None:
        """Download the run: its provenance first, so that a killed download is recognised as a run, and ``output`` last."""
        for name in sorted(files, key=lambda name: (name == output, name != PROVENANCE)):
            if not name.startswith(f"{CHECKPOINTS}/"):
                self._download(name, files, self.directory / name)
        for step in steps:
            step_dir, saving = (checkpoint_dir(self.directory) / f"{step}{suffix}" for suffix in ("", SAVING))
            if step_dir.exists():
                continue
            shutil.rmtree(saving, ignore_errors=True)
            prefix = f"{CHECKPOINTS}/{step}/"
            for name in files:
                if name.startswith(prefix):
                    self._download(name, files, saving / name.removeprefix(prefix))
            saving.rename(step_dir)

    def _download(self, name: str, files: dict[str, Any], target: Path) -> None:
        temporary = target.with_name(target.name + ".tmp")
        download(self._fs, f"{self._root}/{name}", files[name], temporary)
        temporary.replace(target)

    def start(self) -> None:
        """Upload new files in the background; do nothing while an upload is in progress: the next one includes them.

        Raises RunStopped when another start has taken the URL over.
        """
        if self._pending is None or self._pending.done():
            self._warn()
            self._pending = self._thread.submit(self._push)

    def _warn(self) -> None:
        """Print a warning when the last upload failed; the next one continues it."""
        if self._pending is not None and (error := self._pending.exception()):
            if isinstance(error, LostOwnership):
                raise RunStopped(str(error)) from error
            print(f"warning: {error}", file=sys.stderr)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Upload the remaining files and wait; after an InputError nothing is uploaded.

        Raises RunStopped when the upload fails: then the copy at the URL is not the whole run.
        """
        self._thread.shutdown()
        if not self._mark:
            return
        try:
            if not isinstance(value, InputError):
                self._push()
            with wrap_errors(self.url, "remove the mark of this run"):
                self._release()
        except LostOwnership as error:
            if value is None:
                raise RunStopped(str(error)) from error
        except InputError as error:
            message = f"{error}; the run is whole in {self.directory}: the same command copies it"
            if value is None:
                raise RunStopped(message) from error
            print(f"warning: {message}", file=sys.stderr)

    def _push(self) -> None:
        with wrap_errors(self.url, "copy the run there"):
            self._check_owner()
            # List the steps before the logs are read: the logs then hold the metrics of these steps.
            steps = saved_steps(self.directory)
            for path in sorted(self.directory.rglob("*")):
                name = path.relative_to(self.directory).as_posix()
                if not (
                    name.startswith((f"{CHECKPOINTS}/", f"{PROFILE}/")) or path.name == ".lock" or path.suffix == ".tmp"
                ):
                    self._upload(name)
            files = self._listing()
            for step in steps:
                self._check_owner()
                self._push_step(step, files)
            self._remove_old_steps(set(steps), files)

    def _push_step(self, step: int, files: dict[str, Any]) -> None:
        step_dir, prefix = checkpoint_dir(self.directory) / str(step), f"{CHECKPOINTS}/{step}"
        manifest = f"{prefix}/{MANIFEST}"
        try:
            if manifest in files:
                if self._fs.cat_file(f"{self._root}/{manifest}") == (step_dir / MANIFEST).read_bytes():
                    return
                self._fs.rm_file(f"{self._root}/{manifest}")
            for path in sorted(step_dir.rglob("*")):
                if path.name != MANIFEST:
                    self._upload(f"{prefix}/{path.relative_to(step_dir).as_posix()}")
            self._upload(manifest)
        except FileNotFoundError:  # retention has removed the step meanwhile; without a manifest it is ignored
            if step_dir.exists():
                raise

    def _remove_old_steps(self, steps: set[int], files: dict[str, Any]) -> None:
        """Remove the steps at the URL that retention removed from ``directory``, the manifest first."""
        for step in {name.split("/")[1] for name in files if name.startswith(f"{CHECKPOINTS}/")} - set(map(str, steps)):
            if f"{CHECKPOINTS}/{step}/{MANIFEST}" in files:
                self._fs.rm_file(f"{self._root}/{CHECKPOINTS}/{step}/{MANIFEST}")
            self._fs.rm(f"{self._root}/{CHECKPOINTS}/{step}", recursive=True)

    def _upload(self, name: str) -> None:
        path = self.directory / name
        if not path.is_file():
            return
        stat = path.stat()
        if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), f"{self._root}/{name}")
            self._copied[name] = (stat.st_size, stat.st_mtime_ns)
