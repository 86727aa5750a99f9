#!/bin/bash
# Evaluates a run's checkpoint; in the project's root:
#
#   sbatch --nodes 2 jobs/eval.sh RUN [--split test ...]
#
# Options are those of `shelfmark eval --help`. See docs/clusters.md.
#SBATCH --job-name=shelfmark-eval
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
    echo "error: $PWD is not Shelfmark's folder, or SLURM did not start this. There: sbatch jobs/eval.sh" >&2
    exit 2
}
source jobs/common.sh

[[ -f ${1:-}/config.yaml ]] || fail "'${1:-}' is not a run folder. Name the one that the training's log names: sbatch jobs/eval.sh RUN"
launch "$1" harness eval "$@"
