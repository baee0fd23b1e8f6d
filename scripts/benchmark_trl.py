"""TRL's side of benchmark.py: its own trainers on the same shapes, float32, without gradient checkpointing. Needs torch,
transformers and trl; nothing of the package does.

The trainer's own loop runs: a callback lets it take a step for every line on stdin.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import trl
from benchmark_rows import GSM8K, ROWS, SHAPES, report, stops
from benchmark_torch import CONFIG, SCORER
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

SIZES = SHAPES[sys.argv[2]]
STEPS = 50
SETTINGS: dict[str, Any] = {
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


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of words t0, t1, ...: the data are token ids, and the trainers only ask it for the padding."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES.vocab)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2", unk_token="t0")


def documents(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Draw random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SIZES.vocab, length).tolist() for length in lengths]


def words(texts: Sequence[Sequence[int]]) -> list[str]:
    """Write token ids as words of the tokenizer."""
    return [" ".join(f"t{token}" for token in text) for text in texts]


class Paced(TrainerCallback):
    """A step for every line on stdin; the first one warms up."""

    def __init__(self, amount: float, flops: float) -> None:
        self._amount, self._flops = amount, flops
        self._began: float | None = None
        self._cpu = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **remaining: Any
    ) -> None:
        if self._began is None:
            print(json.dumps({"version": f"TRL {trl.__version__}"}), flush=True)
        else:
            report(time.perf_counter() - self._began, time.process_time() - self._cpu, self._amount, self._flops)
        if not sys.stdin.readline():
            sys.exit(0)
        self._began, self._cpu = time.perf_counter(), time.process_time()


def sft(out: str) -> trl.SFTTrainer:
    return training(out, [256] * 8)


def sft_ragged(out: str) -> trl.SFTTrainer:
    return training(out, GSM8K)


def training(out: str, lengths: Sequence[int]) -> trl.SFTTrainer:
    rows = Dataset.from_dict({"input_ids": documents(lengths, 0) * STEPS})
    return trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(**CONFIG)),
        args=trl.SFTConfig(output_dir=out, per_device_train_batch_size=len(lengths), **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[Paced(sum(lengths), 3 * sum(map(SIZES.causal_flops, lengths)))],
    )


def rm(out: str) -> trl.RewardTrainer:
    return pairs(out, [256] * 16)


def rm_ragged(out: str) -> trl.RewardTrainer:
    return pairs(out, GSM8K)


def pairs(out: str, lengths: Sequence[int]) -> trl.RewardTrainer:
    pair = documents(lengths, 0)
    rows = Dataset.from_dict({"chosen_ids": pair[:8] * STEPS, "rejected_ids": pair[8:] * STEPS})
    flops = 3 * sum(SIZES.causal_flops(length, head=False) for length in lengths)
    return trl.RewardTrainer(
        model=LlamaForSequenceClassification(LlamaConfig(**SCORER)),
        args=trl.RewardConfig(output_dir=out, per_device_train_batch_size=8, **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[Paced(8, flops)],
    )


def dpo(out: str) -> trl.DPOTrainer:
    """Run 8 pairs x 256 tokens with prompts of 64."""
    pair, prompts = words(documents([191] * 16, 0)), words(documents([64] * 8, 1))  # the end is appended
    columns = {
        "prompt": prompts,
        "chosen": [f" {text}" for text in pair[:8]],
        "rejected": [f" {text}" for text in pair[8:]],
    }
    rows = Dataset.from_dict({name: texts * STEPS for name, texts in columns.items()})
    return trl.DPOTrainer(
        model=LlamaForCausalLM(LlamaConfig(**CONFIG)),
        ref_model=LlamaForCausalLM(LlamaConfig(**CONFIG)),
        args=trl.DPOConfig(output_dir=out, per_device_train_batch_size=8, **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[Paced(8, SIZES.dpo_flops())],
    )


def grpo(out: str) -> trl.GRPOTrainer:
    return groups(out, {})


def grpo_ragged(out: str) -> trl.GRPOTrainer:
    return groups(out, {"min_new_tokens": 8})


def groups(out: str, options: dict[str, Any]) -> trl.GRPOTrainer:
    """Run 4 prompts x 4 responses with their length as the reward.

    options: of generate; with any, the ids of `stops` end a response.
    """
    prompts = words(documents([64] * 4, 0))
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    if options:
        model.generation_config.eos_token_id = list(stops(SIZES, 20))
    settings = {name: value for name, value in SETTINGS.items() if name != "max_length"}
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **remaining: [float(len(ids)) for ids in completion_ids],
        args=trl.GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=64,
            generation_kwargs=options or None,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * STEPS}),
        processing_class=tokenizer(),
        callbacks=[Paced(1, SIZES.grpo_flops(16 * (26 if options else 64)))],
    )


def ppo(out: str) -> trl.PPOTrainer:
    """Run 16 x (64 + 64) tokens: policy, reference, value and reward model."""
    rows = Dataset.from_dict({"input_ids": documents([64] * 16, 0) * STEPS})
    policy, reference = (LlamaForCausalLM(LlamaConfig(**CONFIG)) for _ in range(2))
    value, reward = (LlamaForSequenceClassification(LlamaConfig(**SCORER)) for _ in range(2))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
    }
    settings |= {"local_rollout_forward_batch_size": 16, "num_ppo_epochs": 4, "num_sample_generations": 0}
    settings |= {"response_length": 64, "temperature": 1.0, "total_episodes": 16 * STEPS}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    return trl.PPOTrainer(
        args=trl.PPOConfig(output_dir=out, gradient_checkpointing=False, disable_tqdm=True, **settings),
        processing_class=tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(16)),
        callbacks=[Paced(1, SIZES.ppo_flops(16 * 64))],
    )


def ppo_ragged(out: str) -> trl.PPOTrainer:
    """Run PPO as TRL does: it samples all 64 tokens, cuts responses afterwards and reads the padding."""
    return ppo(out)


if __name__ == "__main__":
    torch.manual_seed(0)
    trainers = {row.name: globals()[row.name] for row in ROWS if {"trl", "trl_ppo"} & set(row.peers)}
    with tempfile.TemporaryDirectory() as directory:
        trainers[sys.argv[1]](directory).train()
