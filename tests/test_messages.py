"""Messages: control characters are escaped, passwords hidden, and a failing stream ends no program."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.launch.command import error_line, exit_code_for, explain_os_error
from rlhf_jax.messages import Messages, behind, message, printable, without_secrets

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x1b]52;c;Y2F0\x1b\\", "\\x1b]52;c;Y2F0\\x1b\\"),  # fills the clipboard
        ("fine\rerror: none", r"fine\rerror: none"),
        ("a\x00b\x08c\x7f", r"a\x00b\x08c\x7f"),
        ("\x9b2J\x85", r"\x9b2J\x85"),  # C1: CSI as one character
        ("gnp.\u202egpj", r"gnp.\u202egpj"),
        ("\u2066a\u2069\u200f\u061c", r"\u2066a\u2069\u200f\u061c"),
        ("a\u2028b\ufeff", r"a\u2028b\ufeff"),
        ("\ud83d half", r"\ud83d half"),
        ("\U000e0041tag", r"\U000e0041tag"),
    ],
)
def test_control_characters_are_escaped(text: str, escaped: str) -> None:
    assert printable(text) == escaped


@pytest.mark.parametrize(
    "text",
    ["plain", "two\nlines\tand a tab", "caf\u00e9 \u4e2d\u6587 \U0001f469\u200d\U0001f52c", "[red]x[/red]", "a\\x1b"],
)
def test_letters_and_line_ends_stay(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://anna:s3cret@host/a.jsonl", "https://***@host/a.jsonl"),
        ("error: gs://me:p%40ss@b/x: gone", "error: gs://***@b/x: gone"),
        ("https://ghp_0123456789abcdefghij@github.com/x", "https://***@github.com/x"),
        ("https://h/f?token=abc&rows=3", "https://h/f?token=***&rows=3"),
        ("https://h/f?X-Amz-Signature=00ff&X-Amz-Date=1", "https://h/f?X-Amz-Signature=***&X-Amz-Date=1"),
        ("s3://b/k?aws_secret_access_key=AB/cd", "s3://b/k?aws_secret_access_key=***"),
        ("DATA = 'https://u:p@h/x' and 'https://v:q@h/y'", "DATA = 'https://***@h/x' and 'https://***@h/y'"),
        ("https://h/f?api_key=abc#part", "https://h/f?api_key=***#part"),
        ("hdfs://:pw@h/x", "hdfs://***@h/x"),
    ],
)
def test_passwords_are_hidden(text: str, hidden: str) -> None:
    assert without_secrets(text) == hidden


@pytest.mark.parametrize(
    "text",
    ["https://host:8080/a@b", "gs://bucket/run", "a:b@c", "https://host/file?rows=3&monkey=1", "http://[::1]:80/x"],
)
def test_other_urls_stay(text: str) -> None:
    assert message(text) == text


PRINTS = """
import sys
from rlhf_jax.messages import steady_output
from rlhf_jax.launch.command import finish
steady_output()
print("to stderr \\x1b[2J https://u:secret@h/x", file=sys.stderr, flush=True)
for _ in range(3):
    print("x" * 9000)
    sys.stdout.flush()
sys.exit(finish(0))
"""


def prints(**streams: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", PRINTS], env=environment, text=True, timeout=60, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_streams_that_fail_do_not_end_a_program() -> None:
    """A closed pipe is no error. On a full disk a part of stdout is lost: the program ends with an error."""
    read, write = os.pipe()
    os.close(read)
    closed = prints(stdout=write, stderr=write)
    os.close(write)
    assert closed.returncode == 0
    with open("/dev/full", "w") as full:
        assert prints(stdout=subprocess.DEVNULL, stderr=full).returncode == 0
        lost = prints(stdout=full, stderr=subprocess.PIPE)
    assert lost.returncode == 3
    assert lost.stderr == (
        "to stderr \\x1b[2J https://***@h/x\nstopped: stdout: No space left on device; a part of the output is lost\n"
    )


def test_a_program_without_stderr_writes_into_no_file(tmp_path: Path) -> None:
    """Started with 2>&-, the next file would be opened as descriptor 2."""
    text = (
        "from rlhf_jax.messages import steady_output; steady_output()\n"
        "import os, sys\nfile = open('out', 'w'); file.write('data'); file.flush(); os.write(2, b'noise')\n"
        "print('words', file=sys.stderr)"
    )
    command = f'exec "{sys.executable}" -c "$0" 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["sh", "-c", command, text], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, b"")
    assert (tmp_path / "out").read_text() == "data"


def catch(action: object) -> Exception:
    try:
        action()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a: b\nc"), 2, "error: a: b c"),
        (RunStopped("late"), 3, "stopped: late"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 2, "error: /a/b: No such file or directory"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "error: /a: Permission denied"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), 2, "error: /a -> /b: Invalid cross-device link"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "stopped: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a"), 3, "stopped: /a: Disk quota exceeded"),
        (OSError(errno.EFBIG, "File too large"), 3, "stopped: File too large"),
        (ValueError("write: No space left on device"), 3, "stopped: write: No space left on device"),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_one_line(error: Exception, code: int, line: str) -> None:
    assert (exit_code_for(error), error_line(error)) == (code, line)


def test_bugs_keep_their_traceback() -> None:
    assert exit_code_for(TypeError("x")) is None and exit_code_for(ValueError("x")) is None
    caused = RuntimeError("while saving")
    caused.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert exit_code_for(caused) == 3


def test_gin_wraps_an_error_and_its_path_stays(tmp_path: Path) -> None:
    from gin.utils import augment_exception_message_and_reraise as wrap

    path = tmp_path / "absent"
    error = catch(lambda: wrap(catch(path.read_text), "\n  In call to configurable 'x' (<function>)"))
    assert isinstance(error, OSError) and explain_os_error(error) == f"{path}: No such file or directory"


def test_what_is_drawn_behind_messages_is_lost_aloud() -> None:
    """A full disk behind a table is found by `lost_output`, as behind any other text."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self) -> int:
            raise ValueError

    stream = Messages(Full())
    drawing = behind(stream)
    drawing.write("\x1b[1mtable\x1b[0m")
    assert stream.lost is not None and stream.lost.errno == errno.ENOSPC
