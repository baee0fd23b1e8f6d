#!/usr/bin/env bash
# The plans of docs/tpu.md, again: compiles each for its slice (needs EXTRAS=dev,tpu scripts/setup.sh; a quarter of an hour to
# an hour each on two cores) and writes OUT/NAME.{md,json}. Names as arguments choose some; none: all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-runs/plans}

plan() { # plan NAME TOPOLOGY MACRO=VALUE...
    local name=$1 topology=$2 bindings=()
    shift 2
    local macro
    for macro in "$@"; do bindings+=("--gin_bindings=$macro"); done
    if ((${#wanted[@]})) && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    echo "== $name" >&2
    .venv/bin/python experiments/plan.py --gin_file=configs/plan/llama3_8b_ppo.gin --topology="$topology" "${bindings[@]}" \
        --json="$out/$name.json" --markdown="$out/$name.md" || echo "$name: exit code $?" >&2
}

wanted=("$@")
plan llama3_8b_ppo_v6e_4x8 v6e:4x8 MICROBATCHES=2 ROLLOUT_TENSOR=2
plan llama3_8b_ppo_v5p_2x2x4 v5p:2x2x4
plan llama3_8b_ppo_v5e_16x16 v5e:16x16 ROWS=512 MICROBATCHES=1 ROLLOUT_TENSOR=8
