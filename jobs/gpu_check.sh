#!/bin/bash
# Every proof that needs a GPU, in one run on a machine that has one; fifteen minutes of an H100 (docs/gpu.md):
#
#   jobs/gpu_check.sh [OUT] [--plan] [--parts tests,training] [--budget SECONDS] [--catalogues FOLDER] [--site FOLDER] [--tiny]
#
# Reports and logs go to the folder OUT, by default gpu-check/. PYTHON names the interpreter (3.11 or 3.12; default python3). No root, no network.
# Wheels in the folder wheels/ are first installed into the folder that --site names. In a SLURM job: sbatch --gpus 1 jobs/gpu_check.sh
#SBATCH --job-name=shelfmark-gpu-check
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus=1
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.log
set -euo pipefail
if [[ -n ${SLURM_JOB_ID:-} ]]; then cd "${SLURM_SUBMIT_DIR:-.}"; else cd "$(dirname "$0")/.."; fi
[[ -f jobs/gpu/check.py ]] || {
    echo "error: $PWD is not Shelfmark's folder. There: sbatch jobs/gpu_check.sh" >&2
    exit 2
}
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
    echo "error: there is no $python. Name an interpreter: PYTHON=python3.12 jobs/gpu_check.sh" >&2
    exit 2
}
exec "$python" jobs/gpu/check.py "$@"
