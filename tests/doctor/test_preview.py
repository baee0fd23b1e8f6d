"""--preview: the text that the model sees, with its targets."""

from __future__ import annotations

from rlhf_jax.data import Encoded, EncodedPair
from rlhf_jax.data.trained_tokenizers import byte_tokenizer
from rlhf_jax.doctor.preview import shown_text, sides


def test_targets_stand_in_marks_and_in_colour() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("ab") + tokenizer.encode("cd")
    text = shown_text(tokenizer, tokens, [False] * (len(tokens) - 2) + [True] * 2, marks=True)
    assert text.plain.endswith("ab⟦cd⟧") and text.spans[-1].style == "bold green"


def test_both_sides_of_a_comparison_are_shown() -> None:
    chosen, rejected = Encoded([1, 2, 3], [False, True, True], 1), Encoded([1, 4], [False, True], 1)
    assert list(sides(EncodedPair(chosen, rejected, 0.0))) == [
        ("chosen: ", [1, 2, 3], [False, True, True]),
        ("rejected: ", [1, 4], [False, True]),
    ]
    assert list(sides([5, 6])) == [("prompt: ", [5, 6], [False, False])]


def test_control_characters_of_the_data_are_escaped() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("a\x1b[31mb")
    text = shown_text(tokenizer, tokens, [True] * len(tokens), marks=False)
    assert "\x1b" not in text.plain and "a\\x1b[31mb" in text.plain
