"""A copy of the run directory at a URL (--sync=gs://bucket/runs/x), for machines that do not live as long as their run.

Opening the run fetches what an earlier machine left there; after every checkpoint, and at the end, what is new goes there in the
background. Logs and cards go before a checkpoint, its manifest last: a step that has a manifest there is whole, and the metrics
that lead to it are there too. One machine writes: the first process of a run, whose start is named in URL/owner.json while it
runs. A later start of the same run takes the URL over, and the earlier one is stopped at its next copy.
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
from rlhf_jax.parallel.distributed import agreed
from rlhf_jax.rundir.checkpoints import SAVING
from rlhf_jax.rundir.provenance import read_provenance
from rlhf_jax.rundir.resume import check_stage, lock, make_directory
from rlhf_jax.storage.names import CHECKPOINTS, MANIFEST, PROFILE, PROVENANCE
from rlhf_jax.storage.remote import download, is_remote, listing, one_line, open_store, sync_url


def _same_run(mark: dict[str, Any], what: dict[str, Any]) -> bool:
    if any(mark.get(key) != what[key] for key in ("stage", "seed")) or not isinstance(mark.get("operative"), str):
        return False
    return all(change.allowed for change in changes(mark["operative"], what["operative"]))


def _owner_words(mark: dict[str, Any]) -> str:
    names = ("stage", "seed", "directory", "host", "process", "time")
    return ", ".join(f"{name} {mark[name]}" for name in names if name in mark) or "its mark is gone"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def fetched_mirror(directory: Path, stage: str, output: str | None = None) -> Mirror | None:
    """The mirror of a run, after the first process has fetched what is there. None without --sync. output: as of `open_run`."""
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
    agreed(0)  # the others look at the directory next
    return mirror


OWNER = "owner.json"


class LostOwnership(InputError):
    """Another start has taken the URL over."""


class Mirror:
    """directory: of the run, on this machine. url: where its copy is kept, nothing or a run."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url
        self._fs, self._root = open_store(url)
        if isinstance(self._fs, LocalFileSystem):
            here, there = directory.resolve(), Path(self._root).resolve()
            if here.is_relative_to(there) or there.is_relative_to(here):
                raise InputError(f"{url}: the run directory, {directory}, or one in the other; give it another place")
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._pending: Future[None] | None = None
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of what is there
        self._mark: dict[str, Any] = {}

    def fetch(self, stage: str, output: str | None = None) -> None:
        """What lies at the URL, when this machine has no step as new. A step without a manifest is not taken. output: the file
        that a run without checkpoints leaves; it counts as a step.

        Raises InputError when something else is there: no run, one of another stage, or not the run that is here.
        """
        with one_line(self.url, "fetch the run"):
            there = self._listing()
            if not there:
                return
            if PROVENANCE not in there:
                raise InputError(f"{self.url}: holds files and no run ({min(there)}); give --sync another URL")
            its_stage, its_first = self._who()
            if its_stage != stage:
                raise InputError(
                    f"{self.url}: a run of stage {its_stage!r}, this is {stage!r}; give --sync another URL"
                )
            steps, ours = steps_among(there), read_provenance(self.directory)
            newest = latest_step(self.directory) or int(output is not None and (self.directory / output).is_file())
            reached = max(steps, default=int(output in there))
            if newest and reached and ours is not None and ours["launches"][0] != its_first:
                raise InputError(f"{self.url}: another run than {self.directory}; give --sync or run_dir another place")
            if not reached:  # no step came whole: there is nothing to go on from
                return
            if newest >= reached and ours is not None:
                return
            make_directory(self.directory)
            with lock(self.directory):
                self._fetch(there, steps, output)
            print(f"{self.directory}: fetched from {self.url} (steps {steps})", file=sys.stderr)

    def _listing(self) -> dict[str, dict[str, Any]]:
        return {name: entry for name, entry in listing(self._fs, self._root).items() if name != OWNER}

    # ---- whose the URL is

    def claim(self, stage: str, seed: int, operative: str) -> None:
        """Mark the URL as this start's. A start of the same run that was killed, or that runs still, loses it.

        Raises InputError when another run has marked it and has copied no step yet: nothing else shows that it is in use.
        """
        where = {"host": os.uname().nodename, "directory": str(self.directory)}
        what = {"stage": stage, "seed": seed, "operative": operative}
        with one_line(self.url, "mark it as this run's"):
            before = self._owner()
            ours = before and (_same_run(before, what) or all(before.get(k) == v for k, v in where.items()))
            if before and not ours and not steps_among(self._listing()):
                raise InputError(
                    f"{self.url}: in use by another run ({_owner_words(before)}); give --sync another URL, or remove "
                    f"{OWNER} there when that run is over"
                )
            self._mark = {"start": secrets.token_hex(16), "time": _now(), "process": os.getpid(), **where, **what}
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{OWNER}", (json.dumps(self._mark, indent=1) + "\n").encode())

    def _owner(self) -> dict[str, Any]:
        """Read who has marked the URL; {} for nobody, or for a mark that is not readable."""
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
        """Remove the mark, when it is still this start's."""
        if self._mark and self._owner().get("start") == self._mark["start"]:
            self._fs.rm_file(f"{self._root}/{OWNER}")
            if isinstance(self._fs, LocalFileSystem):
                with contextlib.suppress(OSError):  # an empty directory was made for the mark alone
                    self._fs.rmdir(self._root)

    def _who(self) -> tuple[str, dict[str, Any]]:
        """(stage, first start) of the run at the URL."""
        text = self._fs.cat_file(f"{self._root}/{PROVENANCE}")
        try:
            found = json.loads(text)
            return str(found["stage"]), dict(found["launches"][0])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"{self.url}: {PROVENANCE} is damaged there; remove what is there, or give --sync another URL"
            ) from error

    def _fetch(self, there: dict[str, Any], steps: list[int], output: str | None) -> None:
        """The run's record first, so that what a kill leaves is known as a run; the output, which counts as a step, last."""
        for name in sorted(there, key=lambda name: (name == output, name != PROVENANCE)):
            if not name.startswith(f"{CHECKPOINTS}/"):
                self._download(name, there, self.directory / name)
        for step in steps:
            place, saving = (checkpoint_dir(self.directory) / f"{step}{suffix}" for suffix in ("", SAVING))
            if place.exists():
                continue
            shutil.rmtree(saving, ignore_errors=True)
            at = f"{CHECKPOINTS}/{step}/"
            for name in there:
                if name.startswith(at):
                    self._download(name, there, saving / name.removeprefix(at))
            saving.rename(place)

    def _download(self, name: str, there: dict[str, Any], to: Path) -> None:
        temporary = to.with_name(to.name + ".tmp")
        download(self._fs, f"{self._root}/{name}", there[name], temporary)
        temporary.replace(to)

    def start(self) -> None:
        """Copy what is new, in the background; nothing when that is under way still: the next checkpoint comes with it.

        Raises RunStopped when another start has taken the URL over.
        """
        if self._pending is None or self._pending.done():
            self._warn()
            self._pending = self._thread.submit(self._push)

    def _warn(self) -> None:
        """Of a copy that failed; the next one starts where it left off."""
        if self._pending is not None and (error := self._pending.exception()):
            if isinstance(error, LostOwnership):
                raise RunStopped(str(error)) from error
            print(f"warning: {error}", file=sys.stderr)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Copy what is left and wait for it; what could not be used (InputError) is not copied. Raises RunStopped when that
        fails: then what is at the URL is not the run."""
        self._thread.shutdown()
        if not self._mark:
            return
        try:
            if not isinstance(value, InputError):
                self._push()
            with one_line(self.url, "remove the mark of this run"):
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
        with one_line(self.url, "copy the run there"):
            self._check_owner()
            here = saved_steps(self.directory)  # before the logs are read: they hold the way to these steps
            for path in sorted(self.directory.rglob("*")):
                name = path.relative_to(self.directory).as_posix()
                if not (
                    name.startswith((f"{CHECKPOINTS}/", f"{PROFILE}/")) or path.name == ".lock" or path.suffix == ".tmp"
                ):
                    self._upload(name)
            there = self._listing()
            for step in here:
                self._check_owner()
                self._push_step(step, there)
            self._forget_steps(set(here), there)

    def _push_step(self, step: int, there: dict[str, Any]) -> None:
        place, at = checkpoint_dir(self.directory) / str(step), f"{CHECKPOINTS}/{step}"
        manifest = f"{at}/{MANIFEST}"
        try:
            if manifest in there:
                if self._fs.cat_file(f"{self._root}/{manifest}") == (place / MANIFEST).read_bytes():
                    return
                self._fs.rm_file(f"{self._root}/{manifest}")
            for path in sorted(place.rglob("*")):
                if path.name != MANIFEST:
                    self._upload(f"{at}/{path.relative_to(place).as_posix()}")
            self._upload(manifest)
        except FileNotFoundError:  # retention has removed the step meanwhile: without a manifest it counts for nothing
            if place.exists():
                raise

    def _forget_steps(self, here: set[int], there: dict[str, Any]) -> None:
        """Remove the steps that retention removed here, the manifest first."""
        for step in {name.split("/")[1] for name in there if name.startswith(f"{CHECKPOINTS}/")} - set(map(str, here)):
            if f"{CHECKPOINTS}/{step}/{MANIFEST}" in there:
                self._fs.rm_file(f"{self._root}/{CHECKPOINTS}/{step}/{MANIFEST}")
            self._fs.rm(f"{self._root}/{CHECKPOINTS}/{step}", recursive=True)

    def _upload(self, name: str) -> None:
        path = self.directory / name
        if not path.is_file():
            return
        now = path.stat()
        if self._copied.get(name) != (now.st_size, now.st_mtime_ns):
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), f"{self._root}/{name}")
            self._copied[name] = (now.st_size, now.st_mtime_ns)
