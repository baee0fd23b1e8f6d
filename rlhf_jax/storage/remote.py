"""Files behind a URL (gs://, s3://, any that fsspec supports), as verified copies on this machine.

Models and data are read as local files, window by window, so a URL is copied to `cache_directory` first, each version of
it to its own directory. Run directories are local too; `rlhf_jax.rundir.mirror` keeps a copy of one at a URL.

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
"""Selects the files to copy from the relative names below a URL."""
CONTENT = ".content.json"
_copies: dict[str, Path] = {}


def is_remote(path: str | Path) -> bool:
    """Return whether a path is a URL. 'gs://bucket/x' is, 'name/model' and '/data/x' are not."""
    return "://" in str(path)


def cache_directory() -> Path:
    """Return $XDG_CACHE_HOME/rlhf_jax/fetched, usually ~/.cache/rlhf_jax/fetched; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax" / "fetched"


def open_store(url: str) -> tuple[Any, str]:
    """Return (fsspec file system, path in it). Raises InputError for an unknown kind of URL, or a missing library."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs pages about the error that it raises
    try:
        with wrap_errors(url, "open it", but=(ImportError, ValueError)):
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
def wrap_errors(url: str, action: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise InputError in one line for every exception of a store, except ``but``: clients have a dozen unrelated classes."""
    unchanged: tuple[type[Exception], ...] = (InputError, *but)
    try:
        yield
    except unchanged:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        remedy = "check the URL, the network and your credentials (gs://: gcloud auth application-default login)"
        raise InputError(f"{url}: cannot {action} ({type(error).__name__}: {first}); {remedy}") from error


def list_files(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """List the files below ``root``: {relative name: the store's entry}; a single file by its own name.

    Raises InputError for a name outside ``root``.

    """
    if fs.isfile(root):
        return {PurePosixPath(root).name: fs.info(root)}
    entries = fs.find(root, detail=True) if fs.exists(root) else {}
    names = {name[len(root) :].lstrip("/"): entry for name, entry in entries.items()}
    for name in names:
        if ".." in PurePosixPath(name).parts:
            raise InputError(f"{root}: {name!r} lies elsewhere")
    return names


def download(fs: Any, path: str, entry: dict[str, Any], to: Path) -> None:
    """Copy a file to this machine. Raises OSError when the copy differs in size, or in md5 when the store has one."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fs.get_file(path, str(to))
    if to.stat().st_size != entry["size"]:
        raise OSError(f"{path}: {to.stat().st_size} of {entry['size']} bytes came")
    if expected_md5 := entry.get("md5Hash"):  # Google's, in base 64
        with to.open("rb") as file:
            actual_md5 = hashlib.file_digest(file, "md5").digest()
        if actual_md5 != base64.b64decode(expected_md5):
            raise OSError(f"{path}: the copy has another md5 than the file")


def fetch_url(url: str, select: Select | None = None) -> Path:
    """Return the local copy of a file, or of a directory (the files that ``select`` returns).

    The result is cached per process: all readers see one version, with the selection of the first reader. An earlier copy is
    reused when the store still has that version and every file its sha256.
    Raises InputError when the URL does not exist or cannot be reached, or when the copy is incomplete.

    """
    if url in _copies:
        return _copies[url]
    fs, root = open_store(url)
    with wrap_errors(url, "read it"):
        single, entries = fs.isfile(root), list_files(fs, root)
        if not entries:
            raise InputError(f"{url}: no such file or directory; check the URL")
        names = sorted(entries if select is None or single else select(entries.keys()))
        version = json.dumps([url, [[name, entries[name]] for name in names]], sort_keys=True, default=str)
        copy_dir = cache_directory() / hashlib.sha256(version.encode()).hexdigest()[:20]
        copy_dir.parent.mkdir(parents=True, exist_ok=True)
        with copy_dir.with_suffix(".lock").open("a") as lock:  # the processes of a machine download once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(copy_dir):
                shutil.rmtree(copy_dir, ignore_errors=True)
                _fetch(fs, root, {name: entries[name] for name in names}, copy_dir, single)
    _copies[url] = copy_dir / names[0] if single else copy_dir
    return _copies[url]


def _fetch(fs: Any, root: str, entries: dict[str, dict[str, Any]], copy_dir: Path, single: bool) -> None:
    """Copy files to a temporary directory and rename it to ``place``, so that a copy is complete or absent."""
    with tempfile.TemporaryDirectory(dir=copy_dir.parent, ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary) / "made"
        copy.mkdir()
        for name, entry in entries.items():
            download(fs, root if single else f"{root}/{name}", entry, copy / name)
        (copy / CONTENT).write_text(json.dumps({name: hash_file(copy / name) for name in entries}))
        copy.rename(copy_dir)


def _is_complete(copy_dir: Path) -> bool:
    content = copy_dir / CONTENT
    if not content.is_file():
        return False
    try:
        hashes = read_object(content)
    except InputError:  # torn by a kill or a full disk: fetched again
        return False
    return all(
        (copy_dir / name).is_file() and hash_file(copy_dir / name) == expected_hash
        for name, expected_hash in hashes.items()
    )


def sync_url() -> str | None:
    """Return the value of --sync; None when it is not set."""
    return flags.FLAGS.sync if flags.FLAGS.is_parsed() else None
