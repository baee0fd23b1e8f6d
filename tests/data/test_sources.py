"""Reading files: what is yielded, and one line with file, line and remedy for what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data import Demonstration, Message, fingerprint, read_rows
from rlhf_jax.errors import InputError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path) -> None:
    # U+2028 ends a line for str.splitlines but not here.
    path = write(tmp_path / "a.jsonl", '\ufeff{"x": "a\u2028b"}\n\n{"x": 2}\r\n')
    assert list(read_rows(path)) == [(1, {"x": "a\u2028b"}), (3, {"x": 2})]


def test_gzip_and_explicit_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"x": 1}\n'))
    assert list(read_rows(path)) == [(1, {"x": 1})]
    other = write(tmp_path / "a.pos", b"caf\xe9 \x85 bar\n\nlast")
    assert list(read_rows(other, format="txt", encoding="latin-1")) == [
        (1, {"text": "caf\xe9 \x85 bar"}),
        (3, {"text": "last"}),
    ]


def test_json_list(tmp_path: Path) -> None:
    assert list(read_rows(write(tmp_path / "a.json", '[{"x": 1},\n {"x": 2}]'))) == [(1, {"x": 1}), (2, {"x": 2})]


def test_csv_line_is_where_the_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines, one cell",1\nb,2\n')
    assert list(read_rows(path)) == [
        (2, {"text": "two\nlines, one cell", "label": "1"}),
        (4, {"text": "b", "label": "2"}),
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_tables_give_back_what_pandas_was_given(ending: str, line_end: str, tmp_path: Path) -> None:
    """Excel and R's write.csv write cells alike: quoted where needed, quotes inside doubled."""
    texts = [
        'He said "hi".',
        '"',
        "a\tb, c",
        "two\nlines",
        "two\r\nlines",
        ' spaces "',
        "\\",
        'ends with \\"',
        "caf\xe9 \u2028",
    ]
    if line_end == "\r":  # pandas quotes a cell with the file's own line end only
        texts = [text for text in texts if "\n" not in text]
    frame = pandas.DataFrame({"prompt": texts, "response": texts[::-1]})
    path = tmp_path / f"a.{ending}"
    frame.to_csv(path, sep="," if ending == "csv" else "\t", index=False, lineterminator=line_end)
    assert [row["prompt"] for _, row in read_rows(path)] == texts
    assert [row["response"] for _, row in read_rows(path)] == texts[::-1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "txt"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str, ending: str, tmp_path: Path) -> None:
    content = {
        "jsonl": '{"text": "caf\xe9 \u010a"}\n{"text": "b"}\n',
        "json": '[{"text": "caf\xe9 \u010a"}, {"text": "b"}]',
        "csv": "text\r\ncaf\xe9 \u010a\r\nb\r\n",
        "tsv": "text\ncaf\xe9 \u010a\nb",
        "txt": "caf\xe9 \u010a\nb\n",
    }[ending]
    mark = "\ufeff" if encoding.endswith("-be") else ""
    path = write(tmp_path / f"a.{ending}", (mark + content).encode(encoding))
    assert [row for _, row in read_rows(path)] == [{"text": "caf\xe9 \u010a"}, {"text": "b"}]
    assert [row for _, row in read_rows(path, encoding="latin-1")] == [{"text": "caf\xe9 \u010a"}, {"text": "b"}]
    packed = write(tmp_path / f"a.{ending}.gz", gzip.compress(path.read_bytes()))
    assert len(list(read_rows(packed))) == 2


def test_text_that_is_utf16_without_its_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n{"x": 2}\n'.encode("utf-16-le"))
    assert "a.jsonl:1: holds a NUL character; set encoding ('utf-16-le'" in error_of(path)
    assert list(read_rows(path, encoding="utf-16-le")) == [(1, {"x": 1}), (2, {"x": 2})]
    odd = write(tmp_path / "b.jsonl", '{"x": 1}\n'.encode("utf-16") + b"\x00")
    assert "b.jsonl:2: byte 0x00 is not utf-16-le" in error_of(odd)


def test_delimiters_and_quotes_can_be_told(tmp_path: Path) -> None:
    german = write(tmp_path / "a.csv", 'prompt;response\n"a;b";c\n')
    assert "a.csv:1: one column, 'prompt;response', with ',' between cells; set delimiter=';'" in error_of(german)
    assert list(read_rows(german, delimiter=";")) == [(2, {"prompt": "a;b", "response": "c"})]
    raw = write(tmp_path / "a.tsv", 'text\tlabel\n"so\t1\n"no" he said\t0\n')
    assert "a.tsv:2: not tsv" in error_of(raw) and "set quotes=False" in error_of(raw)
    assert [row["text"] for _, row in read_rows(raw, quotes=False)] == ['"so', '"no" he said']
    # R's write.table(sep = "\t"): quotes inside a cell are escaped, and row names have no header.
    escaped = write(tmp_path / "r.tsv", '"text"\t"label"\n"say \\"hi\\" now"\t1\n')
    assert "r.tsv:2: not tsv" in error_of(escaped) and "R: qmethod = 'double'" in error_of(escaped)
    names = write(tmp_path / "n.tsv", '"text"\t"label"\n"1"\t"a"\t1\n')
    assert "n.tsv:2: 3 cells under a header of 2" in error_of(names) and "row.names = FALSE" in error_of(names)
    assert "delimiter '::': give one character" in error_of(raw, delimiter="::")


def test_a_cell_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    """The csv module stops at 131072 characters by itself."""
    path = write(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    assert len(next(iter(read_rows(path)))[1]["text"]) == 200_000


def test_blank_lines_before_a_header_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\n\na,b\n\n1,2\n")
    assert list(read_rows(path)) == [(5, {"a": "1", "b": "2"})]


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"x": ["a", "b"]}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [(1, {"x": "a"}), (2, {"x": "b"})]
    with pytest.raises(InputError, match=r"bad\.parquet: row 1: not readable as parquet"):
        list(read_rows(write(tmp_path / "bad.parquet", b"PAR1 nothing")))


def error_of(path: Path, **options: str | None) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path, **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    return str(caught.value)


def test_damaged_files_name_file_and_line(tmp_path: Path) -> None:
    assert "a.jsonl:2: not JSON" in error_of(write(tmp_path / "a.jsonl", '{"x": 1}\n{"x": \n'))
    assert "b.jsonl:1: a JSON list, not an object" in error_of(write(tmp_path / "b.jsonl", "[1]\n"))
    assert "c.json:2: not JSON" in error_of(write(tmp_path / "c.json", '{"x": 1}\n{"x": 2}\n'))
    assert "d.json: a JSON dict, not a list" in error_of(write(tmp_path / "d.json", '{"x": 1}'))
    assert "e.csv:3: 1 cells under a header of 2" in error_of(write(tmp_path / "e.csv", "a,b\n1,2\n3\n"))
    assert "f.csv:2: not csv" in error_of(write(tmp_path / "f.csv", 'a,b\n1,"never closed\n'))
    assert "g.csv:1: column 'a' occurs twice" in error_of(write(tmp_path / "g.csv", "a,a\n"))
    assert "h.txt:2: byte 0xe9 is not utf-8" in error_of(write(tmp_path / "h.txt", b"ok\ncaf\xe9\n"))
    assert "i.jsonl.gz:1: damaged gzip" in error_of(write(tmp_path / "i.jsonl.gz", b"no gzip"))


def test_truncated_gzip_gives_the_whole_lines_then_an_error(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"x": i, "y": f"{i * i:x}"}).encode() + b"\n" for i in range(2000))
    packed = gzip.compress(lines)
    rows = read_rows(write(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2]))
    observed = []
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:\d+: (damaged gzip|not JSON)"):
        for _, row in rows:
            observed.append(row["x"])
    assert 0 < len(observed) < 2000 and observed == list(range(len(observed)))


def test_places_that_are_not_files(tmp_path: Path) -> None:
    assert "is a directory" in error_of(tmp_path)
    assert "no such file" in error_of(tmp_path / "absent.jsonl")
    assert "needs a split" in error_of("owner/name")  # type: ignore[arg-type]
    assert "format not known from the ending 'dat'" in error_of(write(tmp_path / "a.dat", ""))
    assert "format 'xml' is unknown" in error_of(tmp_path / "a.dat", format="xml")
    assert "a file has no splits" in error_of(write(tmp_path / "a.txt", "x"), split="train")
    assert "encoding 'klingon' is unknown" in error_of(tmp_path / "a.txt", encoding="klingon")
    for encoding in ("hex", "utf-8\0", "undefined", "\ud800", None):  # Python raises something else for each
        assert f"encoding {encoding!r} is unknown" in error_of(tmp_path / "a.txt", encoding=encoding)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*arguments: object, **options: object) -> list[dict[str, int]]:
        calls.append((arguments, options))
        return [{"x": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows("openai/gsm8k:main", split="train")) == [(1, {"x": 1})]
    # Nothing lets a data set bring its own code.
    assert calls == [(("openai/gsm8k", "main"), {"split": "train"})]

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError) as caught:
        read_rows("owner/name", split="train")
    assert "hub data set 'owner/name', split 'train': ConnectionError: Couldn't reach the hub; check" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_fingerprint_depends_on_content_and_order() -> None:
    a = Demonstration("1", (Message("user", "q"),), "a")
    b = Demonstration("2", (Message("user", "q"),), "b")
    assert fingerprint([a, b]) == fingerprint([a, b])
    assert len({fingerprint(records) for records in ([a, b], [b, a], [a], [])}) == 4
    # sha256 of '{"x": 1}\n', by `printf '{"x": 1}\n' | sha256sum`
    assert fingerprint([{"x": 1}]) == "936353965b4ba9180e3acb781d81aa634390ac95fd2874a9cbc4c4846b49fbd4"
