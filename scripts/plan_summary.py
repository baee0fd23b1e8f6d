"""Plans that training scripts wrote with --plan_json, a row each, as a table for docs/tpu.md.

python scripts/plan_summary.py runs/plans/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
COLUMNS = ["plan", "chips", "fits", "peak of usable GiB", "phases, ms by what bounds them", "iteration s"]
COLUMNS += ["tokens/s/chip (ESTIMATE)", "compile s"]


def row(name: str, message: dict[str, Any]) -> str:
    """Return the row of one plan. chips: as the mesh has them. Phases that need almost no time are left out."""
    phases, chips = message["phases"], 1
    for size in message["settings"]["mesh"].values():
        chips *= size
    fits = "yes" if all(phase["fits"] for phase in phases) else "NO"
    peak = max(phase["memory"]["peak"] if "memory" in phase else float("inf") for phase in phases)
    bounds, total = [], 0.0
    for phase in phases:
        times = phase.get("roofline_seconds")
        if times is None:
            continue
        limit = max(times, key=times.__getitem__)
        total += times[limit]
        if times[limit] >= 1e-3:
            bounds.append(f"{phase['phase']} {times[limit] * 1e3:,.0f} {limit}")
    rate = phases[0]["tokens"] / chips / total if total else 0.0
    compiled = sum(phase["compile_seconds"] for phase in phases)
    size = f"{peak / GIB:.1f} of {message['chip']['hbm_usable'] / GIB:.2f}"
    link = f"[{name}](plans/{name}.md)"
    return f"| {link} | {chips} | {fits} | {size} | {', '.join(bounds)} | {total:.1f} | {rate:,.0f} | {compiled:.0f} |"


def main(files: list[str]) -> None:
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for file in map(Path, files):
        print(row(file.stem, json.loads(file.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
