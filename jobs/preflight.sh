#!/bin/bash
# Checks the nodes of a job, names bad ones, and with --then runs another job on the good ones; in the project's root:
#
#   sbatch --nodes 8 jobs/preflight.sh [--run-dir /shared/runs ...]
#   sbatch --nodes 9 jobs/preflight.sh [...] --then jobs/train.sh [RECIPE] [...]
#
# Options are those of `shelfmark preflight --help`. The first form ends with exit code 2 where a node is bad, with a line
# --exclude=... for sbatch; the second goes on without it in the same job. See docs/clusters.md.
#SBATCH --job-name=shelfmark-preflight
#SBATCH --nodes=2
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
    echo "error: $PWD is not Shelfmark's folder, or SLURM did not start this. There: sbatch jobs/preflight.sh" >&2
    exit 2
}
source jobs/common.sh

own=() then=()
while (($#)); do
    if [[ $1 == --then ]]; then then=("${@:2}") && break; fi
    own+=("$1") && shift
done
[[ ${#then[@]} == 0 || -f ${then[0]} ]] || fail "--then names no job: ${then[0]}"
folder=$(option out "${own[@]}")
folder=${folder:-$SLURM_JOB_NAME-$SLURM_JOB_ID}
rm -rf "$folder/here" && mkdir -p "$folder/here"
rm -f "$folder/exclude"

ended() {
    [[ -f $folder/exclude ]] || finish "$1" # it did not come so far
    EXCLUDE=$(cat "$folder/exclude")
    ((${#then[@]})) || finish "$1"
    export EXCLUDE
    exec bash "${then[@]}"
}

# Roll call, without a network: a node that does not start Python, or does not see this folder, is absent.
# shellcheck disable=SC2016,SC2086
srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=0 --quiet $SRUN_ARGS \
    timeout 300 bash -c '$CONTAINER "$0" -c "import torch" && touch "$1/here/$SLURMD_NODENAME"' "$VENV/bin/python" "$folder" || true
EXCLUDE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF -f <(ls "$folder/here") | paste -sd,) || true
launch "$folder" harness preflight --out "$folder" ${EXCLUDE:+--absent "$EXCLUDE"} \
    ${SHELFMARK_CACHE:+--cache "$SHELFMARK_CACHE"} "${own[@]}"
