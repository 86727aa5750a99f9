#!/bin/bash
# Trains on whole nodes; in the project's root:
#
#   sbatch --nodes 4 jobs/train.sh [RECIPE] [--train.steps 1000 ...]
#
# RECIPE: jobs/cluster.env names the default. Without --run-dir, and where the recipe has none, the run folder is
# runs/<recipe>-<job id>: a job of its own every time, but the same folder when SLURM requeues it. See docs/clusters.md.
#SBATCH --job-name=shelfmark-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -n ${SLURM_JOB_ID:-} && -f jobs/common.sh ]] || {
    echo "error: $PWD is not Shelfmark's folder, or SLURM did not start this. There: sbatch jobs/train.sh" >&2
    exit 2
}
source jobs/common.sh

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
