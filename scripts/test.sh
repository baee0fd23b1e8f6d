#!/usr/bin/env bash
# The default test suite: everything but slow, parity, multihost and tpu_aot. Arguments go to pytest:
#   scripts/test.sh                                    all of it
#   scripts/test.sh tests/ops -k gae                   some of it
#   scripts/test.sh -m slow                            another selection of markers
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup.sh"
cd "$here/.."
# Two workers, each with one thread for its matrix products: more of either fight over the cores of a laptop.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
