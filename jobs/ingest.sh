#!/bin/bash
# Ingests a large manifest in parts, one task of an array for each; in the project's root:
#
#   sbatch --array=1-8 jobs/ingest.sh --manifest products.parquet --images photos/ --out CATALOGUE [...]
#   shelfmark merge CATALOGUE          # when all have ended
#
# A part that failed alone:  sbatch --array=3 jobs/ingest.sh --part 3/8 ... (the same options)
# Options are those of `shelfmark ingest --help`. See docs/clusters.md.
#SBATCH --job-name=shelfmark-ingest
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -n ${SLURM_JOB_ID:-} && -f jobs/common.sh ]] || {
    echo "error: $PWD is not Shelfmark's folder, or SLURM did not start this. There: sbatch jobs/ingest.sh" >&2
    exit 2
}
source jobs/common.sh

if [[ -n ${PARTS:-} ]]; then # of jobs/pipeline.sh, which leaves out those that are there
    set -- "$@" --part "$SLURM_ARRAY_TASK_ID/$PARTS"
elif [[ -z $(option part "$@") ]]; then
    # --array=1-n%limit is fine; any other choice of numbers does not say what n is.
    [[ ${SLURM_ARRAY_TASK_MIN:-} == 1 && ${SLURM_ARRAY_TASK_MAX:-} == "$SLURM_ARRAY_TASK_COUNT" ]] ||
        fail "the array does not count 1 to n. Give sbatch --array=1-n for n parts, or the script --part i/n for one of them"
    set -- "$@" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
fi
single ingest "$@"
