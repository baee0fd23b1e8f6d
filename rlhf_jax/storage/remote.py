"""Files behind a URL (gs://, s3://, whatever fsspec knows), as copies on this machine that were checked.

Models and data are read as local files, window by window; what a URL names is copied to `cache_directory` first, each version of
it to a directory of its own. Run directories are local too; `rlhf_jax.rundir.mirror` keeps a copy of one at a URL.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from absl import flags

from rlhf_jax.errors import InputError
from rlhf_jax.storage.files import read_object
from rlhf_jax.storage.hashing import hash_file

Select = Callable[[Collection[str]], Collection[str]]
"""Of the files below a URL (relative names), those that are wanted."""
CONTENT = ".content.json"
_copies: dict[str, Path] = {}


def is_remote(given: str | Path) -> bool:
    """Whether it is a URL. 'gs://bucket/x' is, 'name/model' and '/data/x' are not."""
    return "://" in str(given)


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/rlhf_jax/fetched, usually ~/.cache/rlhf_jax/fetched; may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax" / "fetched"


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises InputError for an unknown kind of URL, or one whose library is missing."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints pages about what it then raises
    try:
        with one_line(url, "open it", but=(ImportError, ValueError)):
            fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        protocol = fsspec.core.split_protocol(url)[0]
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}.get(
            protocol
        )
        remedy = f"pip install {package}" if package else str(error)
        raise InputError(f"{url}: {protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}; gs://, s3://, file:// and other URLs of fsspec are known") from error
    return fs, str(root).rstrip("/")


@contextlib.contextmanager
def one_line(url: str, doing: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever a store raises, ``but`` these, as one InputError: clients have a dozen unrelated classes, and users need one
    line."""
    as_they_are: tuple[type[Exception], ...] = (InputError, *but)
    try:
        yield
    except as_they_are:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        remedy = "check the URL, the network and your credentials (gs://: gcloud auth application-default login)"
        raise InputError(f"{url}: cannot {doing} ({type(error).__name__}: {first}); {remedy}") from error


def listing(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """{relative name: what the store says of it} of the files below ``root``; {its own name: ...} of a file. Raises InputError
    for a name that would leave the directory which the files are copied to."""
    if fs.isfile(root):
        return {PurePosixPath(root).name: fs.info(root)}
    found = fs.find(root, detail=True) if fs.exists(root) else {}
    names = {name[len(root) :].lstrip("/"): entry for name, entry in found.items()}
    for name in names:
        if ".." in PurePosixPath(name).parts:
            raise InputError(f"{root}: {name!r} lies elsewhere")
    return names


def download(fs: Any, path: str, entry: dict[str, Any], to: Path) -> None:
    """Copy a file here. Raises OSError when the copy is not what the store says it has: its size, and its md5 if told."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fs.get_file(path, str(to))
    if to.stat().st_size != entry["size"]:
        raise OSError(f"{path}: {to.stat().st_size} of {entry['size']} bytes came")
    if told := entry.get("md5Hash"):  # Google's, in base 64
        with to.open("rb") as file:
            got = hashlib.file_digest(file, "md5").digest()
        if got != base64.b64decode(told):
            raise OSError(f"{path}: the copy has another md5 than the file")


def fetched(url: str, select: Select | None = None) -> Path:
    """The copy of a file, or of a directory (those files that ``select`` wants). Once a process: all its readers see one
    version, and what the first of them selected. A copy made earlier is taken when the store still has that version and every
    file still has its sha256.

    Raises InputError when there is no such thing, it cannot be reached, or the copy is not whole.
    """
    if url in _copies:
        return _copies[url]
    fs, root = open_store(url)
    with one_line(url, "read it"):
        single, entries = fs.isfile(root), listing(fs, root)
        if not entries:
            raise InputError(f"{url}: no such file or directory; check the URL")
        names = sorted(entries if select is None or single else select(entries.keys()))
        version = json.dumps([url, [[name, entries[name]] for name in names]], sort_keys=True, default=str)
        place = cache_directory() / hashlib.sha256(version.encode()).hexdigest()[:20]
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_suffix(".lock").open("a") as lock:  # processes of one machine fetch once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(place):
                shutil.rmtree(place, ignore_errors=True)
                _fetch(fs, root, {name: entries[name] for name in names}, place, single)
    _copies[url] = place / names[0] if single else place
    return _copies[url]


def _fetch(fs: Any, root: str, entries: dict[str, dict[str, Any]], place: Path, single: bool) -> None:
    """Complete or not at all: files go to a temporary directory that gets its name last."""
    with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        for name, entry in entries.items():
            download(fs, root if single else f"{root}/{name}", entry, made / name)
        (made / CONTENT).write_text(json.dumps({name: hash_file(made / name) for name in entries}))
        made.rename(place)


def _is_whole(place: Path) -> bool:
    content = place / CONTENT
    if not content.is_file():
        return False
    try:
        hashes = read_object(content)
    except InputError:  # torn by a kill or a full disk: fetched again
        return False
    return all((place / name).is_file() and hash_file(place / name) == kept for name, kept in hashes.items())


def sync_url() -> str | None:
    """What --sync says."""
    return flags.FLAGS.sync if flags.FLAGS.is_parsed() else None
