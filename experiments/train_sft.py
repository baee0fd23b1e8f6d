"""Supervised fine-tuning: cross-entropy on demonstrations. Pre-training of a small base model works the same way.

python experiments/train_sft.py --gin_file=configs/support_desk/sft.gin --gin_bindings='run.steps=20'
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin

from rlhf_jax import learn
from rlhf_jax.algorithms import SFT, assemble
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch, run_mode
from rlhf_jax.loop import LoopConfig, open_job
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, make_mesh


@gin.configurable
def run(
    model: ModelSource,
    batch: BatchConfig,
    optimizer: learn.OptimizerConfig,
    run_dir: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    records: RecordSource | Records | None = None,
    loop: LoopConfig | None = None,
    mesh: MeshConfig = MeshConfig(),
    lora: LoraConfig | None = None,
) -> None:
    """Train a model on demonstrations.

    steps: optimizer steps of the whole run. lora: train low-rank adapters with the model frozen; None trains every parameter.

    Every other parameter is described where its type is defined. A plan (--plan) needs no run_dir, steps, seed, records and loop.
    """
    bound = bound_config()
    algorithm = SFT(model=model, records=records, batch=batch, optimizer=optimizer, lora=lora)
    settings = run_mode(algorithm, mesh=mesh, steps=steps, seed=seed, run_dir=run_dir, loop=loop)
    if settings is None:  # --plan, --doctor
        return
    job = assemble(algorithm, mesh=make_mesh(mesh), steps=settings.steps, seed=settings.seed, run_dir=settings.run_dir)
    with open_job(settings.run_dir, bound=bound, job=job, seed=settings.seed, loop=settings.loop) as run_:
        state = job.restore(run_)
        if run_.resumed_step == 0 and settings.loop.evaluate_every:  # before any training, to compare with
            run_.record(0, job.heldout(state.params))
        for step in run_.steps(run_.resumed_step, settings.steps):
            rows = next(job.batches)
            state, metrics = job.train_step(state, job.frozen, job.place(rows))
            if not run_.log(step, metrics, tokens=int(rows.loss_mask.sum()), batch=rows):
                state = job.roll_back(run_, state)
                continue
            if run_.evaluation_due(step):
                run_.record(step, job.heldout(state.params))
            job.save(run_, step, state)


if __name__ == "__main__":
    launch(run)
