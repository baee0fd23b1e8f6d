"""The automaton of stop strings against a search in the text so far."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import stop_table
from rlhf_jax.data.token_bytes import token_bytes
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer, train_bpe_tokenizer

TEXTS = [
    "the cat sat on the mat. \n\nHuman: hello\n",
    "aabaabaaab",
    "un \u00e9t\u00e9 \u00e0 l'\u00eele \U0001f600 of 1234 cats",
]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581a",
        "ab",
        "b\u2581a",
        "aab",
    ]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "byte-level BPE": train_bpe_tokenizer(TEXTS * 3, 300),
    "SentencePiece": sentencepiece_tokenizer(),
}


def first_stop(table: np.ndarray, tokens) -> int | None:
    state = 0
    for place, token in enumerate(tokens):
        state = table[state, token]
        if state == len(table) - 1:
            return place
    return None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_it_stops_at_the_first_match_of_a_byte_search(kind):
    """Strings that overlap, contain each other and lie across tokens, over random tokens of a small alphabet."""
    tokenizer = TOKENIZERS[kind]
    strings = ["aab", "abaa", "b a", "\u00e9"]
    pieces = token_bytes(tokenizer)
    table = stop_table(strings, tokenizer, len(pieces) + 5)
    usual = [index for index, piece in enumerate(pieces) if piece and set(piece) <= set(b"ab \xc3\xa9")]
    rng, matches = np.random.default_rng(0), 0
    for _ in range(300):
        tokens = rng.choice(usual, 12).tolist()
        so_far = [b"".join(pieces[token] for token in tokens[: end + 1]) for end in range(12)]
        expected = next((end for end in range(12) if any(s.encode() in so_far[end] for s in strings)), None)
        assert first_stop(table, tokens) == expected
        matches += expected is not None
    assert 50 < matches <= 300 and len(usual) >= 5


def test_special_tokens_and_padded_vocabulary_begin_anew():
    tokenizer = TOKENIZERS["bytes"]
    table = stop_table(["ab"], tokenizer, 300)
    a, b = tokenizer.encode("ab")
    assert table.shape == (3, 300) and table.dtype == np.int32
    assert first_stop(table, [a, b]) == 1
    assert first_stop(table, [a, tokenizer.eos_token_id, b]) is None
    assert first_stop(table, [a, 299, b]) is None
    assert (table[-1] == 2).all()  # never left


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="none of them empty"):
        stop_table(["a", ""], TOKENIZERS["bytes"], 300)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="no table for this tokenizer"):
        stop_table(["a"], plain, 300)
