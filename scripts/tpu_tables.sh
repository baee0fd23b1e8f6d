#!/usr/bin/env bash
# The plans of docs/tpu.md, again: compiles each for its slice (needs EXTRAS=dev,tpu scripts/setup.sh; two to ten minutes each
# on two cores), writes OUT/NAME.json and PAGES/NAME.md, and prints the table of all that OUT holds. Names as arguments choose
# some; none: all. What was compiled is kept in OUT/programs and not compiled again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-runs/plans}
pages=${PAGES:-docs/plans}
python=${PYTHON:-.venv/bin/python}

plan() { # plan NAME CONFIG TOPOLOGY MACRO=VALUE...
    local name=$1 config=$2 topology=$3 bindings=()
    shift 3
    local macro
    for macro in "$@"; do bindings+=("--gin_bindings=$macro"); done
    if ((${#wanted[@]})) && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    echo "== $name" >&2
    "$python" experiments/train_ppo.py --gin_file="configs/plan/$config.gin" --plan="$topology" "${bindings[@]}" \
        --plan_keep="$out/programs" --plan_json="$out/$name.json" --plan_markdown="$pages/$name.md" || echo "$name: exit code $?" >&2
}

wanted=("$@")
v6e=(MICROBATCHES=2 ROLLOUT_TENSOR=2)
v5e=(ROWS=512 MICROBATCHES=1 ROLLOUT_TENSOR=8 train/MeshConfig.fsdp=64 train/MeshConfig.data=4)
plan llama3_8b_ppo_v5p_2x2x4 llama3_8b_ppo v5p:2x2x4
plan llama3_8b_ppo_v6e_4x8 llama3_8b_ppo v6e:4x8 "${v6e[@]}"
plan llama3_8b_ppo_v5e_16x16 llama3_8b_ppo v5e:16x16 "${v5e[@]}"
plan llama3_8b_ppo_lora_v5p_2x2x4 llama3_8b_ppo_lora v5p:2x2x4
plan llama3_8b_ppo_lora_v6e_4x8 llama3_8b_ppo_lora v6e:4x8 "${v6e[@]}"
plan llama3_8b_ppo_lora_v5e_16x16 llama3_8b_ppo_lora v5e:16x16 "${v5e[@]}"
plan qwen2.5_0.5b_ppo_v5e_2x4 qwen2.5_0.5b_ppo v5e:2x4
plan llama3_70b_ppo_v5p_8x8x8 llama3_70b_ppo v5p:8x8x8
"$python" scripts/plan_summary.py "$out"/*.json
