"""Texts of sampled tokens, with the records they answer."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.data import Message, Prompt, responses
from rlhf_jax.testing import byte_tokenizer, completions, prompt_batch


def test_texts_go_with_the_record_that_prompt_id_counts_and_filling_rows_are_left_out():
    tokenizer = byte_tokenizer()
    records = [Prompt(f"p{i}", (Message("user", "before"), Message("user", f"asked {i}"))) for i in range(3)]
    hi, no = tokenizer("hi")["input_ids"], tokenizer("no")["input_ids"]
    prompts = prompt_batch([[5]] * 3, prompt_ids=[2, 0, -1], sample_ids=[0, 0, 0])
    done = completions(prompts, [[*hi, tokenizer.eos_token_id], no, hi], length=4, eos_ids=(tokenizer.eos_token_id,))
    garbage = dataclasses.replace(done, tokens=np.where(done.mask, done.tokens, 77))  # columns that do not count
    rows, texts, ended = responses(garbage, records, tokenizer)
    assert rows == [{"id": "p2", "prompt": "asked 2"}, {"id": "p0", "prompt": "asked 0"}]
    assert texts == ["hi", "no"] and ended == [True, False]
