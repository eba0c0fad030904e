#!/bin/bash
@{directives}
# Written by `foleyscale launch slurm`. It may be submitted again once it is over, an array also in part: what is done is skipped.
set -eEuo pipefail

# The plain job id of one task of an array is that of the whole array: a task is named by two ids.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
start=$((${SLURM_RESTART_COUNT:-0} + 1))

tell() {
    echo "$(date +%FT%T) ${HOSTNAME%%.*} job $job start $start: $1"
}

# A job that was cancelled is no longer running, and stays cancelled. A controller that does not answer is asked again.
requeue() {
    local state try
    for ((try = 0; try < 20; try++)); do
        if state=$(squeue --noheader --jobs="$job" --format=%T); then
            [[ $state == RUNNING ]] || return 0
            tell "$1: back into the queue"
            if scontrol requeue "$job"; then sleep 600; return 0; fi  # until SLURM ends this start
        fi
        sleep 10
    done
}

# Back into the queue, since a job that ends with an error takes all that wait for it along.
again() {
    local status=$1 why=$2 answer
    trap - ERR
    for answer in @{answers}; do  # exit codes that another start would not change
        if ((status == answer)); then tell "$why"; exit "$status"; fi
    done
    if may_restart; then requeue "$why"; fi
    tell "$why: given up"
    exit "$status"
}
trap 'again $? "exit code $?"' ERR

@{work}

tell "running"
cd -- @{folder}
@{setup}
work
tell "exit code 0"
