"""Small tokenizers that need no download: bytes, and byte-pair encodings trained on given texts."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.errors import InputError

PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
"""Ids 0, 1 and 2."""
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte of UTF-8: the id of byte ``b`` is ``3 + b``.

    The vocabulary has 259 tokens. Encoding adds no special tokens.
    """
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {character: len(SPECIAL_TOKENS) + byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _wrap(tokenizer, chat_template)


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int = 768, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair encoding on ``texts`` (Sennrich et al. 2016; bytes as in GPT-2), with a token per digit.

    The same texts give the same files byte for byte. Any text survives a round trip. vocab_size counts the 3 special
    tokens and the 256 bytes; fewer tokens result when the texts have nothing left to merge. Encoding adds no special
    tokens. Raises InputError when vocab_size < 259.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size = {vocab_size}: must be at least {SMALLEST_VOCABULARY} (256 bytes, 3 special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, chat_template)


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    # ASCII digits only: the Digits pre-tokenizer also isolates other scripts' digits, of several bytes each.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _byte_characters() -> list[str]:
    """List the printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    A byte that is a visible Latin-1 character stands for itself; the others take the characters from 256 on, in order.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_in = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(stand_in)) for byte in range(256)]
