"""Train a policy on comparisons without a reward model: direct preference optimization (DPO) and its variants.

python experiments/train_dpo.py --gin_file=configs/support_desk/dpo.gin
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin

from rlhf_jax import learn
from rlhf_jax.algorithms import DPO, assemble
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
    dpo: learn.DPOConfig = learn.DPOConfig(),
    lora: LoraConfig | None = None,
) -> None:
    """Train a policy on comparisons.

    steps: optimizer steps of the whole run. model: the policy to start from; a frozen copy is the reference. lora: train low-rank
    adapters, with their base as the reference; None trains every parameter.

    Every other parameter is described where its type is defined. A plan (--plan) needs no run_dir, steps, seed, records and loop.
    """
    bound = bound_config()
    algorithm = DPO(model=model, records=records, batch=batch, optimizer=optimizer, dpo=dpo, lora=lora)
    settings = run_mode(algorithm, mesh=mesh, steps=steps, seed=seed, run_dir=run_dir, loop=loop)
    if settings is None:  # --plan, --doctor
        return
    job = assemble(algorithm, mesh=make_mesh(mesh), steps=settings.steps, seed=settings.seed, run_dir=settings.run_dir)
    with open_job(settings.run_dir, bound=bound, job=job, seed=settings.seed, loop=settings.loop) as run_:
        state = job.restore(run_)
        for step in run_.steps(run_.resumed_step, settings.steps):
            rows = next(job.batches)
            state, metrics = job.train_step(state, job.frozen, job.place(rows), fold=job.fold(rows))
            if not run_.log(step, metrics, batch=rows):
                state = job.roll_back(run_, state)
                continue
            if run_.evaluation_due(step):
                run_.record(step, job.heldout(state.params))
            job.save(run_, step, state)


if __name__ == "__main__":
    launch(run)
