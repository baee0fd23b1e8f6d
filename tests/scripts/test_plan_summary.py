"""scripts/plan_summary.py on a plan worked by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plan_summary.py"
GIB = 2**30


def summary(tmp_path: Path, *phases: dict) -> str:
    message = {"settings": {"mesh": {"data": 2, "fsdp": 8}}, "chip": {"hbm_usable": 16 * GIB}, "phases": phases}
    (tmp_path / "small.json").write_text(json.dumps(message))
    completions = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "small.json")], capture_output=True, text=True, check=True
    )
    return completions.stdout.splitlines()[-1]


def phase(name: str, fits: bool, peak: float, compute: float, hbm: float) -> dict:
    message = {"phase": name, "fits": fits, "compile_seconds": 2.4, "tokens": 64000, "memory": {"peak": peak * GIB}}
    return message | {"roofline_seconds": {"compute": compute, "hbm": hbm, "ici": 0.0}}


def test_a_row(tmp_path: Path) -> None:
    """1.5 + .5 s at best for 64,000 tokens on 16 chips: 2,000 tokens/s/chip."""
    row = summary(tmp_path, phase("generate", True, 12.0, 0.2, 1.5), phase("update", True, 9.0, 0.5, 0.1))
    assert row == (
        "| [small](plans/small.md) | 16 | yes | 12.0 of 16.00 | generate 1,500 hbm, update 500 compute | 2.0 | 2,000 | 5 |"
    )


def test_what_does_not_fit(tmp_path: Path) -> None:
    """A phase that the compiler itself gave up has neither memory nor times."""
    lost = {"phase": "update", "fits": False, "compile_seconds": 1.0, "tokens": 64000}
    row = summary(tmp_path, phase("generate", True, 12.0, 0.2, 1.5), lost)
    assert "| NO | inf of 16.00 |" in row
