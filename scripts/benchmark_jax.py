"""Our side of benchmark.py: `python scripts/benchmark_jax.py ROW SHAPE` gets a row ready and runs it as
`benchmark_rows.serve` says; of benchmark_profile.py with a third argument, a directory: runs it once and leaves JAX's trace
there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_rows import GSM8K, ROWS, SHAPES, Once, serve, stops

from rlhf_jax import data, learn, rollout
from rlhf_jax.algorithms import DPO, GRPO, PPO, SFT, RewardModel
from rlhf_jax.algorithms.models import Loaded
from rlhf_jax.algorithms.supervised import SupervisedJob
from rlhf_jax.batches import RankedBatch, TokenBatch
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Fold, Model, ModelConfig, fold_of
from rlhf_jax.parallel import MeshConfig, init_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.testing import IN_MEMORY, loaded_model, prompt_batch, roles_of, setting_of
from rlhf_jax.types import Params

SIZES = SHAPES[sys.argv[2]]
CONFIG = ModelConfig(
    vocab_size=SIZES.vocab,
    hidden_size=SIZES.hidden,
    num_layers=SIZES.layers,
    num_heads=SIZES.heads,
    num_kv_heads=SIZES.kv_heads,
    head_dim=SIZES.head_dim,
    ffn_size=SIZES.ffn,
    max_length=2048,
    tie_embeddings=True,
    remat="cheap",
)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
SLOTS = rollout.SlotConfig(separate_layers=True)
HALVED = rollout.SlotConfig(smallest=4, separate_layers=True)
REFILLED = rollout.SlotConfig(slots=16, prefill=8, smallest=4, separate_layers=True)


def peak_flops() -> float:
    """Measure operations a second: the best of ten float32 products of 2048 x 2048."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def documents(lengths: Sequence[int], seed: int) -> list[data.Encoded]:
    """Draw random tokens, with the loss on all but the first."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, SIZES.vocab, length).tolist() for length in lengths]
    return [data.Encoded(text, [False, *[True] * (len(text) - 1)], 1) for text in texts]


def padded(lengths: Sequence[int], width: int, seed: int) -> TokenBatch:
    """Put one document in a row."""
    return data.stack_rows([(document,) for document in documents(lengths, seed)], width, 0)


def draw_params(model: Model) -> tuple[Params, Any]:
    """Draw new parameters and return them with their shardings."""
    shardings = tree_shardings(model.abstract(), model.logical_axes(), MESH)
    return init_sharded(model.init, shardings, MESH, jax.random.key(0)), shardings


OPTIMIZER = learn.OptimizerConfig(learning_rate=1e-5)
"""Of every supervised step."""


def in_memory(model: Model) -> Loaded:
    """Return the model with parameters draw_params on their shards."""
    return loaded_model(model, draw_params(model)[0])


def supervised(job: SupervisedJob, batch: Any, amount: float, flops: float, fold: Fold | None = None) -> Once:
    """Make a training step."""
    states, global_arrays = {"state": job.state}, to_global(batch, MESH)
    step, frozen = job.train_step, job.frozen

    def once() -> tuple[float, float]:
        states["state"], metrics = step(states["state"], frozen, global_arrays, fold=fold)
        jax.block_until_ready((states["state"], metrics))
        return amount, flops

    return once


def sft() -> Once:
    """Run SFT steps of 8 x 256 tokens."""
    return training(padded([256] * 8, 256, 0), [256] * 8)


def sft_ragged() -> Once:
    """Run SFT steps of packed documents."""
    return training(data.stack_rows(data.pack(documents(GSM8K, 0), 512), 512, 0), GSM8K)


def training(batch: TokenBatch, lengths: Sequence[int]) -> Once:
    """Make an SFT step."""
    model, flops = Model(CONFIG), 3 * sum(map(SIZES.causal_flops, lengths))

    rows, columns = batch.tokens.shape
    algorithm = SFT(model=IN_MEMORY, optimizer=OPTIMIZER, batch=BatchConfig(rows, columns))
    job = algorithm.wire(setting_of(MESH, steps=1000), in_memory(model), None)
    return supervised(job, batch, sum(lengths), flops)


def rm() -> Once:
    """Run reward-model steps of 8 pairs x 256 tokens."""
    return pairs([256] * 16, 256)


def rm_ragged() -> Once:
    """Run reward-model steps of 8 pairs of different lengths, folded."""
    return pairs(GSM8K, max(GSM8K))


def pairs(lengths: Sequence[int], width: int) -> Once:
    """Make a step of a reward model."""
    model = Model(CONFIG.replace(head="scalar"))
    batch = RankedBatch.of_pairs(padded(lengths[:8], width, 0), padded(lengths[8:], width, 1))
    flops = 3 * sum(SIZES.causal_flops(length, head=False) for length in lengths)

    algorithm = RewardModel(model=IN_MEMORY, optimizer=OPTIMIZER, batch=BatchConfig(8, width))
    job = algorithm.wire(setting_of(MESH, steps=1000), in_memory(model), None)
    return supervised(job, batch, 8, flops, fold_of(data.pair_lengths(batch), 16, width))


def dpo() -> Once:
    """Run DPO steps of 8 pairs x 256 tokens with prompts of 64; the reference reads them too."""
    policy = Model(CONFIG)
    sides = (padded([256] * 8, 256, seed) for seed in (0, 1))
    chosen, rejected = (side.replace(loss_mask=side.loss_mask & (np.arange(256) >= 64)) for side in sides)
    batch = RankedBatch.of_pairs(chosen, rejected)

    algorithm = DPO(model=IN_MEMORY, optimizer=OPTIMIZER, batch=BatchConfig(8, 256))
    job = algorithm.wire(setting_of(MESH, steps=1000), in_memory(policy), in_memory(policy), None)
    fold = fold_of(data.pair_lengths(batch), 16, 256, data.pair_targets(batch), 255)
    return supervised(job, batch, 8, SIZES.dpo_flops(), fold)


def generate() -> Once:
    """Sample 128 tokens for each of 16 prompts."""
    return sampler(16, SLOTS, (), 0)


def generate_ragged() -> Once:
    """Sample 8 to 128 tokens for each of 64 prompts, with 16 slots."""
    return sampler(64, REFILLED, stops(SIZES, 60), 8)


def sampler(prompts: int, slots: rollout.SlotConfig, ends: tuple[int, ...], least: int) -> Once:
    """Make a sampler of rollouts of 64 + at most 128 tokens."""
    model = Model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = prompts_of(prompts)
    sampling = rollout.SamplingConfig(max_new_tokens=128, min_new_tokens=least)

    @jax.jit
    def run(params: Any, batch: Any, key: Any) -> Any:
        return rollout.generate(model, params, batch, key, sampling=sampling, eos_ids=ends, pad_id=0, slots=slots)

    calls = iter(range(1000))

    def once() -> tuple[float, float]:
        completions = run(params, batch, jax.random.key(next(calls)))
        new = int(completions.mask.sum())
        return new, SIZES.sampling_flops(prompts, 64, new)

    return once


def prompts_of(count: int) -> Any:
    """Draw prompts of 64 random tokens."""
    return prompt_batch(np.random.default_rng(0).integers(3, SIZES.vocab, (count, 64)).tolist())


def ppo() -> Once:
    """Run PPO iterations whose responses all have 64 tokens."""
    return iteration((), 0)


def ppo_ragged() -> Once:
    """Run PPO iterations with responses of 8 to 64 tokens."""
    return iteration(stops(SIZES, 20), 8)


def iteration(ends: tuple[int, ...], least: int) -> Once:
    """Make an iteration of PPO: sample, score, prepare, update."""
    policy, value = Model(CONFIG), Model(CONFIG.replace(head="scalar"))
    params = {"policy": draw_params(policy)[0], "value": draw_params(value)[0]}
    copies = jax.tree.map(jnp.copy, params)
    owners = {"policy": (policy, params["policy"]), "value": (value, params["value"])}
    roles = roles_of(**owners, reference=(policy, copies["policy"]), reward=(value, copies["value"]))
    rate = learn.OptimizerConfig(learning_rate=1e-6)
    config = learn.PPOConfig(epochs=4, minibatches=1, old_logprobs="sampler")
    sampling = rollout.SamplingConfig(max_new_tokens=64, min_new_tokens=least)
    algorithm = PPO(
        policy=IN_MEMORY,
        batch=BatchConfig(16, 64, microbatches=2),
        sampling=sampling,
        ppo=config,
        policy_optimizer=rate,
        value_optimizer=rate,
        slots=HALVED if ends else SLOTS,
    )
    job = algorithm.wire(setting_of(MESH, steps=1000), roles, {"eos_ids": ends, "pad_id": 0})
    states, frozen = {"state": job.state}, job.frozen
    del params, copies, owners, roles
    no_scores: dict[str, np.ndarray] = {}
    unscored = to_global((no_scores, np.ones(16, bool)), MESH)
    prompts = to_global(prompts_of(16), MESH)

    def once() -> tuple[float, float]:
        state = states["state"]
        completions = job.generate(state.train.params, frozen, prompts, jax.random.key(0))
        replies = np.asarray(completions.mask).sum(axis=1)
        scored = job.score(state.train.params, frozen, completions, fold=fold_of(64 + replies, 16, 128, replies, 64))
        prepared, measured = job.prepare(scored, *unscored, state.kl_coefficient)
        new = int(completions.mask.sum())
        fold = fold_of(64 + replies, 8, 128, replies, 64)
        key = jax.random.key(1)
        states["state"], metrics = job.update(state, frozen, prepared, key, measured, fold=fold)
        jax.block_until_ready((states["state"], metrics))
        return 1, SIZES.ppo_flops(new)

    return once


def grpo() -> Once:
    """Run GRPO iterations whose responses all have 64 tokens."""
    return group_iteration((), 0)


def grpo_ragged() -> Once:
    """Run GRPO iterations with responses of 8 to 64 tokens."""
    return group_iteration(stops(SIZES, 20), 8)


JUDGE_SECONDS = 4.0


def grpo_judged() -> Once:
    """Run GRPO iterations in which the processors wait for a judge elsewhere."""
    return group_iteration((), 0, judge=JUDGE_SECONDS)


def grpo_ahead() -> Once:
    """Run GRPO iterations that sample the next responses, with the policy before the update, while the judge reads."""
    return group_iteration((), 0, judge=JUDGE_SECONDS, ahead=True)


def group_iteration(ends: tuple[int, ...], least: int, *, judge: float = 0.0, ahead: bool = False) -> Once:
    """Make an iteration of GRPO with 4 prompts x 4 responses: sample, score, prepare, update.

    The reward is the length, computed on the host. judge: seconds that a service elsewhere takes for it. ahead: sample the next
    responses meanwhile.
    """
    policy = Model(CONFIG)
    config = learn.GRPOConfig(old_logprobs="sampler")
    sampling = rollout.SamplingConfig(max_new_tokens=64, min_new_tokens=least)
    rate = learn.OptimizerConfig(learning_rate=1e-6)
    algorithm = GRPO(
        policy=IN_MEMORY,
        batch=BatchConfig(16, 64),
        samples=4,
        sampling=sampling,
        grpo=config,
        optimizer=rate,
        slots=HALVED if ends else SLOTS,
    )
    roles = roles_of(policy=(policy, draw_params(policy)[0]))
    job = algorithm.wire(setting_of(MESH, steps=1000), roles, {"eos_ids": ends, "pad_id": 0})
    states: dict[str, Any] = {"state": job.state}
    del roles
    texts = np.random.default_rng(0).integers(3, SIZES.vocab, (4, 64)).tolist()
    repeated = [text for text in texts for _ in range(4)]
    numbers = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    prompts = to_global(prompt_batch(repeated, prompt_ids=numbers, sample_ids=[0, 1, 2, 3] * 4), MESH)

    def once() -> tuple[float, float]:
        state = states["state"]
        completions = states.pop("next", None) or job.generate(state.params, {}, prompts, jax.random.key(0))
        lengths = np.asarray(completions.mask).sum(axis=1)
        if ahead:
            states["next"] = job.generate(state.params, {}, prompts, jax.random.key(0))
        time.sleep(judge)
        fold = fold_of(64 + lengths, 16, 128, lengths, 64)
        scores = to_global(({"length": lengths.astype(np.float32)}, np.ones(16, bool)), MESH)
        scored = job.score(state.params, {}, completions, fold=fold)
        prepared, _ = job.prepare(scored, *scores)
        states["state"], metrics = job.update(state, {}, prepared, jax.random.key(1), {}, fold=fold)
        jax.block_until_ready((states["state"], metrics))
        return 1, SIZES.grpo_flops(int(lengths.sum()))

    return once


if __name__ == "__main__":
    peak = peak_flops()
    ready = {row.name: globals()[row.name] for row in ROWS}[sys.argv[1]]()
    ready()  # compiles, and touches every buffer
    if len(sys.argv) > 3:
        ready()
        with jax.profiler.trace(sys.argv[3]):
            ready()
    else:
        serve(ready, version=f"ours, jax {jax.__version__}", peak_flops=peak)
