"""Train a policy with GRPO or a variant (DAPO, Dr. GRPO, GSPO, RLOO) against a reward model, or against a function of texts.

    python experiments/train_grpo.py --gin_file=configs/support_desk/grpo.gin

One iteration: sample several responses to each prompt, score them, compare them within their prompt, update.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin
import jax

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms import GRPO, assemble
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch, run_mode
from rlhf_jax.loop import LoopConfig, open_job
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, make_mesh, to_host
from rlhf_jax.rewards import Reward, RewardSource
from rlhf_jax.rundir import fetch


@gin.configurable
def run(
    policy: ModelSource,
    batch: BatchConfig,
    samples: int,
    sampling: rollout.SamplingConfig,
    grpo: learn.GRPOConfig,
    optimizer: learn.OptimizerConfig,
    run_dir: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    prompts: RecordSource | Records | None = None,
    loop: LoopConfig | None = None,
    mesh: MeshConfig = MeshConfig(),
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
    rollout_mesh: MeshConfig | None = None,
    reward: ModelSource | None = None,
    reward_texts: Reward | RewardSource | None = None,
    reward_key: str = "gold",
    monitor: Reward | RewardSource | None = None,
    lora: LoraConfig | None = None,
    offload_optimizer: bool = False,
    one_step_off: bool = False,
) -> None:
    """Train a policy with GRPO.

    steps: iterations of the whole run. samples: responses to each prompt; ``batch.batch_size`` counts responses. reward: a reward
    model; give it or reward_texts. reward_texts: a function that scores texts; its ``reward_key`` is the score.

    The other parameters are those of train_ppo. A plan (--plan) needs no run_dir, steps, seed, prompts and loop.
    """
    bound = bound_config()
    algorithm = GRPO(
        policy=policy, reward=reward, lora=lora, batch=batch, samples=samples, prompts=prompts, grpo=grpo,
        sampling=sampling, slots=slots, rollout_mesh=rollout_mesh, one_step_off=one_step_off, optimizer=optimizer,
        reward_texts=reward_texts, reward_key=reward_key, monitor=monitor, offload_optimizer=offload_optimizer,
    )  # fmt: skip
    settings = run_mode(algorithm, mesh=mesh, steps=steps, seed=seed, run_dir=run_dir, loop=loop)
    if settings is None:  # --plan, --doctor
        return
    job = assemble(algorithm, mesh=make_mesh(mesh), steps=settings.steps, seed=settings.seed, run_dir=settings.run_dir)
    with open_job(settings.run_dir, bound=bound, job=job, seed=settings.seed, loop=settings.loop) as run_:
        state = job.restore(run_)
        for step in run_.steps(run_.resumed_step, settings.steps):
            # 1. Sample.
            run_.enter("rollout")
            state = job.offload(state)
            completions = job.rollouts.take(step, job.params(state))
            responses = to_host(completions)
            rollout.stop_if_not_finite(responses, f"step {step}: run.policy")

            # 2. Score: log-probabilities, reward. The devices work while the hosts judge texts.
            run_.enter("score")
            scored = job.score(job.params(state), job.frozen, completions, fold=job.score_fold(responses))
            job.rollouts.begin(step + 1, job.params(state))
            run_.enter("reward")
            judged = job.judge(responses)
            run_.enter("score")
            scored = jax.block_until_ready(scored)

            # 3. Advantages within the responses of each prompt.
            run_.enter("prepare")
            prepared, measured = jax.block_until_ready(job.prepare(scored, *job.place(judged)))

            # 4. Update, epochs times minibatches.
            run_.enter("update")
            state, key = job.reload(state), job.update_key(step)
            state, updated = job.update(state, job.frozen, prepared, key, measured, fold=job.update_fold(responses))

            # 5. One read of the metrics. Sampler, scorer and update agree, or nothing is saved.
            metrics = jax.device_get(measured | updated) | judged.metrics
            job.check_numbers(step, fetch(metrics))
            if not run_.log(step, metrics, **job.cost(responses), batch=prepared):
                state = job.roll_back(run_, state)
                continue
            job.save(run_, step, state)


if __name__ == "__main__":
    launch(run)
