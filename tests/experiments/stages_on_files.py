"""Stages that read files: a config of each, good rows for it, and models of every form to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.models import write_model_card
from rlhf_jax.data import Template
from rlhf_jax.io import export_pretrained
from rlhf_jax.models import Model
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.testing import byte_tokenizer, random_params, tiny_config

CONFIG = """
RUN_DIR = 'run'
MODEL = 'model'
DATA = 'data.jsonl'
run.run_dir = %RUN_DIR
run.seed = 0
run.batch = @BatchConfig()
BatchConfig.batch_size = 2
BatchConfig.length = 32
Template.style = 'plain'
"""
TRAIN = """
run.steps = 1
run.model = @ModelSource()
ModelSource.path = %MODEL
run.optimizer = @OptimizerConfig()
run.loop = @LoopConfig()
LoopConfig.tensorboard = False
LoopConfig.progress = False
"""
STAGES = {
    "train_sft": "run.records = @demonstration_file()\ndemonstration_file.path = %DATA\n"
    "demonstration_file.template = @Template()\ndemonstration_file.heldout = 0.5\ndemonstration_file.unusable = 'error'"
    + TRAIN,
    "train_reward": "run.records = @comparison_file()\ncomparison_file.path = %DATA\n"
    "comparison_file.template = @Template()\ncomparison_file.heldout = 0.5\ncomparison_file.unusable = 'error'" + TRAIN,
    "generate": "run.model = @ModelSource()\nModelSource.path = %MODEL\nrun.prompts = @prompt_file()\n"
    "prompt_file.path = %DATA\nprompt_file.template = @Template()\nrun.sampling = @SamplingConfig()\n"
    "SamplingConfig.max_new_tokens = 4",
}
GOOD = {
    "train_sft": [{"prompt": f"say {n}", "response": f"{n}"} for n in range(8)],
    "train_reward": [{"prompt": f"say {n}", "chosen": f"{n}", "rejected": "no"} for n in range(8)],
    "generate": [{"prompt": f"say {n}"} for n in range(8)],
}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_models(directory: Path) -> None:
    """Write hf/, gguf/ and run/: a tiny model in each layout (gguf: the directory only)."""
    model = Model(tiny_config(vocab_size=272))
    params = jax.tree.map(jnp.asarray, random_params(model, 0))
    export_pretrained(directory / "hf", model, params, byte_tokenizer())
    (directory / "gguf").mkdir()
    (directory / "run").mkdir()
    write_model_card(directory / "run", model, byte_tokenizer(), Template(style="plain"))
    with Checkpoints(directory / "run", Retention(1)) as checkpoints:
        checkpoints.save(1, {"params": params}, {})
