"""Programs that are kept are not compiled again."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.plan.program import compile_program


def lowered(power: int):
    return jax.jit(lambda x: x**power @ x, donate_argnums=0).lower(jnp.ones((8, 8)))


class Uncompiled:
    """A lowered program whose compilation would fail."""

    def __init__(self, power: int) -> None:
        self.as_text = lowered(power).as_text

    def compile(self):
        raise AssertionError("compiled again")


def test_the_same_program_is_looked_up(tmp_path: Path) -> None:
    first = compile_program(lowered(2), tmp_path, "here")
    assert (first.outputs, first.aliased, first.problem) == (256, 256, "") and "ENTRY" in first.text
    assert compile_program(Uncompiled(2), tmp_path, "here") == first
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("power", "where"), [(3, "here"), (2, "elsewhere")])
def test_another_program_or_slice_is_not(tmp_path: Path, power: int, where: str) -> None:
    compile_program(lowered(2), tmp_path, "here")
    with pytest.raises(AssertionError, match="compiled again"):
        compile_program(Uncompiled(power), tmp_path, where)


def other_number(content: bytes) -> bytes:
    """A plan with more memory than the compiler said, whole in every other way."""
    return gzip.compress(gzip.decompress(content).replace(b'\\"temporaries\\": ', b'\\"temporaries\\": 9'))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"x",
        lambda content: content[:-4] + b"\0\0\0\0",
        lambda content: gzip.compress(b"[]"),
        lambda content: gzip.compress(b'{"a": 1}'),
        lambda content: gzip.compress(b'{"program": 3, "sha256": "0"}'),
        lambda content: gzip.compress(b"\xff\xfe"),
        other_number,
    ],
)
def test_a_damaged_program_is_compiled_again(tmp_path: Path, damage, capsys) -> None:
    first = compile_program(lowered(2), tmp_path, "here")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    again = compile_program(lowered(2), tmp_path, "here")
    assert (
        dataclasses.replace(again, seconds=first.seconds, text=first.text) == first
    )  # the text names lines of callers
    assert "the program is compiled again" in capsys.readouterr().err
    assert compile_program(Uncompiled(2), tmp_path, "here") == again  # mended


def test_a_directory_in_place_of_a_program(tmp_path: Path) -> None:
    compile_program(lowered(2), tmp_path, "here")
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        compile_program(lowered(2), tmp_path, "here")
    assert list(tmp_path.iterdir()) == [file]
