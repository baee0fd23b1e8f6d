"""The torch side of benchmark.py: a bare training loop and transformers' generate on the same shapes, float32. Needs torch
and transformers; nothing of the package does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from benchmark_rows import GSM8K, ROWS, SHAPES, Once, serve, stops
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

SIZES = SHAPES[sys.argv[2]]
CONFIG: dict[str, Any] = {
    "vocab_size": SIZES.vocab,
    "hidden_size": SIZES.hidden,
    "num_hidden_layers": SIZES.layers,
    "num_attention_heads": SIZES.heads,
    "num_key_value_heads": SIZES.kv_heads,
    "head_dim": SIZES.head_dim,
    "intermediate_size": SIZES.ffn,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SCORER = CONFIG | {"num_labels": 1}


def padded(lengths: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random tokens and the mask of real ones, [rows, longest]."""
    width = max(lengths)
    tokens = np.random.default_rng(seed).integers(3, SIZES.vocab, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.where(mask, torch.tensor(tokens), 0), mask


def sft() -> Once:
    return training([256] * 8)


def sft_ragged() -> Once:
    return training(GSM8K)


def training(lengths: Sequence[int]) -> Once:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    tokens, mask = padded(lengths, 0)
    labels = torch.where(mask, tokens, -100)
    flops = 3 * sum(map(SIZES.causal_flops, lengths))

    def loss() -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=mask.long(), labels=labels, use_cache=False).loss

    return stepping(model, loss, sum(lengths), flops)


def rm() -> Once:
    return pairs([256] * 16)


def rm_ragged() -> Once:
    return pairs(GSM8K)


def pairs(lengths: Sequence[int]) -> Once:
    model = LlamaForSequenceClassification(LlamaConfig(**SCORER)).train()
    tokens, mask = padded(lengths, 0)
    flops = 3 * sum(SIZES.causal_flops(length, head=False) for length in lengths)

    def loss() -> torch.Tensor:
        scores = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits[:, 0]
        return -torch.nn.functional.logsigmoid(scores[:8] - scores[8:]).mean()

    return stepping(model, loss, 8, flops)


def stepping(model: torch.nn.Module, loss: Callable[[], torch.Tensor], amount: float, flops: float) -> Once:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def once() -> tuple[float, float]:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return amount, flops

    return once


def generate() -> Once:
    return sampler(1, {})


def generate_ragged() -> Once:
    return sampler(4, {"eos_token_id": list(stops(SIZES, 60)), "min_new_tokens": 8})


def sampler(batches: int, ends: dict[str, Any]) -> Once:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 128, "pad_token_id": 0} | ends
    stop = torch.tensor(ends.get("eos_token_id", [-1]))

    def once() -> tuple[float, float]:
        new = 0
        for batch in range(batches):
            prompt, mask = padded([64] * 16, batch)
            with torch.no_grad():
                out = model.generate(prompt, attention_mask=mask.long(), **settings)[:, 64:]
            is_end = torch.isin(out, stop)
            is_end[:, : settings.get("min_new_tokens", 0)] = False
            first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, torch.tensor(out.shape[1]))
            new += int(first.sum())
        return new, SIZES.sampling_flops(16 * batches, 64, new)

    return once


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = {row.name: globals()[row.name] for row in ROWS if "torch" in row.peers}
    ready = rows[sys.argv[1]]()
    ready()  # warm
    serve(ready, version=f"torch {torch.__version__}")
