#!/usr/bin/env bash
# The main job on the laptop's CPU: base model, SFT, reward model, PPO, evaluation, report in runs/quickstart/.
# The same command goes on after a stop. Arguments go to experiments/pipeline.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
cd "$here/.."
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec .venv/bin/python experiments/pipeline.py --gin_file=configs/pipeline/quickstart.gin "$@"
