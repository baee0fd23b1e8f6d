"""Programs and plans compiled for real TPU slices: needs the [tpu] extra, no TPU.

EXTRAS=dev,tpu scripts/setup.sh && scripts/test.sh -m tpu_aot -n 0 tests/plan/test_tpu_aot.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.plan import count, parse_module
from rlhf_jax.plan.cost import COLLECTIVES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.tpu_aot
MIB = 2**20
COMPLAINT = "nvoluntary full rematerialization"

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


PPO = """
include 'configs/plan/llama3_8b_ppo.gin'
ModelConfig.vocab_size = 4096
ModelConfig.hidden_size = 256
ModelConfig.num_layers = 4
ModelConfig.num_heads = 8
ModelConfig.ffn_size = 512
BatchConfig.batch_size = 64
BatchConfig.microbatches = 1
"""


def run(*arguments: str, code: int = 0, log: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program of ours in a process of its own, nothing looked up in a cache. log: a directory for libtpu's log files."""
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    settings |= {} if log is None else {"TPU_LOG_DIR": str(log)}
    settings.pop("JAX_COMPILATION_CACHE_DIR", None)
    completions = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=3600
    )
    assert completions.returncode == code, completions.stderr
    return completions


def logged(log: Path) -> str:
    """What libtpu wrote there; it writes something in any case."""
    files = list(log.iterdir())
    assert files
    return "\n".join(file.read_text(errors="replace") for file in files)


def plan(
    tmp_path: Path, *flags: str, experiment: str = "sft", config: str = CONFIG, code: int = 0, log: Path | None = None
) -> tuple[dict, str]:
    file, out = tmp_path / "x.gin", tmp_path / "plan.json"
    file.write_text(config)
    arguments = [f"--gin_file={file}", "--compilation_cache=off", f"--plan_json={out}", *flags]
    completions = run(f"experiments/train_{experiment}.py", *arguments, code=code, log=log)
    return json.loads(out.read_text()), completions.stderr


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The step of scripts/weak_scaling.py on v5e 2x4: a parsed program, its sizes, the compiler's log."""
    out, log = tmp_path_factory.mktemp("step") / "step.json", tmp_path_factory.mktemp("log")
    run("tests/plan/compiled_step.py", "v5e:2x4", str(out), log=log)
    message = json.loads(out.read_text())
    return message | {"log": logged(log), "module": parse_module(message["text"])}


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The plan of a small PPO on v5e 2x4 that samples with tensor 2, and the compiler's log."""
    directory, log = tmp_path_factory.mktemp("ppo"), tmp_path_factory.mktemp("log")
    message, _ = plan(
        directory, "--plan=v5e:2x4", "--gin_bindings=ROLLOUT_TENSOR=2", experiment="ppo", config=PPO, log=log
    )
    return message | {"log": logged(log)}


def test_nothing_is_rematerialised_against_our_will(step: dict, tmp_path: Path) -> None:
    """That it would be seen: a program of which the partitioner complains."""
    (log := tmp_path / "log").mkdir()
    run("tests/plan/compiled_step.py", log=log)
    assert COMPLAINT in logged(log)
    assert COMPLAINT not in step["log"]


def test_the_phases_of_ppo_are_not_rematerialised_either(ppo: dict) -> None:
    """Parameters over fsdp go to a mesh with tensor 2 for sampling; they pass through no whole stack of a matrix."""
    assert len(ppo["phases"]) == 4 and COMPLAINT not in ppo["log"]


def test_no_activation_is_gathered(step: dict) -> None:
    """Lengths (768) and rows of a chip times length (1536) are sizes of activations alone; token ids may travel."""
    sent = []
    for body in step["module"].computations.values():
        for one in body.values():
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                sent += [array for name in one.operands for array in body[name].arrays] + list(one.arrays)
    assert any(1024 in array.dims for array in sent)
    assert [array for array in sent if array.dtype in ("bf16", "f32") and {768, 1536, 12288} & set(array.dims)] == []


def test_gradients_are_scattered_not_reduced_to_every_chip(step: dict) -> None:
    """Blocks hold 67.1 M weights, table and head 4.2 M each. A chip sends 7/8 of: the blocks three times in bfloat16
    (forward, recomputed and backward, their gradients), the head twice and the table once, and float32 gradients of both.
    All-reduced gradients of the blocks would be a third more."""
    cost = count(step["module"], step["mesh"])
    assert {axes for _, axes in cost.moved} == {"fsdp"}
    reduced = sum(sent for (kind, _), sent in cost.moved.items() if kind == "all-reduce")
    assert reduced < MIB  # norms and numbers
    predicted = 7 / 8 * (3 * 2 * 67.1e6 + (2 * 2 + 2) * 4.2e6 + 2 * 4 * 4.2e6)
    assert 0.9 * predicted < cost.moved_bytes < 1.25 * predicted


def test_a_chip_holds_its_shards_and_the_state_is_donated(step: dict) -> None:
    """XLA pads small arrays; every array of the state comes back where it was."""
    sizes, predicted = step["sizes"], step["predicted"]
    assert predicted["state"] == pytest.approx(12 * 75.5e6 / 8, rel=0.01)  # float32 with two moments
    assert sizes["argument"] == pytest.approx(predicted["state"] + predicted["batch"], rel=0.01)
    assert sizes["alias"] == pytest.approx(predicted["state"], rel=0.01)
    assert sizes["output"] - sizes["alias"] < MIB
    aliases = step["text"].split("input_output_alias={", 1)[1].split("\n", 1)[0]
    assert aliases.count("may-alias") + aliases.count("must-alias") == step["leaves"]


def test_the_cache_is_as_large_as_predicted(ppo: dict) -> None:
    """Keys and values of 4 layers x 16 rows a chip x 4 heads x 2048 columns x 128 in bfloat16, and little beside it."""
    generate = ppo["phases"][0]
    cache = 2 * 4 * 16 * 4 * 2048 * 128 * 2
    assert generate["analytic"]["KV cache"] == cache
    assert cache < generate["memory"]["temporaries"] < 1.3 * cache


def test_memory_is_within_15_percent_of_the_analytic_sum(tmp_path: Path) -> None:
    """A step of Llama 3 8B, one sequence of 4096 a chip: 12 bytes of state a weight over 16 chips, and what
    `plan.analytic` knows of the rest."""
    message, _ = plan(tmp_path, "--plan=v5p:2x2x4", config="include 'configs/plan/llama3_8b_sft.gin'")
    step = message["phases"][0]
    analytic = sum(step["memory"]["resident"].values()) + sum(step["analytic"].values())
    assert step["memory"]["resident"]["parameters"] == pytest.approx(4 * 8.03e9 / 16, rel=0.01)
    assert analytic == pytest.approx(step["memory"]["peak"], rel=0.15)


def test_weak_scaling() -> None:
    """Parameters over four chips, copies of these. From 2 to 64 copies a chip sends of the gradients that it holds (4.2 M each of
    table and head in float32, 67.1 M of blocks in bfloat16, a quarter of each) 2 x 63/64 instead of 2 x 1/2, and nothing else
    more."""
    lines = run("scripts/weak_scaling.py", "v5e:2x4", "v5e:16x16").stdout.splitlines()[2:]
    few, many = ([float(cell) for cell in line.split("|")[2:6]] for line in lines)
    more = 2 * (63 / 64 - 1 / 2) * (2 * 67.1e6 + 2 * 4 * 4.2e6) / 4
    assert (few[0], many[0]) == (8, 256) and (many[2] - few[2]) * MIB == pytest.approx(more, rel=0.02)
    assert few[3] == pytest.approx(1, abs=0.03) and many[3] == pytest.approx(1, abs=0.03)


def test_a_plan_that_does_not_fit_names_the_nearest_change(tmp_path: Path) -> None:
    big = ["--gin_bindings=BatchConfig.batch_size = 512", "--gin_bindings=ModelConfig.remat = False"]
    message, stderr = plan(tmp_path, "--plan=v5e:2x4", "--plan_repairs=3", *big, code=3)
    step = message["phases"][0]
    assert not step["fits"] and step["largest"]
    last = stderr.splitlines()[-1]
    assert last.startswith("stopped: ") and "sft step does not fit" in last and "largest: temporary " in last
    assert "Nearest change: it fits with ModelConfig.remat = 'cheap'" in last


def test_temporaries_are_those_of_the_compilers_limit() -> None:
    """tanh(a b) c of matrices of 1/2 GiB: beside three arguments and the output there is one product. With matrices of 8 GiB, 24 +
    8 + 8 GiB are too much for a v5e, and the compiler says that it needs 40."""
    program = """
import jax, jax.numpy as jnp
from rlhf_jax.plan import parse_slice
from rlhf_jax.plan.program import compile_program
device = jax.sharding.SingleDeviceSharding(parse_slice("v5e:2x4").devices()[0])
product = jax.jit(lambda a, b, c: jnp.tanh(a @ b) @ c, in_shardings=device, out_shardings=device)
def compiled(width):
    matrix = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    return compile_program(product.lower(matrix, matrix, matrix), tpu=True)
small, large = compiled(2**14), compiled(2**16)
print(small.arguments / 2**30, small.outputs / 2**30, small.temporaries / 2**30, small.largest)
print(large.problem, large.largest)
"""
    small, large = run("-c", program).stdout.splitlines()
    arguments, outputs, temporaries, largest = small.split(" ", 3)
    assert (float(arguments), float(outputs)) == (1.5, 0.5) and float(temporaries) == pytest.approx(0.5, abs=0.01)
    assert "dot_general bf16[16384,16384]', 536870912)" in largest
    assert "HLO temporaries (40.00G) exceeds available HBM (15.75G)" in large
    assert "dot_general bf16[65536,65536]', 8589934592)" in large


def test_libtpu_knows_every_kind_of_chip() -> None:
    program = """
from rlhf_jax.plan import parse_slice
for name, kind, count in [("v4:2x2x2", "TPU v4", 8), ("v5e:4x4", "TPU v5 lite", 16), ("v5p:2x2x2", "TPU v5", 8),
                          ("v6e:2x4", "TPU v6 lite", 8), ("v5e:4x4*2", "TPU v5 lite", 32)]:
    devices = parse_slice(name).devices()
    assert (devices[0].device_kind, len(devices)) == (kind, count), (name, devices[0].device_kind, len(devices))
"""
    run("-c", program)
