"""One of two processes that load the same checkpoint over eight devices; writes what it read (test_reading_shards.py)."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np

checkpoint, port, index = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)

from rlhf_jax.io import load, load_pretrained, placing  # noqa: E402  (JAX must know of the other process first)
from rlhf_jax.parallel import MeshConfig, make_mesh  # noqa: E402

read: dict[str, int] = {}
opened = load.open_safetensors


def counting(directory: Path):
    tensors = opened(directory)
    inner = tensors.read

    def counted(name, window):
        part = inner(name, window)
        read[name] = read.get(name, 0) + part.size
        return part

    return load.Tensors(tensors.where, tensors.stored, counted, tensors.readable)


load.open_safetensors = counting
placing.READ_NUMBERS = 1024  # small beside the largest shard, as 2**23 is beside a real model's
mesh = make_mesh(MeshConfig(fsdp=8))
tracemalloc.start()
params = load_pretrained(checkpoint, mesh=mesh).params
end, peak = tracemalloc.get_traced_memory()
leaves = jax.tree.leaves(params)
own = [{str(shard.index): shard.data for shard in leaf.addressable_shards} for leaf in leaves]
report = {
    "read": read,
    "sums": [[float(np.asarray(part, np.float64).sum()) for _, part in sorted(parts.items())] for parts in own],
    "own": sum(part.size for parts in own for part in parts.values()),
    "largest_shard_bytes": max(part.nbytes for parts in own for part in parts.values()),
    "above_the_model": peak - end,
    "processes": jax.process_count(),
}
(checkpoint.parent / f"read_{index}.json").write_text(json.dumps(report))
