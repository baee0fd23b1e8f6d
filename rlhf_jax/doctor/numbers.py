"""Checks that compute: gradients, scores, time, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import learn
from rlhf_jax.batches import TokenBatch
from rlhf_jax.doctor.findings import Finding, judge
from rlhf_jax.models import Model, sequence_scores
from rlhf_jax.storage.files import read_object
from rlhf_jax.storage.names import NORMALISATION
from rlhf_jax.types import LossFn, Mean, Params, Rng, Term

GRADIENT_GAP = 1e-3
"""Largest relative difference of a gradient between microbatches and none, float32 sums in another order."""
PROBE_GAP = 1e-3
"""Largest difference of a reward model's stored probe score after reload, reward units."""


def gradient_check(
    loss: LossFn, params: Any, example: Any, microbatches: int, rng: jax.Array, frozen: Any = None
) -> Finding:
    """Check that the gradient accumulated over microbatches is that of the whole batch.

    The loss of routers is left out: it balances the experts' loads within every microbatch, so that it depends on the cut.
    """
    parts = microbatches if microbatches > 1 else 2
    rows = jax.tree.leaves(example)[0].shape[0]
    if rows % parts:
        return Finding("note", "gradient accumulation", f"{rows} rows do not divide into {parts}; not compared")
    additive, has_routers = (
        _without_routers(loss),
        "router" in jax.eval_shape(loss, params, frozen or {}, example, rng)[0],
    )
    whole, other = (
        jax.jit(lambda p, f, b, n=n: learn.gradients(additive, p, f, b, rng, n)[0])(params, frozen or {}, example)
        for n in (1, parts)
    )
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    if largest == 0:
        return Finding("note", "gradient accumulation", "every gradient is 0; not compared")
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True))
    words = f"{parts} microbatches against one: {gap / largest:.1e} of the largest gradient"
    words += ", without the routers' loss" if has_routers else ""
    return judge("gradient accumulation", gap <= GRADIENT_GAP * largest, words, "the loss is not a sum over rows")


def _without_routers(loss: LossFn) -> LossFn:
    def additive(params: Params, frozen: Params, batch: Any, rng: Rng) -> tuple[dict[str, Term], dict[str, Mean]]:
        terms, metrics = loss(params, frozen, batch, rng)
        return {name: term for name, term in terms.items() if name != "router"}, metrics

    return additive


def timed_steps(step: Callable[[], Any], steps: int) -> Finding:
    """Time two steps, the first of which compiles."""
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        jax.block_until_ready(step())
        seconds.append(time.monotonic() - began)
    hours = steps * seconds[1] / 3600
    words = (
        f"{seconds[1]:.2f} s a step after {seconds[0] - seconds[1]:.1f} s of compiling; {steps} steps: {hours:.2f} h"
    )
    return Finding("ok", "time", words)


def memory_check(state: Any, extra: Any) -> Finding:
    """Check the bytes that stay on the fullest device, before any activation."""
    device_bytes: dict[Any, int] = {}
    for leaf in jax.tree.leaves((state, extra)):
        for shard in leaf.addressable_shards:
            device_bytes[shard.device] = device_bytes.get(shard.device, 0) + shard.data.nbytes
    worst = max(device_bytes.values())
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    words = f"{worst / 1e9:.3f} GB of parameters and optimiser on the fullest of {len(device_bytes)} devices"
    if limit is None:
        return Finding("ok", "memory", f"{words}; activations come on top (--plan says how much)")
    return judge(
        "memory", worst < 0.9 * limit, f"{words}, of {limit / 1e9:.1f} GB", "more devices, or a smaller param_dtype"
    )


def probe_check(run_dir: Path, model: Model, params: Params) -> Finding:
    """Check that a reward model scores its stored probe as it did when it was trained."""
    file = run_dir / NORMALISATION
    numbers = read_object(file) if file.is_file() else {}
    if "probe" not in numbers:
        return Finding("note", "reward model", f"{run_dir} keeps no probe (trained by an older version): not compared")
    probe = numbers["probe"]
    tokens = jnp.asarray(probe["tokens"], jnp.int32)[None]
    batch = TokenBatch(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))
    score = float(sequence_scores(model, params, batch)[0])
    words = f"stored probe {probe['score']:.6f}, now {score:.6f}"
    remedy = "the model loaded is not the one trained: its files were changed"
    return judge("reward model", abs(score - probe["score"]) <= PROBE_GAP, words, remedy)
