#!/usr/bin/env bash
# A TPU slice from nothing to results: one command each, or the loop that survives preemption.
#   scripts/tpu_vm.sh create            queued resource (spot when SPOT=1), waits until it is there
#   scripts/tpu_vm.sh setup             code, environment and the shared directory on every host
#   scripts/tpu_vm.sh run COMMAND...    on every host, in the background; every checkpoint goes to BUCKET/RUN_DIR
#   scripts/tpu_vm.sh wait              until it has ended on every host; its exit code
#   scripts/tpu_vm.sh logs              follow the log of host 0
#   scripts/tpu_vm.sh loop COMMAND...   create, setup, run, wait; again from the last checkpoint after a preemption
#   scripts/tpu_vm.sh sync              fetch BUCKET/RUN_DIR to this machine
#   scripts/tpu_vm.sh delete            slice and request
# Settings come from the environment: NAME, ZONE, PROJECT, ACCELERATOR (v5p-32, v6e-32, v5litepod-256, ...), VERSION (the
# runtime image), REPO (what to clone), BUCKET (gs://...), RUN_DIR, SPOT, SHARED. DRY_RUN=1 prints each command and runs none.
# COMMAND is a command line of an experiment; it gets --distributed=auto and --sync=BUCKET/RUN_DIR, and must name RUN_DIR as its
# run directory. SHARED=ADDRESS:/SHARE, for slices of several hosts: their parts of a checkpoint go to one directory, an NFS share
# (Filestore) that setup mounts as shared/; RUN_DIR must lie in it. Example:
#   NAME=ppo ZONE=us-east5-a PROJECT=mine ACCELERATOR=v5p-32 VERSION=v2-alpha-tpuv5 REPO=https://github.com/me/rlhf_jax \
#   BUCKET=gs://mine SHARED=10.0.0.2:/share RUN_DIR=shared/ppo SPOT=1 \
#   scripts/tpu_vm.sh loop experiments/train_ppo.py --gin_file=configs/ppo/x.gin "--gin_bindings=run.run_dir = 'shared/ppo'"
# NAME, ZONE, ... are the user's environment; need() checks them.
# shellcheck disable=SC2153
set -euo pipefail

fail() {
    echo "tpu_vm: $1" >&2
    exit 2
}

need() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || fail "$name is not set; see the top of scripts/tpu_vm.sh"
    done
}

# Runs a command, or prints it so that it can be pasted into a shell.
do_it() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on() { # on HOSTS SCRIPT: on host 0, on host 3, or on all
    do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --worker="$1" --command="$2"
}

state() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        echo ACTIVE
        return
    fi
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --project="$PROJECT" \
        --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
    need NAME ZONE PROJECT ACCELERATOR VERSION
    local how=()
    [[ ${SPOT:-0} == 1 ]] && how=(--spot)
    do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" --project="$PROJECT" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$VERSION" "${how[@]}"
    while true; do
        case $(state) in
            ACTIVE) return ;;
            FAILED | SUSPENDED | SUSPENDING) fail "the request ended as $(state): scripts/tpu_vm.sh delete, then create" ;;
        esac
        sleep 30
    done
}

setup() {
    need NAME ZONE PROJECT REPO
    local mount=true
    if [[ -n ${SHARED:-} ]]; then # looked up anew each time: one host must see at once what another has written
        mount="mountpoint -q shared || { sudo apt-get install -yq nfs-common && mkdir -p shared && sudo mount -t nfs"
        mount+=" -o hard,actimeo=1,lookupcache=none $(printf %q "$SHARED") shared && sudo chmod a+rwx shared; }"
    fi
    on all "test -d rlhf_jax || git clone $(printf %q "$REPO") rlhf_jax; cd rlhf_jax && git pull --ff-only && EXTRAS=dev,tpu,gcs scripts/setup.sh && { $mount; }"
}

run() {
    need NAME ZONE PROJECT BUCKET RUN_DIR
    (($#)) || fail "run: give the command line of an experiment"
    [[ -z ${SHARED:-} || $RUN_DIR == shared/* ]] || fail "RUN_DIR=$RUN_DIR does not lie in shared/, where SHARED is mounted"
    local line
    line=".venv/bin/python $(printf '%q ' "$@" "--distributed=auto" "--sync=$BUCKET/$RUN_DIR")> run.log 2>&1; echo \$? > ended"
    on all "cd rlhf_jax && rm -f ended && echo $(printf %q "$line") > run.sh && (nohup bash run.sh >/dev/null 2>&1 &)"
}

wait_for() {
    need NAME ZONE PROJECT
    on all "cd rlhf_jax && until test -f ended; do sleep 10; done; exit \$(cat ended)"
}

logs() {
    need NAME ZONE PROJECT
    on 0 "tail -n 50 -f rlhf_jax/run.log"
}

sync() {
    need BUCKET RUN_DIR
    do_it mkdir -p "$RUN_DIR"
    do_it gcloud storage rsync -r "$BUCKET/$RUN_DIR" "$RUN_DIR"
}

delete() {
    need NAME ZONE PROJECT
    do_it gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --project="$PROJECT" --force --quiet
}

# Exit code of the run; 2 and 3 (a mistake, a guard) would only come again. Anything else is a preemption or a lost host.
loop() {
    local code
    while true; do
        [[ $(state) == ACTIVE && ${DRY_RUN:-0} != 1 ]] || create
        code=0
        { setup && run "$@" && wait_for; } || code=$?
        case $code in
            0 | 2 | 3) return "$code" ;;
        esac
        echo "tpu_vm: the run ended with exit code $code; again from the last checkpoint in $BUCKET/$RUN_DIR" >&2
        if [[ $(state) != ACTIVE ]]; then
            delete || true
        fi
    done
}

command=${1:-}
(($#)) && shift
case $command in
    create | setup | run | logs | loop | sync | delete) "$command" "$@" ;;
    wait) wait_for ;;
    *) fail "give one of create, setup, run, wait, logs, loop, sync, delete; see the top of scripts/tpu_vm.sh" ;;
esac
