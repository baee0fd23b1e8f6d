"""Train a pairwise reward model (Bradley-Terry) on comparisons.

python experiments/train_reward.py --gin_file=configs/support_desk/reward.gin
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin

from rlhf_jax import learn
from rlhf_jax.algorithms import RewardModel, assemble
from rlhf_jax.algorithms.heldout import heldout_metrics
from rlhf_jax.algorithms.reward import normalisation, scaling_scores
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch, run_mode
from rlhf_jax.loop import LoopConfig, open_job
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.storage.names import NORMALISATION


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
    centring: float = 0.0,
    lora: LoraConfig | None = None,
) -> None:
    """Train a reward model on comparisons.

    steps: optimizer steps of the whole run. centring: weight of (chosen + rejected)^2, which keeps rewards near 0. lora: train
    low-rank adapters and the scalar head with the model frozen; None trains every parameter.

    Every other parameter is described where its type is defined. A plan (--plan) needs no run_dir, steps, seed, records and loop.

    At the end reward_normalisation.json holds the gain and bias that give held-out rewards (without held-out pairs, training
    rewards)
    mean 0 and deviation 1. They are applied when the run is loaded as a reward model, so that a KL coefficient means the same for
    every reward model.
    """
    bound = bound_config()
    algorithm = RewardModel(
        model=model, records=records, batch=batch, optimizer=optimizer, centring=centring, lora=lora
    )
    settings = run_mode(algorithm, mesh=mesh, steps=steps, seed=seed, run_dir=run_dir, loop=loop)
    if settings is None:  # --plan, --doctor
        return
    job = assemble(algorithm, mesh=make_mesh(mesh), steps=settings.steps, seed=settings.seed, run_dir=settings.run_dir)
    with open_job(settings.run_dir, bound=bound, job=job, seed=settings.seed, loop=settings.loop) as run_:
        state, rewards = job.restore(run_), None
        if (
            run_.resumed_step < settings.steps
        ):  # whoever loads the run meanwhile must not get the numbers of an older step
            (run_.directory / NORMALISATION).unlink(missing_ok=True)
        for step in run_.steps(run_.resumed_step, settings.steps):
            pairs = next(job.batches)
            state, metrics = job.train_step(state, job.frozen, job.place(pairs), fold=job.fold(pairs))
            if not run_.log(step, metrics, batch=pairs):
                state = job.roll_back(run_, state)
                continue
            if run_.evaluation_due(step):
                rewards, terms = scaling_scores(job, state.params)
                run_.record(step, heldout_metrics(rewards, terms))
            job.save(run_, step, state)
        # The last step was evaluated just now, unless evaluation is off or this process had no step left to do.
        run_.write(
            NORMALISATION, normalisation(job, scaling_scores(job, state.params)[0] if rewards is None else rewards)
        )


if __name__ == "__main__":
    launch(run)
