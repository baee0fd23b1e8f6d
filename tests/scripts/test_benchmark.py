"""scripts/benchmark.py: the work it reckons, by hand, and one row from end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmark_profile import shares  # noqa: E402
from benchmark_rows import PEERS, ROWS, SHAPES, Sizes, stops  # noqa: E402 (a script's neighbour, found by the line above)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_flops_by_hand() -> None:
    # A layer: query 2 x 4, key and value 2 x 2 each, output 4 x 2 = 24; three 2 x 5 matrices = 30. Two layers 108, head 10 x 2.
    sizes = Sizes(vocab=10, hidden=2, layers=2, heads=2, kv_heads=1, head_dim=2, ffn=5)
    assert sizes.forward_flops(0, head=False) == 2 * 108
    assert sizes.forward_flops(0) == 2 * (108 + 20)
    # Attention to 3 keys: two products of 2 heads x 2 numbers x 3 keys in 2 layers, two operations each.
    assert sizes.forward_flops(3, head=False) == 2 * 108 + 2 * 2 * (2 * 2 * 3) * 2
    assert sizes.causal_flops(6) == 6 * sizes.forward_flops(3)


def test_flops_of_an_iteration_by_hand() -> None:
    """Nothing sampled: PPO reads 16 prompts with four models and trains two of them four times, GRPO has one model."""
    sizes = SHAPES["tiny"]
    read = 16 * sizes.causal_flops(64, head=False)
    assert sizes.ppo_flops(0) == 4 * read + 4 * 3 * 2 * read
    assert sizes.grpo_flops(0) == read / 4 + 3 * read
    head = sizes.forward_flops(0) - sizes.forward_flops(0, head=False)
    assert sizes.dpo_flops() == 4 * 16 * (sizes.causal_flops(256, head=False) + 192 * head)


def test_the_shape_is_that_of_smollm2() -> None:
    # 134,515,008 parameters, of which 61 norms of 576 are in no product.
    weights = SHAPES["smollm2"].forward_flops(0) / 2
    assert weights == 134_515_008 - 61 * 576


def test_one_token_in_so_many_ends_a_reply() -> None:
    assert len(stops(SHAPES["smollm2"], 60)) == pytest.approx(49152 / 60, abs=1)


def test_time_is_shared_by_what_runs_together() -> None:
    actual, idle = shares([(0.0, 2.0), (1.0, 4.0), (5.0, 6.0)])
    assert actual == [1.5, 2.5, 1.0] and idle == 1.0


def test_every_side_has_its_rows() -> None:
    for side, script in ({"ours": "benchmark_jax.py"} | PEERS).items():
        text = (SCRIPTS / script).read_text()
        for row in ROWS:
            if side == "ours" or side in row.peers:
                assert f"def {row.name}(" in text, (script, row.name)


def test_an_unknown_row_is_one_line() -> None:
    completions = run("--rows=sfd")
    assert (completions.returncode, completions.stdout) == (2, "")
    assert completions.stderr.strip().splitlines() == [
        f"error: --rows: 'sfd' is none of {', '.join(row.name for row in ROWS)}"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["sft_ragged", "rm", "generate_ragged", "ppo_ragged"])
def test_a_row_prints_its_line(row: str) -> None:
    completions = run("--shape=tiny", "--repeats=1", f"--rows={row}")
    assert completions.returncode == 0, completions.stderr
    cells = completions.stdout.splitlines()[3].split(" | ")
    assert cells[0] == row and cells[1].startswith("ours, jax")
    assert float(cells[2].split()[0]) > 0 and 0 < float(cells[4]) < 1


@pytest.mark.slow
def test_a_profile_names_programs_and_products() -> None:
    command = [sys.executable, str(SCRIPTS / "benchmark_profile.py"), "--row=sft", "--shape=tiny", "--top=90"]
    completions = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert completions.returncode == 0, completions.stderr
    head, *lines = completions.stdout.splitlines()
    assert head.startswith("jit_train_step: ") and "GFLOP/s over all" in head
    assert any("GFLOP/s  " in line for line in lines)
