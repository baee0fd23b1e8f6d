"""The text of sampled tokens: the characters that the policy wrote, no more and no fewer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import Message, Prompt, responses
from rlhf_jax.data.token_bytes import response_text, token_bytes
from rlhf_jax.testing import byte_tokenizer, completions, prompt_batch, train_bpe_tokenizer

TEXTS = ["the cat sat.\n\nHuman: hello\n", "un \u00e9t\u00e9 \u00e0 l'\u00eele \U0001f600 of 1234 cats"]


def sentencepiece_tokenizer(decoder: decoders.Decoder | None = None) -> PreTrainedTokenizerFast:
    """Ids 0 <unk>, 1 </s>, 2 + b the byte b, then words. decoder: Llama 2's when None."""
    words = ["\u2581", "\u2581Paris", "Paris", "\u2581caf", "\ufffd"]
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    llama = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoder or decoders.Sequence(llama)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_the_text(text: str) -> None:
    for tokenizer in (byte_tokenizer(), train_bpe_tokenizer(TEXTS * 3, 300)):
        ids = tokenizer.encode(text)
        pieces = token_bytes(tokenizer)
        assert b"".join(pieces[token] for token in ids).decode() == text == response_text(ids, tokenizer)


@pytest.mark.parametrize("text", ["caf\u00e9", "na\u00efve \u2713", "so \U0001f600", "\u65e5\u672c"])
def test_a_cut_response_loses_its_incomplete_character(text: str) -> None:
    """Cut after every byte: the text is the whole characters so far, where decode() ends in U+FFFD."""
    tokenizer, sentencepiece = byte_tokenizer(), sentencepiece_tokenizer()
    raw = text.encode()
    for cut in range(len(raw) + 1):
        whole = max((text[:n] for n in range(len(text) + 1) if len(text[:n].encode()) <= cut), key=len)
        assert response_text([3 + byte for byte in raw[:cut]], tokenizer) == whole
        assert response_text([2 + byte for byte in raw[:cut]], sentencepiece) == whole


def test_characters_that_the_policy_wrote_stay() -> None:
    tokenizer = byte_tokenizer()
    text = "a\ufffdb\ufffd"  # by the policy: three bytes each, a character like any other
    assert response_text(tokenizer.encode(text), tokenizer) == text
    sentencepiece = sentencepiece_tokenizer()
    assert response_text(sentencepiece.convert_tokens_to_ids(["\ufffd"]), sentencepiece) == "\ufffd"
    # A byte that begins no character, in the middle: 0xC3 before "b". It is no character, so there is none.
    assert response_text([3 + ord("a"), 3 + 0xC3, 3 + ord("b")], tokenizer) == "ab"
    # Whole characters beside a broken one: SentencePiece's own decoder gives up every byte of the run.
    run = [2 + byte for byte in "\u00e9\u00e8".encode()[:3]]
    assert sentencepiece.decode(run) == "\ufffd" * 3 and response_text(run, sentencepiece) == "\u00e9"


@pytest.mark.parametrize("decoder", [None, decoders.Metaspace()])
def test_a_leading_space_of_a_response_stays(decoder: decoders.Decoder | None) -> None:
    """A response follows a prompt: "\u2581Paris" there is " Paris", and decode() drops the space as at a text's beginning."""
    tokenizer = sentencepiece_tokenizer(decoder)
    spaced, joined = tokenizer.convert_tokens_to_ids(["\u2581Paris", "Paris"])
    assert tokenizer.decode([spaced]) == tokenizer.decode([joined]) == "Paris"
    assert response_text([spaced], tokenizer) == " Paris" and response_text([joined, 1], tokenizer) == "Paris"


def test_no_space_before_punctuation_is_taken_away() -> None:
    """clean_up_tokenization_spaces, the default of older tokenizer files, makes "no !" of "no !" a "no!"."""
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    assert response_text(tokenizer.encode("no ! it 's"), tokenizer) == "no ! it 's"


def test_other_tokenizers_decode_as_they_do() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert response_text([1, 2, 3], tokenizer) == "playing now"
    # A decoder that replaces other characters does more than bytes and spaces.
    replacing = sentencepiece_tokenizer(decoders.Sequence([decoders.Replace("P", "B"), decoders.ByteFallback()]))
    assert response_text(replacing.convert_tokens_to_ids(["Paris"]), replacing) == "Baris"


def test_special_tokens_and_padded_ids_are_no_text() -> None:
    tokenizer = byte_tokenizer()
    assert response_text([1, *tokenizer.encode("hi"), 300, 2], tokenizer) == "hi"
    tokenizer.add_tokens(["<think>"])  # an added token that is not special is text
    assert response_text(tokenizer.encode("<think>a"), tokenizer) == "<think>a"


def test_texts_of_completions_have_no_broken_end() -> None:
    tokenizer = byte_tokenizer()
    cut = [3 + byte for byte in "d\u00e9".encode()[:2]]
    sampled = completions(prompt_batch([[5]], prompt_ids=[0], sample_ids=[0]), [cut], length=4, eos_ids=(2,))
    assert "'d'" in repr(responses(sampled, [Prompt("p", (Message("user", "q"),))], tokenizer))
