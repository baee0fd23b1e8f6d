"""Where rows come from: files (jsonl, csv, parquet, ...; gzip too), local or behind a URL, or a Hugging Face data set."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_jax.remote import fetched, is_remote
from rlhf_jax.types import InputError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "txt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
Row = tuple[int, Mapping[str, Any]]


def read_rows(
    location: str | Path, *, split: str | None = None, format: str | None = None, encoding: str = "utf-8"
) -> Iterator[Row]:
    """Yields ``(number, row)``: number is the line where the row begins (json, parquet: the row's number), from 1.

    location: a file, its URL (copied to this machine first), or the name of a hub data set ("openai/gsm8k", with a configuration
    "openai/gsm8k:main").
    split: the hub split ("train", "train[:100]"); files have none.
    format: one of FORMATS; None infers it from the ending, before which ".gz" may stand after it ("a.jsonl.gz").
    encoding: of text files, any that extends ASCII; a UTF-8 byte order mark is skipped.
    jsonl and txt skip blank lines; txt yields {"text": line}; csv and tsv need a header; tsv knows no quotes.
    Raises InputError with file and line: missing file, truncated gzip, bad JSON, wrong encoding, row unlike the header.
    """
    path = fetched(str(location)) if is_remote(location) else Path(location).expanduser()
    if path.is_file():
        if split is not None:
            raise InputError(
                f"{location}: split = {split!r} is for hub data sets; a file has no splits: leave split unset"
            )
        return _read_file(path, format or _format_of(path), _check_encoding(encoding))
    text = str(location)
    if path.exists():
        raise InputError(f"{text}: is a directory; name one file in it")
    if format is not None or _ending(path) in FORMATS or not _HUB_NAME.fullmatch(text) or path.is_absolute():
        raise InputError(f"{text}: no such file; check the path")
    if split is None:
        raise InputError(
            f"{text}: no such file, and as a hub data set it needs a split; set split='train' or fix the path"
        )
    return _read_hub(text, split)


def fingerprint(records: Iterable[Any]) -> str:
    """sha256 (hex) of the records' contents in order. Records are dataclasses, or anything JSON can hold."""
    digest = hashlib.sha256()
    for record in records:
        plain = (
            dataclasses.asdict(record) if dataclasses.is_dataclass(record) and not isinstance(record, type) else record
        )
        digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _ending(path: Path) -> str:
    """'a.jsonl.gz' -> 'jsonl'."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower().lstrip(".")


def _format_of(path: Path) -> str:
    ending = _ending(path)
    if ending not in FORMATS:
        raise InputError(
            f"{path}: format not known from the ending {ending!r}; set format to one of {', '.join(FORMATS)}"
        )
    return ending


def _check_encoding(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        splits_on_newline = "a\n".encode(name) == b"a\n"
    except LookupError:
        raise InputError(f"encoding {encoding!r} is unknown; use 'utf-8' or 'latin-1'") from None
    if not splits_on_newline:
        raise InputError(f"encoding {encoding!r} does not extend ASCII; convert the file to utf-8")
    return "utf-8-sig" if name == "utf-8" else name


def _read_file(path: Path, format: str, encoding: str) -> Iterator[Row]:
    match format:
        case "jsonl":
            return _read_jsonl(path, encoding)
        case "json":
            return _read_json(path, encoding)
        case "csv" | "tsv":
            return _read_table(path, encoding, format)
        case "txt":
            return ((number, {"text": line}) for number, line in _lines(path, encoding) if line.strip())
        case "parquet":
            return _read_parquet(path)
        case _:
            raise InputError(f"{path}: format {format!r} is unknown; use one of {', '.join(FORMATS)}")


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """(line number, text without its line end). Lines end at \\n alone: texts may hold \\x85 or U+2028."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode(encoding if number == 1 else encoding.removesuffix("-sig")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        problem = f"byte {error.object[error.start]:#04x} is not {encoding.removesuffix('-sig')}"
        raise InputError(f"{path}:{number}: {problem}; set encoding (often 'latin-1') or convert the file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: damaged gzip ({error}); copy or download the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file's permissions") from None


def _read_jsonl(path: Path, encoding: str) -> Iterator[Row]:
    for number, line in _lines(path, encoding):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); repair the line, one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a JSON {type(row).__name__}, not an object; write one {{...}} a line")
        yield number, row


def _read_json(path: Path, encoding: str) -> Iterator[Row]:
    text = "\n".join(line for _, line in _lines(path, encoding))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "repair it, or set format='jsonl' when each line is an object"
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); {hint}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: a JSON {type(rows).__name__}, not a list of objects; rewrite it as a list")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: item {number} is a JSON {type(row).__name__}, not an object; write a list of objects"
            )
        yield number, row


def _read_table(path: Path, encoding: str, format: str) -> Iterator[Row]:
    begin = 1  # line where the present row begins; a quoted field may span lines
    text = (line + "\n" for _, line in _lines(path, encoding))
    if format == "csv":
        reader = csv.reader(text, strict=True)
    else:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    header: list[str] | None = None
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if header is None:
                header = cells
                repeated = {name for name in header if header.count(name) > 1}
                if repeated:
                    raise InputError(f"{path}:1: column {sorted(repeated)[0]!r} occurs twice; rename one")
            elif cells and len(cells) != len(header):
                raise InputError(
                    f"{path}:{line}: {len(cells)} cells under a header of {len(header)}; quote or repair the row"
                )
            elif cells:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path}:{begin}: not {format} ({error}); repair the row, or convert the file to jsonl"
        ) from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: row {number + 1}: not readable as parquet ({_line(error)}); write the file again"
        ) from None


def _read_hub(name: str, split: str) -> Iterator[Row]:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated classes; the user needs one line
        remedy = "check the name (NAME or NAME:CONFIGURATION), split and network, or give a local file"
        raise InputError(f"hub data set {name!r}, split {split!r}: {_line(error)}; {remedy}") from error
    return ((number, row) for number, row in enumerate(rows, start=1))


def _line(error: BaseException) -> str:
    """The first line of an exception's message, with its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
