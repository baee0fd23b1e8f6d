"""Programs that are kept are not compiled again."""

from __future__ import annotations

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
