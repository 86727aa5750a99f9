#!/bin/bash
# Runs one command of shelfmark on one node, such as merge, govern or tokenizer; in the project's root:
#
#   sbatch jobs/command.sh govern CATALOGUE [...]
#
# Options are those of `shelfmark COMMAND --help`. See docs/clusters.md.
#SBATCH --job-name=shelfmark-command
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -n ${SLURM_JOB_ID:-} && -f jobs/common.sh ]] || {
    echo "error: $PWD is not Shelfmark's folder, or SLURM did not start this. There: sbatch jobs/command.sh" >&2
    exit 2
}
source jobs/common.sh
[[ $OMP_NUM_THREADS != auto ]] || export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

[[ -n ${1:-} ]] || fail "no command is named. Name one of \`shelfmark --help\`: sbatch jobs/command.sh govern CATALOGUE"
single "$@"
