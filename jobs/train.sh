#!/bin/bash
# Trains on whole nodes; in the project's root:
#
#   sbatch --nodes 4 jobs/train.sh [RECIPE] [--train.steps 1000 ...]
#
# RECIPE: jobs/cluster.env names the default. Without --run-dir, and where the recipe has none, the run folder is
# runs/<recipe>-<job id>: a job of its own every time, but the same folder when SLURM requeues it. Two minutes before its
# time is over, and where another job takes its nodes, it saves, and goes on in the queue. See docs/clusters.md.
#SBATCH --job-name=shelfmark-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -n ${SLURM_JOB_ID:-} && -f jobs/common.sh ]] || {
    echo "error: $PWD is not Shelfmark's folder, or SLURM did not start this. There: sbatch jobs/train.sh" >&2
    exit 2
}
source jobs/common.sh

# Requeues a job that a signal has stopped, unless it was cancelled, or was stopped MAX_REQUEUES times in a row without a
# step that was saved.
ended() {
    local status=$1 folder=$2 count=0 before="" newest=""
    # A job that ends by itself within the grace of a preemption has failed for SLURM, which then does not requeue it.
    # 138: SIGUSR1 before the first step.
    if [[ ($status == 75 || $status == 138) && $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
        [[ ! -f $folder/requeues ]] || read -r count before <"$folder/requeues" || true
        newest=$(cat "$folder/checkpoints/latest" 2>/dev/null || true)
        [[ $before == "$newest" ]] || count=0
        echo "$((count + 1)) $newest" >"$folder/requeues"
        if ((count < MAX_REQUEUES)); then
            echo "requeued at ${newest:-the start}"
            scontrol requeue "$SLURM_JOB_ID" && sleep 60 # in which SLURM ends this shell
        else
            echo "not requeued: stopped $((count + 1)) times at ${newest:-the start}"
        fi
    fi
    finish "$status"
}

if [[ ${1:--} != -* ]]; then
    RECIPE=$1
    shift
fi
given=$(option config "$@")
RECIPE=${given:-$RECIPE}
[[ -f $RECIPE ]] || fail "there is no recipe $RECIPE. Recipes lie in jobs/recipes; jobs/cluster.env names the default"

folder=$(option run-dir "$@")
folder=${folder:-$(sed -n 's/^run_dir: *//p' "$RECIPE")}
if [[ -z $folder ]]; then
    name=${RECIPE##*/}
    folder=runs/${name%.*}-$SLURM_JOB_ID
    set -- "$@" --run-dir "$folder"
fi
launch "$folder" harness.train --config "$RECIPE" "$@"
