"""Plans compiled for real TPU slices: needs the [tpu] extra.

EXTRAS=dev,tpu scripts/setup.sh && scripts/test.sh -m tpu_aot
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.tpu_aot
MIB = 2**20

CONFIG = """
ModelConfig.vocab_size = 2048
ModelConfig.hidden_size = 1024
ModelConfig.num_layers = 4
ModelConfig.num_heads = 8
ModelConfig.num_kv_heads = 8
ModelConfig.head_dim = 128
ModelConfig.ffn_size = 4096
ModelConfig.max_length = 4096
ModelConfig.tie_embeddings = False
ModelConfig.compute_dtype = 'bfloat16'
ModelConfig.remat = True
ModelSource.config = @ModelConfig()
ModelSource.tokenizer = @byte_tokenizer()
run.model = @ModelSource()
run.batch = @BatchConfig()
BatchConfig.batch_size = 16
BatchConfig.length = 1024
run.optimizer = @OptimizerConfig()
"""


def plan(tmp_path: Path, *flags: str, code: int = 0) -> tuple[dict, str]:
    file, out = tmp_path / "x.gin", tmp_path / "plan.json"
    file.write_text(CONFIG)
    command = [sys.executable, "experiments/plan.py", f"--gin_file={file}", "--stage=sft", f"--json={out}", *flags]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=1200)
    assert done.returncode == code, done.stderr
    return json.loads(out.read_text()), done.stderr


def test_a_training_step_under_fsdp(tmp_path: Path) -> None:
    """67.1 M weights in blocks and 4.2 M in table and head, float32 with two moments, over 8 chips."""
    told, _ = plan(tmp_path, "--topology=v5e:2x4")
    step, _ = told["phases"]
    weights = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096) + 2 * 2048 * 1024
    memory = step["memory"]
    assert memory["resident"]["parameters"] == pytest.approx(4 * weights / 8, rel=0.01)
    assert memory["resident"]["optimizer"] == pytest.approx(8 * weights / 8, rel=0.01)
    # Donated: what comes out new are the metrics.
    assert memory["outputs"] < MIB
    # Every chip sends its eighth of the bfloat16 weights to seven others, forward and in the backward pass (twice when
    # recomputed), and 7/8 of float32 gradients. Activations, 16 x 1024 x 1024 x 2 bytes a layer, stay where they are.
    sent = dict.fromkeys({row["axes"] for row in step["collectives"]}, 0.0)
    for row in step["collectives"]:
        sent[row["axes"]] += row["bytes"]
    assert set(sent) == {"fsdp"}
    gathered, reduced = 2 * weights * 7 / 8, 4 * weights * 7 / 8
    assert gathered * 2 * 0.8 < sent["fsdp"] < 1.3 * (3 * gathered + 2 * reduced)
    assert step["fits"] and step["loops_unknown"] == 0


def test_what_does_not_fit_ends_with_3_and_names_the_nearest_change(tmp_path: Path) -> None:
    big = ["--gin_bindings=BatchConfig.batch_size = 512", "--gin_bindings=ModelConfig.remat = False"]
    told, stderr = plan(tmp_path, "--topology=v5e:2x4", "--repairs=3", *big, code=3)
    step = told["phases"][0]
    assert not step["fits"] and step["largest"]
    last = stderr.splitlines()[-1]
    assert last.startswith("stopped: ") and "sft step does not fit" in last and "largest: " in last
    assert "Nearest change: it fits with remat = True" in last


def test_libtpu_knows_every_kind_of_chip() -> None:
    program = """
from rlhf_jax.plan import parse_slice
for name, kind, count in [("v4:2x2x2", "TPU v4", 8), ("v5e:4x4", "TPU v5 lite", 16), ("v5p:2x2x2", "TPU v5", 8),
                          ("v6e:2x4", "TPU v6 lite", 8), ("v5e:4x4*2", "TPU v5 lite", 32)]:
    devices = parse_slice(name).devices()
    assert (devices[0].device_kind, len(devices)) == (kind, count), (name, devices[0].device_kind, len(devices))
"""
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
