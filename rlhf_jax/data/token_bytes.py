"""Bytes of tokens, and decoding of sampled tokens.

`tokenizer.decode` suits neither single tokens nor a response without its prompt: incomplete characters become U+FFFD, and
SentencePiece tokenizers drop a leading space as at the beginning of a text.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL = {"ByteLevel", "Fuse"}
_SENTENCEPIECE = {"ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
_SPACE = "\u2581"
_pieces: weakref.WeakKeyDictionary[Any, tuple[Any, list[bytes] | None]] = weakref.WeakKeyDictionary()
"""The cache by tokenizer: ((vocabulary size, special tokens), bytes of each token)."""


def response_text(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a response after a prompt, without special tokens, to exactly the characters of its tokens.

    Incomplete characters, such as at the end of a truncated response, are omitted (`tokenizer.decode` writes U+FFFD), and
    a leading space stays. Tokenizers whose tokens are not bytes use their own decoding.
    """
    tokens = [int(token) for token in ids]
    pieces = _cached_pieces(tokenizer)
    if pieces is None:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return b"".join(pieces[token] for token in tokens if token < len(pieces)).decode("utf-8", "ignore")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """List the bytes that each token adds to a text; none for special tokens.

    Byte-level tokenizers (GPT-2's alphabet) and those of SentencePiece (U+2581 for a space, <0x0A> for a byte).
    Raises InputError for others.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = {} if backend is None else json.loads(backend.to_str()).get("decoder") or {}
    read = _reader(decoder)
    if read is None:
        raise InputError(f"stop strings: no table for this tokenizer (decoder {decoder.get('type')}); use stop tokens")
    added = dict(tokenizer.added_tokens_decoder)
    pieces = []
    for index in range(max([len(tokenizer) - 1, *added]) + 1):
        token: Any = tokenizer.convert_ids_to_tokens(index)
        if index in added:
            pieces.append(b"" if added[index].special else added[index].content.encode())
        else:
            pieces.append(b"" if token is None else read(token))
    return pieces


def _cached_pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes] | None:
    """Return `token_bytes`, cached by tokenizer and special tokens; None for tokenizers whose tokens are not bytes."""
    state = (len(tokenizer), tuple(tokenizer.all_special_ids))
    cached = _pieces.get(tokenizer)
    if cached is None or cached[0] != state:
        try:
            cached = (state, token_bytes(tokenizer))
        except InputError:
            cached = (state, None)
        _pieces[tokenizer] = cached
    return cached[1]


def _reader(decoder: dict[str, Any]) -> Callable[[str], bytes] | None:
    """Return a function from a token to its bytes, for a decoder of tokenizer.json; None for a decoder of another kind."""
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    replaced = [(step.get("pattern"), step.get("content")) for step in steps if step.get("type") == "Replace"]
    if "ByteLevel" in kinds and kinds <= _BYTE_LEVEL:
        alphabet = {character: byte for byte, character in enumerate(_byte_level_characters())}

        def read_byte_level(token: str) -> bytes:
            in_alphabet = all(character in alphabet for character in token)
            return bytes(alphabet[character] for character in token) if in_alphabet else token.encode()

        return read_byte_level
    if kinds & {"ByteFallback", "Metaspace"} and kinds <= _SENTENCEPIECE:
        if any(pair != ({"String": _SPACE}, " ") for pair in replaced):
            return None

        def read_sentencepiece(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">") and "ByteFallback" in kinds:
                return bytes([int(token[3:5], 16)])
            return token.replace(_SPACE, " ").encode()

        return read_sentencepiece
    return None


def _byte_level_characters() -> list[str]:
    """List the character of each byte in byte-level vocabularies: itself where it is printable, else one from U+0100 on.

    Source: the encoder of Radford et al. 2019.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    characters, shifted = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return characters
