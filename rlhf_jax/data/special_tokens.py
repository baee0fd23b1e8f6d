"""Detection of the tokens that the text of a message must not become."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlhf_jax.data.quotes import Quotes, pattern_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def quotes_of(tokenizer: PreTrainedTokenizerBase, literals: str, turns: str) -> Quotes:
    """Find the tokens that a message can only quote: special tokens, and added tokens that the template writes.

    literals: the string literals of the template.
    turns: a rendered conversation whose messages contain no added token.
    Some tokenizers have an added token such as "<|im_start|>" that is not special. An added token that occurs in ``turns``
    delimits turns, and no message may produce it. Other added tokens of ``literals`` are markup inside a response ("<think>",
    "<tool_call>"): a response may produce them, and other messages only quote them. White space is ordinary text.
    """
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    shaping = {index: token.content for index, token in added.items() if token.special or token.content in turns}
    markup = {index: token.content for index, token in added.items() if token.content in literals}
    quotable = shaping | markup
    # A tokenizer encodes ordinary text as byte tokens and as its unknown token.
    from_text = {index for index, text in quotable.items() if _BYTE.fullmatch(text)} | {tokenizer.unk_token_id}
    counted = {index: text for index, text in quotable.items() if index not in from_text}
    return Quotes(
        in_turns=pattern_of([*shaping.values()]),
        in_texts=pattern_of([*quotable.values()]),
        counted=pattern_of([*counted.values()]),
        ids=frozenset(counted),
    )
