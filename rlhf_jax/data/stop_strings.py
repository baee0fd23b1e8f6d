"""Stop strings on the device: an automaton over tokens, so that a sampler needs a table look-up a step and no decoding.

Aho and Corasick (1975): a state is the longest beginning of a stop string that the text so far ends with. Its
transitions over bytes are composed into transitions over tokens, and the last state, entered when a stop string is
complete, is never left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_table(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """int32 [states, vocab_size]: from a state (0 at the start) and a token to the next state; the last one means stop.

    A string counts wherever it begins and ends, inside tokens too. Special tokens and ids past the tokenizer's are no
    text: after them the search begins anew. vocab_size: of the model. Raises InputError for an empty string and for
    tokenizers whose tokens cannot be told as bytes.
    """
    if not strings or not all(strings):
        raise InputError(f"stop strings {list(strings)!r}: give at least one, none of them empty")
    over_bytes = _byte_automaton([string.encode() for string in strings])
    pieces = token_bytes(tokenizer)[:vocab_size]
    lengths = np.zeros(vocab_size, np.int64)
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    table = np.repeat(np.arange(len(over_bytes), dtype=np.int32)[:, None], vocab_size, axis=1)
    for place in range(int(lengths.max())):
        longer = np.flatnonzero(lengths > place)
        byte = np.array([pieces[token][place] for token in longer])
        table[:, longer] = over_bytes[table[:, longer], byte]
    table[:-1, lengths == 0] = 0
    return table


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each token adds to a text, as bytes; nothing for special tokens. Byte-level tokenizers (GPT-2's alphabet) and
    those of SentencePiece (U+2581 for a space, <0x0A> for a byte). Raises InputError for other ones."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = {} if backend is None else json.loads(backend.to_str()).get("decoder") or {}
    kinds = {decoder.get("type"), *(step["type"] for step in decoder.get("decoders", []))}
    added = dict(tokenizer.added_tokens_decoder)
    size = max([len(tokenizer) - 1, *added]) + 1
    if "ByteLevel" in kinds:
        alphabet = {character: byte for byte, character in enumerate(_byte_level_characters())}

        def read(token: str) -> bytes:
            return bytes(alphabet[character] for character in token)

    elif kinds & {"ByteFallback", "Metaspace"}:

        def read(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()

    else:
        raise InputError(f"stop strings: no table for this tokenizer (decoder {decoder.get('type')}); use stop tokens")
    pieces = []
    for index in range(size):
        token: Any = tokenizer.convert_ids_to_tokens(index)
        if index in added:
            pieces.append(b"" if added[index].special else added[index].content.encode())
        else:
            pieces.append(b"" if token is None else read(token))
    return pieces


def _byte_automaton(strings: Sequence[bytes]) -> np.ndarray:
    """int32 [states, 256]. State 0: nothing; the last: a string is complete."""
    children: list[dict[int, int]] = [{}]
    final = {0: False}
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                final[len(children)] = False
                children.append({})
            node = children[node][byte]
        final[node] = True
    table = np.zeros((len(children), 256), np.int32)
    fallback, order = {0: 0}, [0]
    for node in order:  # breadth first: the fallback of a node is shorter, so its row is ready
        table[node] = table[fallback[node]] if node else 0
        for byte, child in children[node].items():
            fallback[child] = int(table[fallback[node], byte]) if node else 0
            final[child] |= final[fallback[child]]
            table[node, byte] = child
            order.append(child)
    going = [node for node in range(len(children)) if not final[node]]
    number = {node: place for place, node in enumerate(going)}
    stop = len(going)
    renamed = np.array([number.get(node, stop) for node in range(len(children))], np.int32)
    return np.concatenate([renamed[table[going]], np.full((1, 256), stop, np.int32)])


def _byte_level_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it can be printed, else one from
    U+0100 on, in order (Radford et al. 2019, their encoder)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    characters, shifted = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return characters
