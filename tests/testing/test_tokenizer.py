from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.support_desk_responses import DeskConfig, corpus_text
from rlhf_jax.errors import InputError
from rlhf_jax.testing import byte_tokenizer, train_bpe_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces \n\n\ttab ",
    "don't 's .,!? a . b",
    "Grüße, 東京 ٣٤ ½ 🙂👩‍👩‍👧 e\u0301 \u200f\ufeff",
    "\x00\x01\x7f\x80\xa0",
    "a\r\nb",
    "x" * 1000,
    "<|other|> <s> [PAD]",
]


@pytest.fixture(scope="module")
def texts():
    return list(corpus_text(DeskConfig(), "train", 0, 300))


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    points = [p for p in range(0x30000) if not 0xD800 <= p < 0xE000]
    return ["".join(chr(points[i]) for i in rng.integers(len(points), size=40)) for _ in range(count)]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe_tokenizer(["hello hello 2026"] * 5, 300)])
def test_any_text_survives_a_round_trip(make):
    tokenizer = make()
    for text in ODD_TEXTS + random_texts(100):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_bytes_have_the_documented_ids():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 259
    text = "aé\n\x00 🙂9"
    assert tokenizer.encode(text) == [3 + byte for byte in text.encode()]
    every = "".join(chr(point) for point in range(0x110000) if point < 0x800)
    assert tokenizer.encode(every) == [3 + byte for byte in every.encode()]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe_tokenizer(["hello"], 270)])
def test_special_tokens(make):
    tokenizer = make()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("hi<|eos|>")[-1] == 2
    assert not {0, 1, 2} & set(tokenizer.encode("hi", add_special_tokens=True))  # nothing is added behind one's back
    assert tokenizer.decode(tokenizer.encode("hi<|eos|>"), skip_special_tokens=True) == "hi"


def test_the_vocabulary_has_the_size_asked_for_and_shortens_text(texts):
    tokenizer = train_bpe_tokenizer(texts, 512)
    assert len(tokenizer) == 512
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))
    assert sum(len(tokenizer.encode(text)) for text in texts) < 0.4 * sum(len(text.encode()) for text in texts)


def test_every_digit_is_a_token():
    tokenizer = train_bpe_tokenizer(["costs 2026 2026 2026"] * 50, 300)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("costs 2026 a12")]
    assert [p.strip() for p in pieces if any(c.isdigit() for c in p)] == list("202612")


def test_the_same_texts_give_the_same_files(texts, tmp_path):
    def files(name: str) -> dict[str, bytes]:
        train_bpe_tokenizer(iter(texts), 600).save_pretrained(tmp_path / name)
        return {path.name: path.read_bytes() for path in Path(tmp_path / name).iterdir()}

    first = files("a")
    assert "tokenizer.json" in first
    assert all(files(name) == first for name in ("b", "c"))


def test_a_saved_tokenizer_loads_with_its_template(texts, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}<|eos|>{% endfor %}"
    tokenizer = train_bpe_tokenizer(texts, 400, chat_template=template)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts[:20] + ODD_TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|eos|>"
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(InputError, match="259"):
        train_bpe_tokenizer(["a"], 258)
