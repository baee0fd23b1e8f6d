"""Decoding of sampled tokens to responses with their prompts."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.data import Message, Prompt, comparisons, prompt_column, responses
from rlhf_jax.records import Response
from rlhf_jax.testing import byte_tokenizer, completions, prompt_batch


def test_responses_match_their_records_without_filling_rows():
    tokenizer = byte_tokenizer()
    conversations = [(Message("user", "before"), Message("user", f"asked {i}")) for i in range(3)]
    records = [Prompt(f"p{i}", messages, {"tests": [i, None]}) for i, messages in enumerate(conversations)]
    hi, no = tokenizer("hi")["input_ids"], tokenizer("no")["input_ids"]
    prompts = prompt_batch([[5]] * 3, prompt_ids=[2, 0, -1], sample_ids=[0, 0, 0])
    sampled = completions(prompts, [[*hi, tokenizer.eos_token_id], no, hi], length=4, eos_ids=(tokenizer.eos_token_id,))
    garbage = dataclasses.replace(
        sampled, tokens=np.where(sampled.mask, sampled.tokens, 77)
    )  # columns that do not count
    first, second = responses(garbage, records, tokenizer)
    assert first == Response(records[2].prompt, "hi", True, {"tests": [2, None]}, "p2")
    assert second == Response(records[0].prompt, "no", False, {"tests": [0, None]}, "p0")


def test_the_prompt_column_reads_back_as_the_same_messages():
    """A dialogue that lost its earlier turns would be compared, and trained on, as another question."""
    user, system, reply = Message("user", "q"), Message("system", "s"), Message("assistant", "a")
    assert prompt_column([user]) == "q"
    for messages in ([user], [system, user], [user, reply, user], [user, user]):
        row = {"prompt": prompt_column(messages), "chosen": "yes", "rejected": "no"}
        (record,), _ = comparisons([(1, row)], source="made.jsonl")
        assert record.prompt == tuple(messages)
