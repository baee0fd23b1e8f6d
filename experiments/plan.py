"""Compile every phase of a training run for a TPU slice, without a TPU, and say whether it fits and what it costs.

    python experiments/plan.py --experiment=train_ppo --gin_file=configs/plan/llama3_8b_ppo.gin --topology=v5p:2x2x4

Hands over to the training script, which has the same as --plan: `experiments/train_ppo.py --gin_file=... --plan=v5p:2x2x4`.
The gin file is that of a run, or one with the models' sizes alone, as in configs/plan. --topology: CHIP:AxB or CHIP:AxBxC, *2
appended for two slices; or local, the devices of this machine, without a verdict. --json=FILE, --html=FILE,
--markdown=FILE: the plan there as well. --search=N: compile the N most promising of many mesh shapes, microbatches and rows.
--show_sharding: the rules of every strategy, and how every parameter lies, without compiling. Exit code 3: it does not fit;
the message names the nearest change that would.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from rlhf_jax.launch.handing_over import hand_over

RENAMED = {"topology": "plan"} | {
    name: f"plan_{name}" for name in ("json", "html", "markdown", "search", "repairs", "keep")
}

if __name__ == "__main__":
    hand_over(__doc__, sys.argv, RENAMED, needed="topology")
