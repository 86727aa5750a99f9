#!/bin/bash
# Trains the cells of an ablation with equal budgets and writes one table; in the project's root, without SLURM:
#
#   bash jobs/ablate.sh jobs/ablations/make.yaml --catalogue catalogues/fashion --out runs/ablate-make [--ranks 2]
#
# or as an array, whose tasks share the cells:
#
#   sbatch --array=1-4 jobs/ablate.sh jobs/ablations/make.yaml --catalogue catalogues/fashion --out runs/ablate-make
#
# Started again it goes on where it was. The last task to end writes the whole table; without new cells: the first line again.
#SBATCH --job-name=shelfmark-ablate
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f jobs/common.sh ]] || {
    echo "error: $PWD is not Shelfmark's folder. Go there first" >&2
    exit 2
}
[[ -n ${SLURM_JOB_ID:-} ]] || RDZV_PORT=0  # cluster.env makes it of the job's number; here every cell is on one machine
source jobs/common.sh
[[ $OMP_NUM_THREADS != auto ]] || export OMP_NUM_THREADS=1

if [[ -n ${SLURM_ARRAY_TASK_ID:-} && -z $(option part "$@") ]]; then
    [[ ${SLURM_ARRAY_TASK_MIN:-} == 1 && ${SLURM_ARRAY_TASK_MAX:-} == "$SLURM_ARRAY_TASK_COUNT" ]] ||
        fail "the array does not count 1 to n. Give sbatch --array=1-n, or the script --part i/n for one share"
    set -- "$@" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
fi
# shellcheck disable=SC2086  # split into words on purpose
exec $CONTAINER "$VENV/bin/python" jobs/ablate.py "$@"
