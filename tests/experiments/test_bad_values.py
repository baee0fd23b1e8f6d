"""Values out of range, one by one: each is refused by its name before anything is read or written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from experiment_processes import ROOT
from forked_programs import Server

EXPERIMENTS = {
    "base": "train_sft",
    "sft": "train_sft",
    "reward": "train_reward",
    "ppo": "train_ppo",
    "dpo": "train_dpo",
    "grpo": "train_grpo",
    "completions": "generate",
    "evaluate": "evaluate",
}
VALUES = """
base ModelConfig.vocab_size = 0
base ModelConfig.hidden_size = -32
base ModelConfig.num_layers = 0
base ModelConfig.num_kv_heads = 0
base ModelConfig.head_dim = 15
base ModelConfig.ffn_size = 64.5
base ModelConfig.max_length = 0
base ModelConfig.rope_theta = -1.0
base ModelConfig.norm_epsilon = 0.0
base ModelConfig.param_dtype = 'float8'
base ModelConfig.compute_dtype = 'int32'
base ModelConfig.remat = 'yes'
base ModelConfig.head = 'lmm'
base ModelConfig.tie_embeddings = 2
base OptimizerConfig.warmup_steps = -3
base OptimizerConfig.schedule = 'cosin'
sft OptimizerConfig.learning_rate = -1e-3
sft OptimizerConfig.learning_rate = 1e3
sft OptimizerConfig.b1 = 1.0
sft OptimizerConfig.b2 = -0.1
sft OptimizerConfig.epsilon = 2.0
sft OptimizerConfig.adam = 'adamw'
sft OptimizerConfig.weight_decay = -0.1
sft OptimizerConfig.max_grad_norm = 0.0
sft OptimizerConfig.final_fraction = 1.5
sft OptimizerConfig.spike = -6.0
sft OptimizerConfig.spike_memory = 1
sft BatchConfig.batch_size = 0
sft BatchConfig.batch_size = 15
sft BatchConfig.length = -128
sft BatchConfig.length = 128.0
sft BatchConfig.microbatches = 0
sft BatchConfig.microbatches = 3
sft LoopConfig.save_every = 0
sft LoopConfig.keep = 0
sft LoopConfig.keep = True
sft LoopConfig.keep_best = 2
sft LoopConfig.best_metric = 'heldout/loss'
sft LoopConfig.best = 'largest'
sft LoopConfig.log_every = -1
sft LoopConfig.evaluate_every = -4
sft LoopConfig.progress = 'bar'
sft LoopConfig.tensorboard = 1
sft LoopConfig.on_bad_step = 'ignore'
sft LoopConfig.bad_steps = -1
sft LoopConfig.stop_within = 0.0
sft LoopConfig.deadlines = (('roll', 3.0),)
sft LoopConfig.deadlines = (('train', -3.0),)
sft LoopConfig.deadlines = (('train', '3'),)
sft LoopConfig.deadlines = ('train', 3.0)
sft LoopConfig.faults = ['kill']
sft desk_demonstrations.heldout = -1
sft desk_demonstrations.start = -5
sft desk_demonstrations.count = 0
sft DeskConfig.seed = -1
sft ModelSource.param_dtype = 'float64'
sft ModelSource.compute_dtype = 'half'
sft ModelSource.remat = 'no'
sft ModelSource.pad_token = 3
sft run.seed = 'zero'
sft run.steps = None
reward comparison_file.heldout = 1.5
reward comparison_file.heldout = -0.1
reward comparison_file.limit = 0
reward comparison_file.limit = -3
reward comparison_file.split = 5
reward Template.style = 'chatml'
reward Template.bos = 'maybe'
reward Template.prompt_format = 'no place for it'
reward Template.response_prefix = 3
reward Template.prompt_format = '{prompt}{prompt}'
ppo PPOConfig.epochs = 0
ppo PPOConfig.minibatches = 1.5
ppo PPOConfig.clip_low = -0.2
ppo PPOConfig.clip_high = '0.2'
ppo PPOConfig.dual_clip = 0.5
ppo PPOConfig.value_clip = -0.2
ppo PPOConfig.value_coefficient = -1
ppo PPOConfig.entropy_coefficient = -0.1
ppo PPOConfig.discount = 1.01
ppo PPOConfig.lam = -0.5
ppo PPOConfig.kl_coefficient = -0.05
ppo PPOConfig.kl_kind = 'k4'
ppo PPOConfig.kl_kind = 'k3'
ppo PPOConfig.kl_target = 0
ppo PPOConfig.kl_horizon = 0.0
ppo PPOConfig.terminal = 'end'
ppo PPOConfig.missing_eos = 'ignore'
ppo PPOConfig.missing_eos_penalty = -1
ppo PPOConfig.whiten_rewards = 'yes'
ppo PPOConfig.whiten_advantages = 'batch'
ppo PPOConfig.whiten_ddof = 2
ppo PPOConfig.score_clip = -3.0
ppo PPOConfig.max_sampler_gap = -1e-3
ppo PPOConfig.max_identity_gap = 'small'
ppo PPOConfig.max_kl = -1.0
dpo DPOConfig.beta = 0.0
dpo DPOConfig.loss = 'kto'
dpo DPOConfig.label_smoothing = 0.5
dpo DPOConfig.sft_coefficient = -1.0
dpo DPOConfig.average = 1
grpo run.samples = 1
grpo run.samples = 3
grpo GRPOConfig.minibatches = 0
grpo GRPOConfig.advantages = 'gae'
grpo GRPOConfig.reduction = 'mean'
grpo GRPOConfig.ratio = 'sequence'
grpo GRPOConfig.clip_high = -0.2
grpo GRPOConfig.kl_coefficient = -0.1
grpo GRPOConfig.kl_in = 'advantage'
grpo GRPOConfig.kl_kind = 'k1'
ppo SamplingConfig.temperature = -1.0
ppo SamplingConfig.top_k = -1
ppo SamplingConfig.top_p = 0.0
ppo SamplingConfig.top_p = 1.1
ppo SamplingConfig.max_new_tokens = 0
ppo SamplingConfig.max_new_tokens = 2.5
ppo policy/OptimizerConfig.learning_rate = 'small'
ppo value/OptimizerConfig.b2 = 1.0
ppo desk_prompts.split = 'tset'
ppo desk_prompts.count = -1
ppo run.share_trunk = 'no'
ppo run.reward_key = 3
completions run.samples = 0
completions AnnotatorConfig.noise = 0.5
completions AnnotatorConfig.gold_scale = -1.0
completions AnnotatorConfig.seed = -1
completions SamplingConfig.temperature = 'hot'
completions desk_prompts.start = -1
evaluate run.samples_shown = -1
evaluate run.policies = [('base',)]
evaluate BatchConfig.length = 0
""".strip().splitlines()


def test_no_value_is_here_twice() -> None:
    assert len(VALUES) == len(set(VALUES)) > 110


@pytest.mark.parametrize("case", VALUES)
def test_refused_by_name(case: str, tmp_path: Path, server: Server) -> None:
    config, binding = case.split(" ", 1)
    argv = [str(ROOT / "experiments" / f"{EXPERIMENTS[config]}.py"), f"--gin_file=configs/smoke/{config}.gin"]
    argv += [f"--gin_bindings=RUN_DIR = {str(tmp_path / 'run')!r}"] if "run_dir" not in binding else []
    result = server(tmp_path, [*argv, f"--gin_bindings={binding}"])
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    key, _ = binding.split(" = ", 1)
    assert key.split("/")[-1].split(".")[-1] in result.stderr.split(f"--gin_bindings={binding!r}")[-1], result.stderr
    assert re.search(
        r"give|must|use|one of|at least|hold some out|whole number|has no|needs|leaves|need|divide", result.stderr
    ), result.stderr
    assert sorted(os.listdir(tmp_path)) == ["stderr", "stdout"]
