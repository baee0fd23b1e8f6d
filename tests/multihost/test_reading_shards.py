"""Two processes (gloo) load one checkpoint over one mesh: each reads the numbers that its own devices hold, and no others.

scripts/test.sh -m multihost tests/multihost/test_reading_shards.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compiler_flags import COMPILER
from safetensors.numpy import save_file

from rlhf_jax.testing import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.multihost
FIELDS = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def write(directory: Path) -> dict[str, int]:
    """A checkpoint in two files with an index; how many numbers each tensor has."""
    directory.mkdir()
    rng, shapes = np.random.default_rng(0), {"model.embed_tokens.weight": (512, 256), "model.norm.weight": (256,)}
    for layer in range(4):
        at = f"model.layers.{layer}."
        shapes |= {at + f"self_attn.{name}_proj.weight": (256, 256) for name in "qkvo"}
        shapes |= {at + f"mlp.{name}_proj.weight": (512, 256) for name in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (256, 512)}
        shapes |= {at + f"{name}_layernorm.weight": (256,) for name in ("input", "post_attention")}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    places = {name: f"part{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in ("part0.safetensors", "part1.safetensors"):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps(FIELDS))
    byte_tokenizer().save_pretrained(directory)
    return {name: tensor.size for name, tensor in tensors.items()}


def test_each_process_reads_what_its_shards_need(tmp_path: Path) -> None:
    sizes = write(tmp_path / "checkpoint")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    settings = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "XLA_FLAGS": COMPILER,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(Path(__file__).with_name("read_shards.py")), str(tmp_path / "checkpoint"), str(port)]
    started = [
        subprocess.Popen(
            [*command, str(index)], env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for index in range(2)
    ]
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    reports = [json.loads((tmp_path / f"read_{index}.json").read_text()) for index in range(2)]
    for report in reports:
        assert report["processes"] == 2
        assert sum(report["read"].values()) == report["own"]  # no number that no device here holds, none twice
        assert report["own"] < 0.55 * sum(sizes.values())
        # one local shard of one stacked parameter (256 KiB), a read of 1024 numbers and Python's own objects
        assert report["above_the_model"] <= report["largest_shard_bytes"] + 64 * 1024
    for name, size in sizes.items():
        split = "norm" not in name
        assert [report["read"][name] for report in reports] == [size // 2 if split else size] * 2, name
    assert reports[0]["sums"] != reports[1]["sums"]  # other numbers
