"""Real files in the directory RLHF_JAX_ASSETS: known row counts, and encoding against the tokenizer's own chat call."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data import (
    GSM8K_FIELDS,
    Demonstration,
    Encoded,
    Fields,
    Template,
    demonstrations,
    encode_all,
    encode_comparison,
    encode_demonstration,
    hh_comparisons,
    read_rows,
    report,
    split_by_prompt,
)

ASSETS = Path(os.environ.get("RLHF_JAX_ASSETS", "absent"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ASSETS.is_dir(), reason="RLHF_JAX_ASSETS names no directory")]


@pytest.mark.parametrize(
    ("name", "rows", "dropped"),
    [
        (
            "helpful-base",
            2354,
            {
                "chosen equals rejected": 2,
                "field 'rejected' is empty": 4,
                "the dialogues part before the last response": 9,
            },
        ),
        ("harmless-base", 2312, {"field 'chosen' is empty": 4, "the dialogues part before the last response": 5}),
    ],
)
def test_hh_rlhf(name: str, rows: int, dropped: dict[str, int]) -> None:
    records, counts = hh_comparisons(read_rows(ASSETS / f"data/preference/hh-rlhf/{name}-test.jsonl.gz"), source=name)
    assert counts == Counter(dropped)
    assert len(records) == rows - sum(dropped.values())
    assert all(record.prompt[-1].role == "user" for record in records)
    training, held_out = split_by_prompt(records, held_out=0.1)
    assert len(training) + len(held_out) == len(records)


def test_gsm8k_and_rt_polarity() -> None:
    records, _ = demonstrations(read_rows(ASSETS / "data/sft/gsm8k/train.jsonl"), GSM8K_FIELDS, source="gsm8k")
    assert len(records) == 7473
    path = ASSETS / "data/text/rt-polarity/rt-polarity.pos"
    texts = read_rows(path, format="txt", encoding="latin-1")
    assert len(demonstrations(texts, Fields(prompt=None, response="text"), source=path.name)[0]) == 5331


def test_chat_encoding_is_the_tokenizers_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "SmolLM2-135M-Instruct")
    records, _ = demonstrations(read_rows(ASSETS / "data/sft/gsm8k/test.jsonl"), GSM8K_FIELDS, source="gsm8k")
    for record in records[:300]:
        encoded = encode_demonstration(record, tokenizer, Template(), max_length=1024)
        assert isinstance(encoded, Encoded)
        chat = [
            {"role": "user", "content": record.prompt[0].content},
            {"role": "assistant", "content": record.response},
        ]
        whole = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert encoded.tokens == whole[:-1]  # without the "\n" after <|im_end|>
        assert encoded.tokens[: encoded.prompt_length] == prompt
        assert encoded.tokens[-1] == tokenizer.eos_token_id and encoded.loss_mask[-1]


def test_dialogues_encode_with_a_loss_on_every_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "SmolLM2-135M-Instruct")
    records, _ = hh_comparisons(read_rows(ASSETS / "data/preference/hh-rlhf/helpful-base-test.jsonl.gz"), source="hh")
    pairs = encode_all(
        records[:300],
        lambda record: encode_comparison(record, tokenizer, Template(), max_length=256, overflow="keep_end"),
    )
    assert max(len(side.tokens) for pair in pairs.items for side in pair[:2]) == 256
    for pair in pairs.items:
        prompt = pair.chosen.prompt_length
        assert pair.chosen.tokens[:prompt] == pair.rejected.tokens[:prompt]
    for record in records[:100]:
        demonstration = Demonstration(record.id, record.prompt, record.chosen)
        every = encode_demonstration(demonstration, tokenizer, Template(), max_length=4096, loss_on="assistant")
        assert isinstance(every, Encoded)
        replies = 1 + sum(message.role == "assistant" for message in record.prompt)
        ends = zip(every.tokens, every.loss_mask, strict=True)
        assert sum(counts and token == tokenizer.eos_token_id for token, counts in ends) == replies
    assert report([pair.chosen for pair in pairs.items])["examples"] == len(pairs.items)
