"""Check a training configuration before it costs days: configuration, data and one step. Nothing is trained or written to its
run_dir.

    python experiments/doctor.py --experiment=train_ppo --gin_file=configs/support_desk/ppo.gin

Hands over to the training script, which has the same as --doctor. Prints a line for each check: ok, note, or WRONG with the
remedy. Exit code 0 when nothing is wrong, else 3.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from rlhf_jax.launch.handing_over import hand_over

if __name__ == "__main__":
    hand_over(__doc__, sys.argv, {}, add=("--doctor",))
