"""Our side of benchmark.py: `python scripts/benchmark_jax.py ROW SHAPE` gets a row ready and runs it as
`benchmark_rows.serve` says; of benchmark_profile.py with a third argument, a directory: runs it once and leaves JAX's trace
there."""

from __future__ import annotations

import dataclasses
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
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.scoring import RolloutModels
from rlhf_jax.batches import PairBatch, TokenBatch
from rlhf_jax.models import Fold, Model, ModelConfig, fold_of
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.testing import prompt_batch
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
    """A second, in the best of ten float32 products of 2048 x 2048."""
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
    """Random tokens, the loss on all but the first."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, SIZES.vocab, length).tolist() for length in lengths]
    return [data.Encoded(text, [False, *[True] * (len(text) - 1)], 1) for text in texts]


def padded(lengths: Sequence[int], width: int, seed: int) -> TokenBatch:
    """A document a row."""
    return data.stack_rows([[document] for document in documents(lengths, seed)], width, 0)


def drawn(model: Model) -> tuple[Params, Any]:
    """Fresh parameters and their shardings."""
    shardings = tree_shardings(model.abstract(), model.logical_axes(), MESH)
    return born_sharded(model.init, shardings, MESH, jax.random.key(0)), shardings


def supervised(
    model: Model,
    functions: Any,
    batch: Any,
    amount: float,
    flops: float,
    frozen: Params | None = None,
    fold: Fold | None = None,
) -> Once:
    """A training step. functions: (optimizer, state) -> `programs.SupervisedFunctions`."""
    optimizer = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-5), 1000)
    params, shardings = drawn(model)
    held = {
        "state": born_sharded(lambda p: learn.initial_state(p, optimizer, jax.random.key(1)), shardings, MESH, params)
    }
    del params
    step, placed = functions(optimizer, held["state"]).train_step, to_global(batch, MESH)

    def once() -> tuple[float, float]:
        held["state"], metrics = step(held["state"], frozen or {}, placed, fold=fold)
        jax.block_until_ready((held["state"], metrics))
        return amount, flops

    return once


def sft() -> Once:
    """8 x 256."""
    return training(padded([256] * 8, 256, 0), [256] * 8)


def sft_ragged() -> Once:
    """Packed."""
    return training(data.stack_rows(data.pack(documents(GSM8K, 0), 512), 512, 0), GSM8K)


def training(batch: TokenBatch, lengths: Sequence[int]) -> Once:
    """An SFT step."""
    model, flops = Model(CONFIG), 3 * sum(map(SIZES.causal_flops, lengths))

    def functions(optimizer: Any, state: Any) -> Any:
        return programs.sft_functions(model, optimizer, state, MESH, microbatches=1)

    return supervised(model, functions, batch, sum(lengths), flops)


def rm() -> Once:
    """8 pairs x 256."""
    return pairs([256] * 16, 256)


def rm_ragged() -> Once:
    """8 pairs in rows of the longest, folded."""
    return pairs(GSM8K, max(GSM8K))


def pairs(lengths: Sequence[int], width: int) -> Once:
    """A reward model's step."""
    model = Model(CONFIG.replace(head="scalar"))
    batch = PairBatch(padded(lengths[:8], width, 0), padded(lengths[8:], width, 1), np.zeros(8, np.float32))  # type: ignore[arg-type]
    flops = 3 * sum(SIZES.causal_flops(length, head=False) for length in lengths)

    def functions(optimizer: Any, state: Any) -> Any:
        return programs.reward_functions(model, optimizer, state, MESH, microbatches=1, centring=0.0)

    return supervised(model, functions, batch, 8, flops, fold=fold_of(data.pair_lengths(batch), 16, width))


def dpo() -> Once:
    """8 pairs x 256, of which 64 are the prompt; the reference reads them too."""
    policy = Model(CONFIG)
    sides = (padded([256] * 8, 256, seed) for seed in (0, 1))
    replies = [dataclasses.replace(side, loss_mask=side.loss_mask & (np.arange(256) >= 64)) for side in sides]
    batch = PairBatch(*replies, np.zeros(8, np.float32))  # type: ignore[arg-type]

    def functions(optimizer: Any, state: Any) -> Any:
        settings = {"microbatches": 1, "dpo": learn.DPOConfig()}
        return programs.dpo_functions(policy, policy, optimizer, state, MESH, **settings)

    fold = fold_of(data.pair_lengths(batch), 16, 256, data.pair_targets(batch), 255)
    return supervised(policy, functions, batch, 8, SIZES.dpo_flops(), {"reference": drawn(policy)[0]}, fold)


def generate() -> Once:
    """16 prompts, 128 new tokens each."""
    return sampler(16, SLOTS, (), 0)


def generate_ragged() -> Once:
    """64 prompts on 16 slots, 8 ... 128 new tokens."""
    return sampler(64, REFILLED, stops(SIZES, 60), 8)


def sampler(prompts: int, slots: rollout.SlotConfig, ends: tuple[int, ...], least: int) -> Once:
    """Rollouts of 64 + at most 128 tokens."""
    model = Model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = prompts_of(prompts)
    sampling = rollout.SamplingConfig(max_new_tokens=128, min_new_tokens=least)

    @jax.jit
    def run(params: Any, batch: Any, key: Any) -> Any:
        return rollout.generate(model, params, batch, key, sampling=sampling, eos_ids=ends, pad_id=0, slots=slots)

    calls = iter(range(1000))

    def once() -> tuple[float, float]:
        done = run(params, batch, jax.random.key(next(calls)))
        new = int(done.mask.sum())
        return new, SIZES.sampling_flops(prompts, 64, new)

    return once


def prompts_of(count: int) -> Any:
    """64 random tokens each."""
    return prompt_batch(np.random.default_rng(0).integers(3, SIZES.vocab, (count, 64)).tolist())


def ppo() -> Once:
    """All replies of 64 tokens."""
    return iteration((), 0)


def ppo_ragged() -> Once:
    """Replies of 8 ... 64."""
    return iteration(stops(SIZES, 20), 8)


def iteration(ends: tuple[int, ...], least: int) -> Once:
    """Of PPO: sample, score, prepare, update."""
    policy, value = Model(CONFIG), Model(CONFIG.replace(head="scalar"))
    models = RolloutModels(policy, policy, value, value)
    both = {"policy": drawn(policy), "value": drawn(value)}
    params = {name: each for name, (each, _) in both.items()}
    frozen = {"reference": jax.tree.map(jnp.copy, params["policy"]), "reward": jax.tree.map(jnp.copy, params["value"])}
    rate = learn.OptimizerConfig(learning_rate=1e-6)
    config = learn.PPOConfig(epochs=4, minibatches=1, old_logprobs="sampler")
    sampling = rollout.SamplingConfig(max_new_tokens=64, min_new_tokens=least)
    settings = programs.PPOSettings(1000, sampling, config, rate, rate, microbatches=2, slots=HALVED if ends else SLOTS)
    optimizer = programs.ppo_optimizer(settings, models)
    begin = programs.ppo_beginning(optimizer, settings, jax.random.key(2))
    held = {"state": born_sharded(begin, {name: each for name, (_, each) in both.items()}, MESH, params)}
    del params, both
    four = programs.ppo_functions(models, optimizer, held["state"], MESH, settings, {"eos_ids": ends, "pad_id": 0})
    prompts = to_global(prompts_of(16), MESH)

    def once() -> tuple[float, float]:
        state = held["state"]
        done = four.generate(state.train.params, prompts, jax.random.key(0))
        replies = np.asarray(done.mask).sum(axis=1)
        scored = four.score(state.train.params, frozen, done, fold=fold_of(64 + replies, 16, 128, replies, 64))
        prepared, _ = four.prepare(scored, state.kl_coefficient)
        new = int(done.mask.sum())
        fold = fold_of(64 + replies, 8, 128, replies, 64)
        train, metrics = four.update(state.train, prepared, jax.random.key(1), fold=fold)
        held["state"] = dataclasses.replace(state, train=train)
        jax.block_until_ready((train, metrics))
        return 1, SIZES.ppo_flops(new)

    return once


def grpo() -> Once:
    """All replies of 64 tokens."""
    return group_iteration((), 0)


def grpo_ragged() -> Once:
    """Replies of 8 ... 64."""
    return group_iteration(stops(SIZES, 20), 8)


JUDGE_SECONDS = 4.0


def grpo_judged() -> Once:
    """The processors have nothing to do while the judge, a service elsewhere, reads."""
    return group_iteration((), 0, judge=JUDGE_SECONDS)


def grpo_ahead() -> Once:
    """Meanwhile they sample the next iteration's replies, by the policy before this one's update."""
    return group_iteration((), 0, judge=JUDGE_SECONDS, ahead=True)


def group_iteration(ends: tuple[int, ...], least: int, *, judge: float = 0.0, ahead: bool = False) -> Once:
    """Of GRPO: sample, score, prepare, update; 4 prompts x 4. The reward is the length, computed on the host. judge: seconds
    that something else takes for it. ahead: sample the next replies meanwhile."""
    policy = Model(CONFIG)
    models = RolloutModels(policy, None, None, None)
    config = learn.GRPOConfig(old_logprobs="sampler")
    sampling = rollout.SamplingConfig(max_new_tokens=64, min_new_tokens=least)
    rate = learn.OptimizerConfig(learning_rate=1e-6)
    settings = programs.GRPOSettings(1000, 4, sampling, config, rate, slots=HALVED if ends else SLOTS)
    optimizer = programs.grpo_optimizer(settings, models)
    params, shardings = drawn(policy)

    def begin(params: Params) -> Any:
        return learn.initial_state(params, optimizer, jax.random.key(2))

    held = {"state": born_sharded(begin, {"policy": shardings}, MESH, {"policy": params})}
    del params
    four = programs.grpo_functions(models, optimizer, held["state"], MESH, settings, {"eos_ids": ends, "pad_id": 0})
    frozen = {"reference": None, "reward": None}
    texts = np.random.default_rng(0).integers(3, SIZES.vocab, (4, 64)).tolist()
    each = {"prompt_ids": [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, "sample_ids": [0, 1, 2, 3] * 4}
    prompts = to_global(prompt_batch([text for text in texts for _ in range(4)], **each), MESH)

    def once() -> tuple[float, float]:
        state = held["state"]
        done = held.pop("next", None) or four.generate(state.params, prompts, jax.random.key(0))
        lengths = np.asarray(done.mask).sum(axis=1)
        if ahead:
            held["next"] = four.generate(state.params, prompts, jax.random.key(0))
        time.sleep(judge)
        fold = fold_of(64 + lengths, 16, 128, lengths, 64)
        scores = to_global(lengths.astype(np.float32), MESH)
        scored = four.score(state.params, frozen, done, fold=fold).replace(scores=scores)
        prepared, _ = four.prepare(scored)
        held["state"], metrics = four.update(state, prepared, jax.random.key(1), fold=fold)
        jax.block_until_ready((held["state"], metrics))
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
