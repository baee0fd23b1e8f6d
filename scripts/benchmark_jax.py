"""Our side of benchmark.py: `python scripts/benchmark_jax.py ROW SHAPE` gets the row ready, says so on one line of JSON, and
runs it once for every line on stdin."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, learn, programs, rollout
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.testing import prompt_batch
from rlhf_jax.types import PairBatch, TokenBatch

SHAPES = {
    "smollm2": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ffn_size=1536,
        max_length=2048,
        tie_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=1200,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=128,
        max_length=2048,
        tie_embeddings=True,
    ),
}
SHAPE = SHAPES[sys.argv[2]]
STOPS = tuple(range(20, SHAPE.vocab_size, 60))  # of a model with random weights a token in sixty


def flops_per_token(context: float) -> float:
    """Of a forward pass: two for every weight of a matrix product, and attention over ``context`` keys."""
    c = SHAPE
    layer = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.hidden_size * c.ffn_size
    weights = c.num_layers * layer + c.vocab_size * c.hidden_size
    return 2.0 * weights + 4.0 * c.num_layers * c.num_heads * c.head_dim * context


def peak_flops() -> float:
    """The best of ten float32 products of 2048 x 2048."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    times = []
    for _ in range(10):
        began = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def full_rows(rows: int, length: int, seed: int) -> TokenBatch:
    """Random tokens, all of them real."""
    tokens = np.random.default_rng(seed).integers(3, SHAPE.vocab_size, (rows, length)).astype(np.int32)
    loss_mask = np.ones((rows, length), bool)
    loss_mask[:, 0] = False
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return TokenBatch(tokens, positions, np.ones_like(tokens), loss_mask)  # type: ignore[arg-type]


def ragged_lengths(count: int) -> np.ndarray:
    """Of documents, 32 ... 256 tokens; benchmark_torch.py draws the same."""
    return np.random.default_rng(0).integers(32, 257, count)


def packed_rows() -> tuple[TokenBatch, int]:
    """16 documents in as few rows of 256 as they fit into, and their tokens."""
    rng = np.random.default_rng(1)
    documents = []
    for length in ragged_lengths(16):
        tokens = rng.integers(3, SHAPE.vocab_size, int(length)).tolist()
        documents.append(data.Encoded(tokens, [False, *[True] * (int(length) - 1)], 1))
    rows = data.pack(documents, 256)
    return data.stack_rows(rows, 256, 0), int(sum(len(each.tokens) for each in documents))


def training(batch: TokenBatch, useful: float, flops: float) -> Callable[[], tuple[float, float]]:
    """An SFT step."""
    mesh = make_mesh(MeshConfig())
    model = Model(SHAPE)
    optimizer = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-5), 1000)
    held = {"state": _state(model, optimizer, mesh)}
    step = programs.sft_functions(model, optimizer, held["state"], mesh, microbatches=1).train_step
    placed = to_global(batch, mesh)

    def once() -> tuple[float, float]:
        held["state"], metrics = step(held["state"], {}, placed)
        jax.block_until_ready((held["state"], metrics))
        return useful, flops

    return once


def _state(model: Model, optimizer: Any, mesh: Any) -> Any:
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    params = born_sharded(model.init, shardings, mesh, jax.random.key(0))
    return born_sharded(lambda p: learn.initial_state(p, optimizer, jax.random.key(1)), shardings, mesh, params)


def sft() -> Callable[[], tuple[float, float]]:
    """8 x 256."""
    return training(full_rows(8, 256, 0), 8 * 256, 3 * 8 * 256 * flops_per_token(128))


def sft_ragged() -> Callable[[], tuple[float, float]]:
    """The useful tokens of 16 packed documents."""
    batch, useful = packed_rows()
    return training(batch, useful, 3 * useful * flops_per_token(72))


def rm() -> Callable[[], tuple[float, float]]:
    """8 pairs x 256."""
    mesh = make_mesh(MeshConfig())
    model = Model(SHAPE.replace(head="scalar"))
    optimizer = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-5), 1000)
    held = {"state": _state(model, optimizer, mesh)}
    functions = programs.reward_functions(model, optimizer, held["state"], mesh, microbatches=1, centring=0.0)
    pairs = PairBatch(full_rows(8, 256, 0), full_rows(8, 256, 1), np.zeros(8, np.float32))  # type: ignore[arg-type]
    placed = to_global(pairs, mesh)
    per_token = flops_per_token(128) - 2.0 * SHAPE.vocab_size * SHAPE.hidden_size

    def once() -> tuple[float, float]:
        held["state"], metrics = functions.train_step(held["state"], {}, placed)
        jax.block_until_ready((held["state"], metrics))
        return 8, 3 * 16 * 256 * per_token

    return once


def sampler(prompts: int, slots: rollout.SlotConfig, stops: tuple[int, ...], least: int) -> Callable[[], Any]:
    """Rollouts of 64 + at most 128 tokens."""
    model = Model(SHAPE)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = prompt_batch(rng.integers(3, SHAPE.vocab_size, (prompts, 64)).tolist())
    sampling = rollout.SamplingConfig(max_new_tokens=128, min_new_tokens=least)

    @jax.jit
    def run(params: Any, batch: Any, key: Any) -> Any:
        return rollout.generate(model, params, batch, key, sampling=sampling, eos_ids=stops, pad_id=0, slots=slots)

    calls = iter(range(1000))

    def once() -> tuple[float, float]:
        done = run(params, batch, jax.random.key(next(calls)))
        new = int(done.mask.sum())
        return new, prompts * 64 * flops_per_token(32) + new * flops_per_token(64 + new / prompts / 2)

    return once


def generate() -> Callable[[], tuple[float, float]]:
    """16 prompts, 128 new tokens each."""
    return sampler(16, rollout.SlotConfig(separate_layers=True), (), 0)


def generate_ragged() -> Callable[[], tuple[float, float]]:
    """64 prompts on 16 slots, 8 ... 128 new tokens."""
    return sampler(64, rollout.SlotConfig(slots=16, prefill=8, smallest=4, separate_layers=True), STOPS, 8)


def ppo() -> Callable[[], tuple[float, float]]:
    """An iteration: sample, score, prepare, update."""
    mesh = make_mesh(MeshConfig())
    policy, value = Model(SHAPE), Model(SHAPE.replace(head="scalar"))
    models = rollout.RolloutModels(policy, policy, value, value)
    params = {
        name: born_sharded(
            model.init, tree_shardings(model.abstract(), model.logical_axes(), mesh), mesh, jax.random.key(0)
        )
        for name, model in (("policy", policy), ("value", value))
    }
    frozen = {"reference": jax.tree.map(jnp.copy, params["policy"]), "reward": jax.tree.map(jnp.copy, params["value"])}
    config = learn.PPOConfig(epochs=4, minibatches=4, old_logprobs="sampler")
    rate = learn.OptimizerConfig(learning_rate=1e-6)
    optimizer = programs.ppo_optimizer(rate, rate, 1000, config)
    begin = programs.ppo_beginning(optimizer, config, jax.random.key(2), share_trunk=False)
    shardings = {
        name: tree_shardings(model.abstract(), model.logical_axes(), mesh)
        for name, model in (("policy", policy), ("value", value))
    }
    held = {"state": born_sharded(begin, shardings, mesh, params)}
    del params
    sampling = rollout.SamplingConfig(max_new_tokens=64)
    four = programs.ppo_functions(
        models, optimizer, held["state"], mesh, sampling=sampling, ppo=config, microbatches=1,
        ends={"eos_ids": (), "pad_id": 0}, slots=rollout.SlotConfig(separate_layers=True),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = to_global(prompt_batch(rng.integers(3, SHAPE.vocab_size, (16, 64)).tolist()), mesh)
    forward = flops_per_token(64)
    trunk = forward - 2.0 * SHAPE.vocab_size * SHAPE.hidden_size
    tokens = 16 * 128
    flops = tokens * (forward + 2 * forward + 2 * trunk) + 4 * 3 * tokens * (forward + trunk)

    def once() -> tuple[float, float]:
        state = held["state"]
        done = four.generate(state.train.params, prompts, jax.random.key(int(state.train.step)))
        prepared, _ = four.prepare(four.score(state.train.params, frozen, done), state.kl_coefficient)
        train, metrics = four.update(state.train, prepared, jax.random.key(1))
        held["state"] = learn.PPOState(train, state.kl_coefficient, state.iteration + 1)
        jax.block_until_ready((train, metrics))
        return 1, flops

    return once


ROWS = {f.__name__: f for f in (sft, sft_ragged, generate, generate_ragged, rm, ppo)}


def main() -> None:
    """One row, as often as asked."""
    peak = peak_flops()
    once = ROWS[sys.argv[1]]()
    once()  # compiles
    once()
    print(json.dumps({"version": jax.__version__, "peak_flops": peak}), flush=True)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        amount, flops = once()
        seconds, used = time.perf_counter() - began, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"seconds": seconds, "cpu_seconds": used, "amount": amount, "flops": flops, "peak_bytes": memory}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
