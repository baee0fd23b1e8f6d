#!/usr/bin/env bash
# Make .venv at the root of the repository and install the package with its [dev] extra at the versions of
# constraints.txt. Quick when nothing changed. Works from any directory, asks nothing.
#   scripts/setup.sh                       the usual
#   EXTRAS=dev,tpu scripts/setup.sh        other extras (parity, tpu, gpu, gcs)
#   PYTHON=python3.12 scripts/setup.sh     another interpreter (>= 3.11)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup: $1" >&2
    exit 1
}

extras=${EXTRAS:-dev}
python=${PYTHON:-python3}
venv=.venv
stamp=$venv/installed

if [[ ! -x $venv/bin/python ]]; then
    if [[ -z ${PYTHON:-} ]]; then
        for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
    fi
    command -v "$python" >/dev/null || fail "no $python; install Python >= 3.11 or name one: PYTHON=/path/to/python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$("$python" --version) is too old; Python >= 3.11 is needed: PYTHON=/path/to/python3.11"
    rm -rf "$venv"
    "$python" -m venv "$venv" </dev/null || fail "cannot make $venv; does $python have the venv module?"
fi

wanted=$( (echo "$PWD $extras" && cat pyproject.toml constraints.txt) | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    rm -f "$stamp"
    echo "setup: installing into $venv (once; some minutes)" >&2
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        -e ".[$extras]" -c constraints.txt </dev/null || fail "pip could not install .[$extras]; its reason is above"
    echo "$wanted" >"$stamp"
fi
