"""Peak memory of one SFT step, as the compiler reports it: by how many columns are scored at a time, and with adapters.
Nothing is run.

    python scripts/memory_table.py                          # for this machine
    python scripts/memory_table.py --topology=v5e:2x2       # for one chip of a TPU slice, without a TPU (needs libtpu)

Prints a markdown table (docs/memory.md): temporary bytes of the compiled step beside its arguments (parameters, moments).
The model has the sizes of Llama 3.2 1B: 16 layers of width 2048, 128,256 tokens.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from rlhf_jax import learn
from rlhf_jax.batches import TokenBatch
from rlhf_jax.launch.command import run_command
from rlhf_jax.models import LoraConfig, Model, ModelConfig, lora, sequence_logprobs

MODEL = ModelConfig(
    128256, 2048, 16, 32, 8, 64, 8192, max_length=131072, rope_theta=5e5, compute_dtype="bfloat16", remat=True
)


def compile_step(model: Model, rows: int, length: int, device: jax.Device) -> tuple[int, int]:
    """Return (temporary bytes, argument bytes) of an SFT step with Adam on one device, of the adapters where existing are some."""
    adam = learn.make_optimizer(learn.OptimizerConfig(), 10)
    loss = learn.make_sft_loss(lambda params, batch: sequence_logprobs(model, params, batch))
    step = jax.jit(learn.make_train_step(lora.on_adapters(loss, model.lora), adam), donate_argnums=0)

    def begin() -> tuple[object, object]:
        rng = jax.random.key(0, impl="threefry2x32")
        params = model.init(rng)
        base, trained = lora.split(params) if model.lora is not None else ({}, params)
        return learn.initial_state(trained, adam, rng), {"base": base} if model.lora is not None else {}

    def existing(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

    def read() -> TokenBatch:
        tokens = jnp.zeros((rows, length), jnp.int32)
        return TokenBatch(tokens, tokens, tokens, jnp.ones((rows, length), jnp.bool_))

    (state, frozen), batch = jax.tree.map(existing, jax.eval_shape(lambda: (begin(), read())))
    memory = step.lower(state, frozen, batch).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


def table() -> int:
    """Print the table."""
    settings = flags.FLAGS
    device = jax.devices()[0]
    if settings.topology:
        device = topologies.get_topology_desc(platform="tpu", topology_name=settings.topology).devices[0]
    rows, length = settings.rows, settings.length
    print(f"{device.device_kind}: {rows} rows of {length} columns; logits [B, S, V] would be ", end="")
    print(f"{rows * length * MODEL.vocab_size * 4 / 2**30:.2f} GiB in float32\n")
    print("| trained | base | logits_chunk | temporary, GiB | arguments, GiB |\n|---|---|---|---|---|")
    adapters = LoraConfig(rank=16)
    for trained, dtype, columns in (
        ("everything", "float32", length),
        ("everything", "float32", 512),
        ("everything", "float32", 128),
        ("everything", "float32", 32),
        ("LoRA, rank 16", "float32", 128),
        ("LoRA, rank 16", "bfloat16", length),
        ("LoRA, rank 16", "bfloat16", 128),
        ("LoRA, rank 16", "int8", 128),
    ):
        config = MODEL.replace(logits_chunk=columns, param_dtype="bfloat16" if dtype == "int8" else dtype)
        model = Model(config, lora=None if trained == "everything" else adapters, int8=dtype == "int8")
        temporary, arguments = compile_step(model, rows, length, device)
        name = f"{columns} (all)" if columns == length else str(columns)
        numbers = f"{temporary / 2**30:.2f} | {arguments / 2**30:.2f}"
        print(f"| {trained} | {dtype} | {name} | {numbers} |", flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "TPU topology to compile for, such as v5e:2x2; default: this machine.")
    flags.DEFINE_integer("rows", 4, "Rows of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 2048, "Columns of a batch.", lower_bound=1)
    sys.exit(run_command(table, sys.argv, __doc__ or "", ("topology", "rows", "length")))
