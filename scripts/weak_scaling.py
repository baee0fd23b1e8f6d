"""Bytes that a chip sends in a training step on slices of 8 to 256 chips with the same work a chip, as a table for docs/tpu.md.

    python scripts/weak_scaling.py                      # needs the [tpu] extra; no TPU
    python scripts/weak_scaling.py v5p:2x2x2 v5p:4x4x4  # other slices

SFT of a small model (75 M weights, splash attention, recomputed blocks), parameters over four chips and copies of these
(MeshConfig.data), two sequences of 768 tokens a chip. Predicted: `rlhf_jax.plan.sent_bytes`. Four, so that there are copies on
eight chips already: of a slice that is one ring the compiler makes another program (docs/tpu.md).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jax.sharding import Mesh

from rlhf_jax import learn, plan
from rlhf_jax.algorithms import SFT, SHAPES
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, abstract_arrays, make_mesh, tree_shardings
from rlhf_jax.testing import IN_MEMORY, loaded_model

SLICES = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
LENGTH, ROWS_A_CHIP, FSDP = 768, 2, 4
CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=4096,
    max_length=4096,
    tie_embeddings=False,
    compute_dtype="bfloat16",
    remat=True,
    logits_chunk=LENGTH,
)


class Scaled(NamedTuple):
    """chips of the slice; predicted, compiled: bytes that leave a chip in a step; peak: bytes of HBM a chip; seconds: to
    compile."""

    chips: int
    predicted: float
    compiled: float
    peak: int
    seconds: float


def training_step(name: str, fsdp: int = FSDP) -> tuple[Model, Mesh, plan.PlannedPhase]:
    """Return the model on the slice ``name``, its mesh, and the step as a phase. fsdp: chips that share the parameters."""
    where = plan.parse_slice(name)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp), where.devices())
    model = Model(CONFIG, ActivationConstraint(mesh))
    shapes = model.abstract()
    params = abstract_arrays(shapes, tree_shardings(shapes, model.logical_axes(), mesh))
    batch = BatchConfig(ROWS_A_CHIP * where.chips, LENGTH)
    algorithm = SFT(model=IN_MEMORY, batch=batch, optimizer=learn.OptimizerConfig())
    job = algorithm.wire(Setting.of(mesh, 1, 0, SHAPES), loaded_model(model, params), None)
    return model, mesh, plan.planned(algorithm.phases(job), job.models, mesh)[0]


def scaled(name: str) -> Scaled:
    """Return the row of one slice."""
    model, mesh, step = training_step(name)
    actual = plan.compile_phase(step, mesh, plan.parse_slice(name).chip)
    assert actual.cost is not None and actual.memory is not None
    predicted = plan.sent_bytes(model, mesh.shape["fsdp"], mesh.shape["data"], LENGTH)
    return Scaled(mesh.size, predicted, actual.cost.moved_bytes, actual.memory.peak, actual.compile_seconds)


def main(names: list[str]) -> None:
    print("| slice | chips | predicted MiB | compiled MiB | ratio | HBM peak MiB | compile s |")
    print("|---|---|---|---|---|---|---|")
    for name in names or SLICES:
        one = scaled(name)
        sizes = f"{one.predicted / 2**20:.1f} | {one.compiled / 2**20:.1f} | {one.compiled / one.predicted:.2f}"
        print(f"| {name} | {one.chips} | {sizes} | {one.peak / 2**20:.0f} | {one.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
