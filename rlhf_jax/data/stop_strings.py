"""Stop strings on the device: an automaton over tokens, so that a sampler needs a table look-up a step and no decoding.

Aho and Corasick (1975): a state is the longest beginning of a stop string that the text so far ends with. Its
transitions over bytes are composed into transitions over tokens, and the last state, entered when a stop string is
complete, is never left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.data.token_bytes import token_bytes
from rlhf_jax.errors import InputError

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
