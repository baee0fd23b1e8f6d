"""TRL's side of benchmark.py: its own trainers on the same shapes, float32, without gradient checkpointing. Needs torch,
transformers and trl; nothing of the package does.

The trainer's own loop runs: a callback lets it take a step for every line on stdin.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
import torch
import trl
from benchmark_rows import GSM8K, ROWS, SHAPES, report
from benchmark_torch import CONFIG
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

SIZES = SHAPES[sys.argv[2]]
STEPS = 1000
SETTINGS = {
    "max_steps": STEPS,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": None,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


def tokenizer():
    """Words t0, t1 ...: the data come as token ids, the trainers only want one to ask for the padding."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES.vocab)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", unk_token="t0")


def documents(lengths, seed):
    """Random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SIZES.vocab, length).tolist() for length in lengths]


class Paced(TrainerCallback):
    """A step for every line on stdin; the first one warms up."""

    def __init__(self, amount, flops):
        self._amount, self._flops, self._steps = amount, flops, 0

    def on_step_begin(self, args, state, control, **rest):
        if self._steps and not sys.stdin.readline():
            sys.exit(0)
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **rest):
        if self._steps:
            report(time.perf_counter() - self._began, time.process_time() - self._cpu, self._amount, self._flops)
        else:
            print(json.dumps({"version": f"TRL {trl.__version__}"}), flush=True)
        self._steps += 1


def sft(out):
    return training(out, [256] * 8)


def sft_ragged(out):
    return training(out, GSM8K)


def training(out, lengths):
    rows = Dataset.from_dict({"input_ids": documents(lengths, 0) * STEPS})
    return trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(**CONFIG)),
        args=trl.SFTConfig(output_dir=out, per_device_train_batch_size=len(lengths), **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[Paced(sum(lengths), 3 * sum(map(SIZES.causal_flops, lengths)))],
    )


def rm(out):
    return pairs(out, [256] * 16)


def rm_ragged(out):
    return pairs(out, GSM8K)


def pairs(out, lengths):
    both = documents(lengths, 0)
    rows = Dataset.from_dict({"chosen_ids": both[:8] * STEPS, "rejected_ids": both[8:] * STEPS})
    flops = 3 * sum(SIZES.causal_flops(length, head=False) for length in lengths)
    return trl.RewardTrainer(
        model=LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1)),
        args=trl.RewardConfig(output_dir=out, per_device_train_batch_size=8, **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[Paced(8, flops)],
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    known = {row.name: globals()[row.name] for row in ROWS if "trl" in row.peers}
    with tempfile.TemporaryDirectory() as directory:
        known[sys.argv[1]](directory).train()
