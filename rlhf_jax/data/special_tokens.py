"""Which tokens of a tokenizer the text of a message must not become."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlhf_jax.data.quotes import Quotes, pattern_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def quotes_of(tokenizer: PreTrainedTokenizerBase, literals: str, turns: str) -> Quotes:
    """Find what messages only quote: the special tokens, and added tokens that the template writes.

    literals: the texts that the template itself holds. turns: a conversation in which no message has an added token.
    Not every added token is special: some tokenizers have a plain "<|im_start|>". One that stands in ``turns`` shapes them,
    and no message may make it. The others of ``literals`` are markup inside a response ("<think>", "<tool_call>"), which
    a response may make and other messages only quote. White space is ordinary text.
    """
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    shaping = {index: token.content for index, token in added.items() if token.special or token.content in turns}
    markup = {index: token.content for index, token in added.items() if token.content in literals}
    both = shaping | markup
    # A tokenizer makes its tokens of bytes and its unknown token out of ordinary text.
    made = {index for index, text in both.items() if _BYTE.fullmatch(text)} | {tokenizer.unk_token_id}
    counted = {index: text for index, text in both.items() if index not in made}
    return Quotes(
        in_turns=pattern_of([*shaping.values()]),
        in_texts=pattern_of([*both.values()]),
        counted=pattern_of([*counted.values()]),
        ids=frozenset(counted),
    )
