"""A pairwise reward model (Bradley-Terry) from comparisons.

python experiments/train_reward.py --gin_file=configs/support_desk/reward.gin
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
import numpy as np

from rlhf_jax import data, learn, ops
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.folds import refuse_folded, row_fold
from rlhf_jax.algorithms.heldout import heldout_metrics, heldout_scores
from rlhf_jax.algorithms.models import load_model, with_adapters, write_model_card
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, encode_records, tell_left_out
from rlhf_jax.errors import InputError, RunStopped, refuse_unused
from rlhf_jax.io import wrong_normalisation
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings
from rlhf_jax.storage.files import json_text
from rlhf_jax.storage.names import NORMALISATION
from rlhf_jax.types import Term


@gin.configurable
def run(
    run_dir: str,
    steps: int,
    seed: int,
    model: ModelSource,
    records: Records,
    batch: BatchConfig,
    optimizer: learn.OptimizerConfig,
    loop: LoopConfig,
    mesh: MeshConfig = MeshConfig(),
    centring: float = 0.0,
    lora: LoraConfig | None = None,
) -> None:
    """steps: optimiser steps. centring: weight of (chosen + rejected)^2. lora: train adapters and the scalar head, the rest
    frozen. Everything else: rlhf_jax/config/surface.py.

    At the end reward_normalisation.json holds the gain and bias that give held-out rewards (the training pairs' where nothing
    is held out) mean 0 and deviation 1; whoever loads this run as a reward model gets them, so that a KL coefficient means the
    same for every reward model.
    """
    bound = bound_config()
    refuse_unused(batch, "packed")
    if not centring >= 0:
        raise InputError(f"run.centring = {centring!r}: give a number >= 0")
    devices = make_mesh(mesh)
    refuse_folded(batch, devices)
    init_rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))

    # 1. Model and data.
    loaded = with_adapters(load_model(model, "scalar", devices, init_rng), lora, devices, init_rng)
    records = with_date(records, loaded, run_dir)
    tokenizer, network = loaded.tokenizer, loaded.model

    def encode(record: data.Comparison) -> data.EncodedPair | data.Skipped:
        return data.encode_comparison(record, tokenizer, records.template, max_length=batch.length)

    train, heldout = encode_records(records, data.Comparison, encode)
    loaded.refuse_longer(batch.length, "BatchConfig.length")
    if loop.evaluate_every and not heldout.items:
        raise InputError("LoopConfig.evaluate_every: there are no held-out records; set it to 0, or hold some out")
    scaling = heldout.items or train.items
    shape = {"batch_size": batch.batch_size, "length": batch.length, "pad_id": data.padding_id(tokenizer)}
    batches = data.pair_batches(train.items, seed=seed, **shape)

    # 2. State and step.
    adam = learn.make_optimizer(optimizer, steps, matrices=network.matrices())
    shardings = tree_shardings(network.abstract(), network.logical_axes(), devices)
    state = born_sharded(lambda params: learn.initial_state(params, adam, train_rng), shardings, devices, loaded.params)
    settings = {"microbatches": batch.microbatches, "centring": centring}
    train_step, evaluate = programs.reward_functions(network, adam, state, devices, **settings)

    def evaluated(params) -> tuple[np.ndarray, dict[str, Term]]:
        return heldout_scores(evaluate, params, loaded.frozen, scaling, devices, **shape)

    # 3. The loop.
    inputs = [*loaded.as_inputs("model"), *records.as_inputs()]
    with open_run(run_dir, stage="reward", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(records, train, heldout, tokenizer)
        source = {"base": loaded.input, "generation": loaded.generation}
        write_model_card(here.directory, network, tokenizer, records.template, **source)
        state, host = here.restore(state, {"data": batches.get_state()})
        batches.set_state(host["data"])
        scores, normalisation = None, here.directory / NORMALISATION
        if here.resumed_step < steps:  # whoever loads the run meanwhile must not get the numbers of an older step
            normalisation.unlink(missing_ok=True)
        for step in here.steps(here.resumed_step, steps):
            pairs = next(batches)
            fold = row_fold(batch, network, batch.microbatches, data.pair_lengths(pairs), batch.length)
            state, metrics = train_step(state, loaded.frozen, to_global(pairs, devices), fold=fold)
            if not here.log(step, metrics, batch=pairs):
                state = here.rolled_back(state)
                continue
            if here.evaluation_due(step):
                scores, terms = evaluated(state.params)
                here.record(step, heldout_metrics(scores, terms))
            here.save(step, state, {"data": batches.get_state()})
        # The last step was evaluated just now, unless evaluation is off or this process had no step left to do.
        rewards = evaluated(state.params)[0] if scores is None else scores
        gain, bias = ops.normalising_gain_bias(float(rewards.mean()), float(rewards.std()))
        if wrong := wrong_normalisation(float(gain), float(bias)):
            raise RunStopped(
                f"{normalisation.name}: {wrong}: held-out rewards have mean {rewards.mean():.3g}, deviation {rewards.std():.3g}: "
                "the model tells no responses apart; train longer, or hold out other comparisons"
            )
        probe = {"tokens": scaling[0].chosen.tokens, "score": float(gain * rewards[0, 0] + bias)}  # for doctor.py
        numbers = {"gain": float(gain), "bias": float(bias), "pairs": len(scaling), "probe": probe}
        here.write(normalisation.name, json_text(numbers))


if __name__ == "__main__":
    launch(run)
