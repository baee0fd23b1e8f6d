"""The torch side of benchmark.py: a bare loop and transformers' generate on the same shapes, float32. Needs torch and
transformers; nothing else of this repository imports torch."""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

SIZES = {
    "smollm2": {"vocab": 49152, "hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "ffn": 1536},
    "tiny": {"vocab": 1200, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128},
}[sys.argv[2]]
SHAPE = {
    "vocab_size": SIZES["vocab"],
    "hidden_size": SIZES["hidden"],
    "num_hidden_layers": SIZES["layers"],
    "num_attention_heads": SIZES["heads"],
    "num_key_value_heads": SIZES["kv_heads"],
    "head_dim": SIZES["head_dim"],
    "intermediate_size": SIZES["ffn"],
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": None,
}
STOPS = list(range(20, SIZES["vocab"], 60))


def flops_per_token(context, head=True):
    """As in benchmark_jax.py."""
    d, width = SIZES["hidden"], SIZES["head_dim"] * SIZES["heads"]
    layer = d * SIZES["head_dim"] * 2 * (SIZES["heads"] + SIZES["kv_heads"]) + 3 * d * SIZES["ffn"]
    return 2.0 * (SIZES["layers"] * layer + head * SIZES["vocab"] * d) + 4.0 * SIZES["layers"] * width * context


def tokens_of(rows, length, seed):
    return torch.tensor(np.random.default_rng(seed).integers(3, SIZES["vocab"], (rows, length)))


def sft():
    return training([256] * 8, 8 * 256)


def sft_ragged():
    lengths = np.random.default_rng(0).integers(32, 257, 16)
    return training(lengths.tolist(), int(lengths.sum()))


def training(lengths, useful):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    width = max(lengths)
    tokens = tokens_of(len(lengths), width, 0)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    labels = torch.where(mask, tokens, -100)

    def once():
        loss = model(input_ids=tokens, attention_mask=mask.long(), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return useful, 3 * useful * flops_per_token(sum(lengths) / len(lengths) / 2)

    return once


def rm():
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = tokens_of(16, 256, 0)

    def once():
        scores = model(input_ids=tokens, use_cache=False).logits[:, 0]
        loss = -torch.nn.functional.logsigmoid(scores[:8] - scores[8:]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 8, 3 * 16 * 256 * flops_per_token(128, head=False)

    return once


def sampler(batches, stops, least):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 128, "pad_token_id": 0}
    if stops:
        settings |= {"eos_token_id": stops, "min_new_tokens": least}
    stop = torch.tensor(stops or [-1])

    def once():
        new = 0
        for batch in range(batches):
            prompt = tokens_of(16, 64, batch)
            with torch.no_grad():
                out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, 64:]
            ends = torch.isin(out, stop)
            first = torch.where(ends.any(1), ends.int().argmax(1) + 1, torch.tensor(out.shape[1]))
            new += int(first.sum())
        rows = 16 * batches
        return new, rows * 64 * flops_per_token(32) + new * flops_per_token(64 + new / rows / 2)

    return once


def generate():
    return sampler(1, [], 0)


def generate_ragged():
    return sampler(4, STOPS, 8)


ROWS = {f.__name__: f for f in (sft, sft_ragged, generate, generate_ragged, rm)}


def main():
    torch.manual_seed(0)
    once = ROWS[sys.argv[1]]()
    once()
    print(json.dumps({"version": torch.__version__}), flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        amount, flops = once()
        seconds, used = time.perf_counter() - began, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"seconds": seconds, "cpu_seconds": used, "amount": amount, "flops": flops, "peak_bytes": memory}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
