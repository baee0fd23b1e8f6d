"""No prompt on both sides, whatever the order and however often it occurs."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data import Demonstration, Message, Prompt, prompt_fraction, prompt_key, split_by_prompt
from rlhf_jax.errors import InputError


def prompt(text: str, name: str = "") -> Prompt:
    return Prompt(name or text, (Message("user", text),))


def test_sides_share_no_prompt_even_with_duplicates() -> None:
    texts = [f"question {i % 150}" for i in range(600)]
    texts += [text.upper() + "  " for text in texts]  # same prompts but for case and white space
    records = [Demonstration(str(i), (Message("user", text),), "a") for i, text in enumerate(texts)]
    training, held_out = split_by_prompt(records, held_out=0.2)
    assert len(training) + len(held_out) == len(records)
    assert not {prompt_key(r.prompt) for r in training} & {prompt_key(r.prompt) for r in held_out}


def test_side_depends_on_the_prompt_alone() -> None:
    records = [prompt(f"q{i}") for i in range(300)]
    _, held_out = split_by_prompt(records, held_out=0.3)
    _, backwards = split_by_prompt(records[::-1], held_out=0.3)
    assert held_out == backwards[::-1]
    _, of_more = split_by_prompt([*records, *(prompt(f"new{i}") for i in range(100))], held_out=0.3)
    assert [record for record in of_more if not record.id.startswith("new")] == held_out


def test_fraction_is_uniform_and_salted() -> None:
    messages = [prompt(f"q{i}").prompt for i in range(2000)]
    fractions = np.array([prompt_fraction(m) for m in messages])
    assert fractions.min() >= 0.0 and fractions.max() < 1.0
    # A tenth of 2000 is 200 with standard deviation sqrt(2000 * 0.1 * 0.9) = 13.4; within 4 of them.
    assert np.all(np.abs(np.histogram(fractions, 10, (0, 1))[0] - 200) < 54)
    salted = np.array([prompt_fraction(m, "other") for m in messages])
    assert abs(np.corrcoef(fractions, salted)[0, 1]) < 0.1


def test_the_salt_chooses_another_split() -> None:
    """Two splits of one data set must not hold out the same prompts: about .3 * .3 of them are in both."""
    records = [prompt(f"q{i}") for i in range(200)]
    first, second = (
        {record.id for record in split_by_prompt(records, held_out=0.3, salt=salt)[1]} for salt in ("", "other")
    )
    assert len(first & second) < 0.6 * min(len(first), len(second))


def test_worked_fraction() -> None:
    # printf '\nuser: a' | sha256sum begins with the 8 bytes below; >> 11 leaves 53 bits.
    assert prompt_fraction(prompt("a").prompt) == (0xB17EF0E925E7AA39 >> 11) / 2**53


def test_plain_text_is_split_by_itself() -> None:
    """It has no prompt; all of it on one side would leave nothing to check with."""
    records = [Demonstration(str(i), (), f"text {i % 50}") for i in range(100)]
    training, held_out = split_by_prompt(records, held_out=0.3)
    assert len(training) + len(held_out) == 100
    assert not {record.response for record in training} & {record.response for record in held_out}


def test_errors() -> None:
    for bad in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match="held_out"):
            split_by_prompt([prompt("a")], held_out=bad)
    with pytest.raises(InputError, match="side is empty"):
        split_by_prompt([prompt("a"), prompt("a", "b")], held_out=0.5)
