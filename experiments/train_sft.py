"""Supervised fine-tuning, and pre-training a small base model: cross-entropy on demonstrations.

python experiments/train_sft.py --gin_file=configs/support_desk/sft.gin --gin_bindings='run.steps=20'
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax

from rlhf_jax import data, learn
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.heldout import heldout_terms, loss_metrics
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
    mesh: MeshConfig = MeshConfig(),
    lora: LoraConfig | None = None,
) -> None:
    """steps: optimiser steps. lora: train adapters, the model frozen. Everything else is described at its dataclass in
    rlhf_jax/config/surface.py."""
    bound = bound_config()
    refuse_unused(batch, "folded")
    devices = make_mesh(mesh)
    root = jax.random.key(seed, impl="threefry2x32")
    init_rng, train_rng = jax.random.split(root)

    # 1. Model and data.
    loaded = with_adapters(load_model(model, "lm", devices, init_rng), lora, devices, init_rng)
    records = with_date(records, loaded, run_dir)
    tokenizer, network = loaded.tokenizer, loaded.model

    def encode(record: data.Demonstration) -> data.Encoded | data.Skipped:
        return data.encode_demonstration(
            record, tokenizer, records.template, max_length=batch.length, loss_on=records.loss_on
        )

    train, heldout = encode_records(records, data.Demonstration, encode)
    if loop.evaluate_every and not heldout.items:
        raise InputError("LoopConfig.evaluate_every: there are no held-out records; set it to 0, or hold some out")
    longest = max((len(item.tokens) for item in (*train.items, *heldout.items)), default=0)
    loaded.refuse_longer(longest, "BatchConfig.length")
    rows, held_rows = (data.pack(side.items, batch.length) if batch.packed else side.items for side in (train, heldout))
    pad = data.padding_id(tokenizer)
    batches = data.token_batches(rows, batch_size=batch.batch_size, length=batch.length, seed=seed, pad_id=pad)

    # 2. State and step.
    adam = learn.make_optimizer(optimizer, steps, matrices=network.matrices())
    shardings = tree_shardings(network.abstract(), network.logical_axes(), devices)
    state = born_sharded(lambda params: learn.initial_state(params, adam, train_rng), shardings, devices, loaded.params)
    train_step, evaluate = programs.sft_functions(network, adam, state, devices, microbatches=batch.microbatches)

    def heldout_loss(params) -> dict[str, float | None]:
        held = data.evaluation_batches(held_rows, batch_size=batch.batch_size, length=batch.length, pad_id=pad)
        return loss_metrics(heldout_terms(evaluate, params, loaded.frozen, held, devices))

    # 3. The loop.
    inputs = [*loaded.as_inputs("model"), *records.as_inputs()]
    with open_run(run_dir, stage="sft", bound=bound, seed=seed, loop=loop, inputs=inputs, mesh=devices) as here:
        tell_left_out(records, train, heldout, tokenizer)
        source = {"base": loaded.input, "generation": loaded.generation}
        write_model_card(here.directory, network, tokenizer, records.template, **source)
        state, host = here.restore(state, {"data": batches.get_state()})
        batches.set_state(host["data"])
        if here.resumed_step == 0 and loop.evaluate_every:  # before any training, to compare with
            here.record(0, heldout_loss(state.params))
        for step in here.steps(here.resumed_step, steps):
            tokens = next(batches)
            state, metrics = train_step(state, loaded.frozen, to_global(tokens, devices))
            if not here.log(step, metrics, tokens=int(tokens.loss_mask.sum()), batch=tokens):
                state = here.rolled_back(state)
                continue
            if here.evaluation_due(step):
                here.record(step, heldout_loss(state.params))
            here.save(step, state, {"data": batches.get_state()})


if __name__ == "__main__":
    launch(run)
