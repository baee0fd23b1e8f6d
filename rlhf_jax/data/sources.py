"""Readers of rows from files (jsonl, csv, parquet, ..., also gzipped), URLs and Hugging Face data sets."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.data.row_problems import FaultyObject, parse_json
from rlhf_jax.errors import InputError
from rlhf_jax.storage.remote import fetch_url, is_remote

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "txt")
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
Row = tuple[int, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """Settings for reading a file.

    format: one of FORMATS; None infers it from the file's ending, before an optional ".gz".
    encoding: encoding of text files; a byte order mark (UTF-8, UTF-16, UTF-32) at the beginning has precedence.
    delimiter: character between the cells of csv and tsv; None takes a comma, or a tab for tsv.
    quotes: whether cells of csv and tsv may stand in double quotes, with a quote inside them doubled (as pandas, Excel
    and R's write.csv write them); False reads quotes as text.
    """

    format: str | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    quotes: bool = True

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise InputError(f"format {self.format!r} is unknown; use one of {', '.join(FORMATS)}")
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError, TypeError):  # no such name; a NUL in it, "undefined"; no text
            raise InputError(f"encoding {self.encoding!r} is unknown; use 'utf-8' or 'latin-1'") from None
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise InputError(f"delimiter {self.delimiter!r}: give one character, for instance ';'")
        if not isinstance(self.quotes, bool):
            raise InputError(f"quotes = {self.quotes!r}: give True or False")


def read_rows(
    location: str | Path,
    *,
    split: str | None = None,
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> Iterator[Row]:
    """Yield ``(number, row)``: number is the line where the row begins (json, parquet: the row's number), from 1.

    location: a file, its URL (copied to this machine first), or the name of a hub data set ("openai/gsm8k", with a configuration
    "openai/gsm8k:main").
    split: the hub split ("train", "train[:100]"); files have none.
    format, encoding, delimiter, quotes: as in `TextFormat`.
    jsonl and txt skip blank lines; txt yields {"text": line}; csv and tsv need a header. Cells are read unchanged, with
    the line ends inside them.
    Raises InputError with file and line: missing file, truncated gzip, bad JSON, wrong encoding, row unlike the header.
    """
    settings = TextFormat(format, encoding, delimiter, quotes)
    path = fetch_url(str(location)) if is_remote(location) else Path(location).expanduser()
    if path.is_file():
        if split is not None:
            raise InputError(
                f"{location}: split = {split!r} is for hub data sets; a file has no splits: leave split unset"
            )
        return _read_file(path, settings)
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
    """Return the sha256 (hex) of the records' contents in order. Records are dataclasses or JSON values."""
    digest = hashlib.sha256()
    for record in records:
        plain = (
            dataclasses.asdict(record) if dataclasses.is_dataclass(record) and not isinstance(record, type) else record
        )
        digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _ending(path: Path) -> str:
    """Return the ending of a file's name without ".gz": 'jsonl' for 'a.jsonl.gz'."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower().lstrip(".")


def _format_of(path: Path) -> str:
    ending = _ending(path)
    if ending not in FORMATS:
        raise InputError(
            f"{path}: format not known from the ending {ending!r}; set format='jsonl' (one of {', '.join(FORMATS)})"
        )
    return ending


def _read_file(path: Path, settings: TextFormat) -> Iterator[Row]:
    match format := settings.format or _format_of(path):
        case "jsonl":
            return _read_jsonl(path, settings.encoding)
        case "json":
            return _read_json(path, settings.encoding)
        case "csv" | "tsv":
            delimiter = settings.delimiter or ("," if format == "csv" else "\t")
            return _read_table(path, dataclasses.replace(settings, format=format, delimiter=delimiter))
        case "txt":
            lines = _read_lines(path, settings.encoding, newline="\n")
            return ((number, {"text": line.rstrip("\r\n")}) for number, line in lines if line.strip())
        case "parquet":
            return _read_parquet(path)
        case _:
            raise AssertionError(format)


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _detect_encoding(file: gzip.GzipFile | io.BufferedReader, encoding: str) -> str:
    """Read a byte order mark at the beginning of ``file`` and return its encoding; ``encoding`` when there is none."""
    beginning = file.read(4)
    mark, name = next(((mark, name) for mark, name in _MARKS if beginning.startswith(mark)), (b"", encoding))
    file.seek(len(mark))
    return name


def _read_lines(path: Path, encoding: str, *, newline: str = "") -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end). Texts may contain \\x85 or U+2028.

    newline: as of `io.TextIOWrapper`; "" ends lines at \\n, \\r\\n and \\r, "\\n" at \\n alone. Raises InputError.
    """
    number = 0
    name = encoding
    try:
        with _open(path) as file:
            name = _detect_encoding(file, encoding)
            for number, line in enumerate(io.TextIOWrapper(file, name, newline=newline), start=1):
                if "\0" in line:
                    raise InputError(
                        f"{path}:{number}: holds a NUL character; set encoding ('utf-16-le' for UTF-16 without its mark) "
                        "or write the file again as text"
                    )
                yield number, line
    except UnicodeError as error:
        raise _decoding_error(path, number, name, error) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: damaged gzip ({error}); copy or download the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file's permissions") from None


def _decoding_error(path: Path, lines_before: int, encoding: str, error: UnicodeError) -> InputError:
    """Make the error for bytes that are not ``encoding``. lines_before: whole lines read before the chunk with the error."""
    remedy = "set encoding (often 'latin-1') or convert the file"
    if not isinstance(error, UnicodeDecodeError):
        return InputError(f"{path}: not {encoding} ({error}); {remedy}")
    chunk = error.object
    line = lines_before + chunk[: error.start].decode(encoding, "replace").count("\n") + 1
    return InputError(f"{path}:{line}: byte {chunk[error.start]:#04x} is not {encoding}; {remedy}")


def _read_jsonl(path: Path, encoding: str) -> Iterator[Row]:
    for number, line in _read_lines(path, encoding):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            remedy = "repair the line, one object a line"
            if number == 1 and line.lstrip()[0] in "[{" and len(line.strip()) < 3:
                remedy = "set format='json' for a list over several lines, or write one object a line"
            raise InputError(f"{path}:{number}: not JSON ({error}); {remedy}") from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}:{number}: a JSON {type(row).__name__}, not an object; write one {{...}} a line, or set "
                "format='json' for a list of objects"
            )
        yield number, row


def _read_json(path: Path, encoding: str) -> Iterator[Row]:
    text = "".join(line for _, line in _read_lines(path, encoding))
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        hint = "repair it, or set format='jsonl' when each line is an object"
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); {hint}") from None
    if isinstance(rows, FaultyObject):
        raise InputError(f"{path}: {rows.problem.args[0]}; write a list of objects, or one a line into a .jsonl file")
    if not isinstance(rows, list):
        raise InputError(f"{path}: a JSON {type(rows).__name__}, not a list of objects; rewrite it as a list")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: item {number} is a JSON {type(row).__name__}, not an object; write a list of objects"
            )
        yield number, row


def _read_table(path: Path, settings: TextFormat) -> Iterator[Row]:
    """Yield the rows of a csv or tsv file. settings: with format and delimiter. Raises InputError."""
    assert settings.delimiter is not None
    csv.field_size_limit(2**31 - 1)  # a cell may be as long as a document
    begin = 1  # line where the present row begins; a quoted field may span lines
    text = (line for _, line in _read_lines(path, settings.encoding))
    quoting: Any = csv.QUOTE_MINIMAL if settings.quotes else csv.QUOTE_NONE
    reader = csv.reader(text, delimiter=settings.delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _check_header(path, header, settings.delimiter)
            elif len(cells) != len(header):
                raise InputError(f"{path}:{line}: {len(cells)} cells under a header of {len(header)}; {_CELLS}")
            else:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{begin}: not {settings.format} ({error}); {_QUOTES}") from None


_CELLS = "quote or repair the row (R: row.names = FALSE)"
_QUOTES = (
    "write a quote inside a quoted cell twice (R: qmethod = 'double'), set quotes=False where quotes are text, or convert "
    "the file to jsonl"
)


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    """Raise InputError for a repeated column, and for a single column that another delimiter would split."""
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise InputError(f"{path}:1: column {sorted(repeated)[0]!r} occurs twice; rename one")
    other = next((mark for mark in ";\t|," if len(header) == 1 and mark in header[0] and mark != delimiter), None)
    if other is not None:
        raise InputError(
            f"{path}:1: one column, {header[0]!r}, with {delimiter!r} between cells; set delimiter={other!r}"
        )


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise InputError(
            f"{path}: row {number + 1}: not readable as parquet ({_first_line(error)}); write the file again"
        ) from None


def _read_hub(name: str, split: str) -> Iterator[Row]:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated classes; the user needs one line
        remedy = "check the name (NAME or NAME:CONFIGURATION), split and network, or give a local file"
        raise InputError(f"hub data set {name!r}, split {split!r}: {_first_line(error)}; {remedy}") from error
    return ((number, row) for number, row in enumerate(rows, start=1))


def _first_line(error: BaseException) -> str:
    """Return the class and the first line of the message of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
