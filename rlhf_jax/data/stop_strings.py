"""Stop strings on the device: an automaton over tokens, so that a sampler needs one table look-up per step and no decoding.

Aho and Corasick (1975): a state is the longest prefix of a stop string that is a suffix of the text so far. Its
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
    """Build the transitions, int32 [states, vocab_size], from a state (0 at the start) and a token; the last state means stop.

    A string is matched wherever it begins and ends, inside tokens too. Special tokens and ids above the tokenizer's are
    not text: after them the search starts anew. vocab_size: of the model. Raises InputError for an empty string and for
    tokenizers whose tokens are not bytes.
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
    """Build the transitions over bytes, int32 [states, 256]. State 0: no match; the last: a string is complete."""
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
    unfinished = [node for node in range(len(children)) if not final[node]]
    number = {node: place for place, node in enumerate(unfinished)}
    stop = len(unfinished)
    renamed = np.array([number.get(node, stop) for node in range(len(children))], np.int32)
    return np.concatenate([renamed[table[unfinished]], np.full((1, 256), stop, np.int32)])
