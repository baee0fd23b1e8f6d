"""Reading of files: every problem is an InputError with the place, and a pipe is not waited for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.storage.files import field, read_bytes, read_object

BAD = {
    "empty": (b"", "not JSON"),
    "torn": (b'{"a": 1, "b', ":1: not JSON"),
    "second line": (b'{"a": 1,\n"b": }', ":2: not JSON"),
    "list": (b"[1]", "holds a list"),
    "number": (b"3", "holds a int"),
    "null": (b"null", "holds a NoneType"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text .* at byte 7"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
    "byte order mark": ('\ufeff{"a": 1}'.encode(), "not JSON"),
    "nul bytes": (b"\0" * 64, "not JSON"),
    "deep list": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "deep object": (b'{"a":' * 200_000, "nested too deeply"),
    "NaN": (b'{"a": NaN}', "NaN is not a number"),
    "Infinity": (b'{"a": [-Infinity]}', "-Infinity is not a number"),
    "overflow": (b'{"a": 1e999}', "1e999 is too large"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
    "doubled key": (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
    "doubled inner key": (b'{"a": {"b": 1, "b": 1}}', "key 'b' occurs twice"),
    "half a pair": (b'{"a": "\\ud800"}', "half a surrogate pair"),
    "half a pair in a key": (b'{"\\uDFFF": 1}', "half a surrogate pair"),
    "comment": (b'{"a": 1} // done', "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "two objects": (b'{"a": 1}\n{"a": 1}', "not JSON"),
    "trailing comma": (b'{"a": 1,}', "not JSON"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_content_names_file_and_remedy(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json.*{words}.*; put a copy back$") as caught:
        read_object(tmp_path / "a.json", "put a copy back")
    assert "\n" not in str(caught.value)


def test_other_kinds_of_files_are_refused_without_waiting(tmp_path: Path) -> None:
    """A pipe without writer would block for ever; a directory, a loop of links and a path below a file are errors."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("{}")
    cases = {
        "pipe": "a pipe",
        "folder": "a directory|Is a directory",
        "loop": "symbolic links",
        "absent": "No such file",
        "file/below": "Not a directory",
        "x" * 300: "File name too long",
        "a\0b": "null byte",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words):
            read_bytes(tmp_path / name)
    with pytest.raises(InputError, match="a device"):
        read_bytes(Path("/dev/zero"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.json").chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        read_object(tmp_path / "a.json")


def test_good_content_is_what_json_reads(tmp_path: Path) -> None:
    content = {
        "text": "caf\u00e9 \U0001f600 \\ud800",
        "numbers": [0, -1, 1.5e300, 5e-324],
        "nothing": None,
        "inner": {"a": {}},
    }
    for ascii_only in (True, False):
        (tmp_path / "a.json").write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_object(tmp_path / "a.json") == content


def test_fields_have_types() -> None:
    content = {"n": 1, "yes": True, "nothing": None}
    assert field(content, "n", int, "f") == 1 and field(content, "n", (int, float), "f") == 1
    for key, kind, words in (
        ("yes", int, "field 'yes' is bool, not int"),
        ("nothing", str, "field 'nothing' is NoneType, not str"),
        ("absent", str, "no field 'absent'"),
    ):
        with pytest.raises(InputError, match=f"^f: {words}; restore the file$"):
            field(content, key, kind, "f")
