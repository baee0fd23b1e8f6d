"""Direct preference optimisation (and its relatives) of a policy from comparisons, without a reward model.

python experiments/train_dpo.py --gin_file=configs/support_desk/dpo.gin
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax

from rlhf_jax import data, learn
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.folds import refuse_folded, row_fold
from rlhf_jax.algorithms.heldout import heldout_metrics, heldout_scores
from rlhf_jax.algorithms.models import load_model, with_adapters, write_model_card
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, encode_records, tell_left_out
from rlhf_jax.errors import InputError, refuse_unused
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, born_sharded, make_mesh, to_global, tree_shardings


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
    dpo: learn.DPOConfig = learn.DPOConfig(),
    mesh: MeshConfig = MeshConfig(),
    lora: LoraConfig | None = None,
) -> None:
    """steps: optimiser steps. model: the policy to begin with, and its own frozen reference. lora: train adapters; the
    reference is their base, without a copy. Everything else: rlhf_jax/config/surface.py."""
    bound = bound_config()
    refuse_unused(batch, "packed")
    if model.config is not None:
        raise InputError("ModelSource.config: a new model knows no replies to prefer; give path, a run of train_sft")
    devices = make_mesh(mesh)
    refuse_folded(batch, devices)
    init_rng, train_rng = jax.random.split(jax.random.key(seed, impl="threefry2x32"))

    # 1. Policy, reference and data.
    loaded = with_adapters(load_model(model, "lm", devices, init_rng), lora, devices, init_rng)
    records = with_date(records, loaded, run_dir)
    reference = load_model(model, "lm", devices, init_rng) if lora is None else loaded.base("lm")
    frozen = loaded.frozen | {"reference": reference.params}
    tokenizer, network = loaded.tokenizer, loaded.model
    loaded.refuse_other_template(data.Form(records.template, tokenizer), responses=True)

    def encode(record: data.Comparison) -> data.EncodedPair | data.Skipped:
        return data.encode_comparison(record, tokenizer, records.template, max_length=batch.length)

    train, heldout = encode_records(records, data.Comparison, encode)
    loaded.refuse_longer(batch.length, "BatchConfig.length")
    if any(pair.margin for pair in (*train.items, *heldout.items)):
        raise InputError("Fields.margin: the losses of DPO have no margins; unset it (train_reward reads them)")
    if loop.evaluate_every and not heldout.items:
        raise InputError("LoopConfig.evaluate_every: there are no held-out records; set it to 0, or hold some out")
    shape = {"batch_size": batch.batch_size, "length": batch.length, "pad_id": data.padding_id(tokenizer)}
    batches = data.pair_batches(train.items, seed=seed, **shape)

    # 2. State and step.
    adam = learn.make_optimizer(optimizer, steps, matrices=network.matrices())
    shardings = tree_shardings(network.abstract(), network.logical_axes(), devices)
    state = born_sharded(lambda params: learn.initial_state(params, adam, train_rng), shardings, devices, loaded.params)
    settings = {"microbatches": batch.microbatches, "dpo": dpo}
    train_step, evaluate = programs.dpo_functions(network, reference.model, adam, state, devices, **settings)

    # 3. The loop.
    inputs = [*loaded.as_inputs("model"), *records.as_inputs()]
    with open_run(run_dir, stage="dpo", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(records, train, heldout, tokenizer)
        source = {"base": loaded.input, "generation": loaded.generation}
        write_model_card(here.directory, network, tokenizer, records.template, **source)
        state, host = here.restore(state, {"data": batches.get_state()})
        batches.set_state(host["data"])
        for step in here.steps(here.resumed_step, steps):
            pairs = next(batches)
            rows = (data.pair_lengths(pairs), batch.length, data.pair_targets(pairs), batch.length - 1)
            fold = row_fold(batch, network, batch.microbatches, *rows)
            state, metrics = train_step(state, frozen, to_global(pairs, devices), fold=fold)
            if not here.log(step, metrics, batch=pairs):
                state = here.rolled_back(state)
                continue
            if here.evaluation_due(step):
                scored = heldout_scores(evaluate, state.params, frozen, heldout.items, devices, **shape)
                here.record(step, heldout_metrics(*scored))
            here.save(step, state, {"data": batches.get_state()})


if __name__ == "__main__":
    launch(run)
