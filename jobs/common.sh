# shellcheck shell=bash
# What every job does: read cluster.env, check, start one torchrun on each node, report. Sourced in the project's root.

fail() {
    echo "error: $1" >&2
    finish 2
}

# finish STATUS: the end of every job. A stage of jobs/pipeline.sh notes it, and cancels the later ones where it failed.
finish() {
    [[ -z ${STAGE:-} ]] || bash jobs/pipeline.sh --ended "$1"
    exit "$1"
}

# option NAME WORDS...: the value of --NAME in WORDS, the last one where there are several; empty without it.
option() {
    local flag="--$1" value="" word previous=""
    shift
    for word; do
        word=${word/#--run_dir/--run-dir}
        [[ $previous != "$flag" ]] || value=$word
        [[ $word != "$flag="* ]] || value=${word#*=}
        previous=$word
    done
    echo "$value"
}

# ended STATUS FOLDER: the end of the job, once launch has reported. Some jobs have one of their own.
ended() {
    finish "$1"
}

# single WORDS...: runs `python -m harness WORDS` in this process's place on one node, and ends the job.
single() {
    local status=0
    # shellcheck disable=SC2086  # split into words on purpose
    $CONTAINER "$VENV/bin/python" -m harness "$@" || status=$?
    finish "$status"
}

# launch FOLDER MODULE WORDS...: runs `python -m MODULE WORDS` under torchrun on every node of the job and ends the job
# with its exit code. FOLDER is the run folder, for the report. SIGUSR1, which SLURM sends to this shell only
# (--signal=B:USR1@SECONDS), goes to the ranks.
launch() {
    local folder=$1 status=0 filter tasks nodes count
    shift
    # EXCLUDE: nodes that jobs/preflight.sh has found bad.
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF -f <(tr , '\n' <<<"${EXCLUDE:-}")) ||
        fail "no node of the job is left without $EXCLUDE"
    count=$(wc -l <<<"$nodes")
    if [[ $NPROC_PER_NODE == auto ]]; then
        NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
        ((NPROC_PER_NODE > 0)) || NPROC_PER_NODE=1
    fi
    if [[ $OMP_NUM_THREADS == auto ]]; then
        OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE / NPROC_PER_NODE))
        ((OMP_NUM_THREADS > 0)) || OMP_NUM_THREADS=1
    fi

    if [[ $NUMA_BINDING == auto ]]; then
        NUMA_BINDING=none
        # torchrun binds with numactl; on one memory node there is nothing to bind to.
        if command -v numactl >/dev/null && [[ -e /dev/nvidia0 && -e /sys/devices/system/node/node1 ]]; then NUMA_BINDING=node; fi
    fi

    # The node's address as SLURM has it: its name need not resolve.
    local address
    address=$(scontrol show node "${nodes%%$'\n'*}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    local options=(
        --nnodes "$count" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0
        --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --master-addr "$address" --master-port "$RDZV_PORT"
    )
    # A log for each rank, which stays where one fails.
    [[ " $TORCHRUN_ARGS" == *" --"@(log-dir|log_dir|redirects|tee)* ]] ||
        options+=(--log-dir "$SLURM_JOB_NAME-$SLURM_JOB_ID.ranks" --tee 3)
    # A GPU's process on the CPUs and in the memory beside it.
    [[ $NUMA_BINDING == none || " $TORCHRUN_ARGS" == *" --numa"* ]] || options+=(--numa-binding "$NUMA_BINDING")
    # shellcheck disable=SC2206  # split into words on purpose
    options+=($TORCHRUN_ARGS)

    echo "job      $SLURM_JOB_ID $SLURM_JOB_NAME, restart ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T')"
    echo "nodes    $count ($SLURM_JOB_NODELIST${EXCLUDE:+ without $EXCLUDE}), processes on each $NPROC_PER_NODE, threads $OMP_NUM_THREADS," \
        "meeting at $address:$RDZV_PORT"
    echo "commit   $(git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)"
    echo "command  -m ${*@Q}"
    echo

    # From SLURM 22.05 on srun does not take over sbatch's --cpus-per-task.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # A task knows its node's number, this shell does not. The first node that fails ends the others. A progress bar
    # writes over its own line, which srun would hold back until the line ends, and which a file shows as one long line.
    # Whatever comes before the launcher listens must not end it: trap ''.
    exec 3> >(exec stdbuf -o0 tr -s '\r' '\n')
    filter=$!
    # shellcheck disable=SC2016,SC2086
    srun --nodes "$count" --ntasks "$count" --ntasks-per-node 1 ${EXCLUDE:+--exclude="$EXCLUDE"} \
        --quiet --kill-on-bad-exit=1 --cpu-bind=none --unbuffered $SRUN_ARGS \
        bash -c 'trap "" USR1; exec $CONTAINER "$0" jobs/torchrun.py --node-rank "$SLURM_NODEID" "$@"' \
        "$VENV/bin/python" "${options[@]}" -m "$@" >&3 2>&1 3>&- &
    tasks=$!
    exec 3>&-
    trap 'kill -USR1 "$tasks" || true' USR1
    trap : TERM # the tasks have their own; what they saved is to be reported
    while kill -0 "$tasks" 2>/dev/null; do wait "$tasks" || true; done # a signal ends a wait
    wait "$tasks" || status=$?
    wait "$filter" 2>/dev/null || true

    echo
    echo "exit code $status after $(date -u -d "@$SECONDS" +%T), run folder $folder"
    ended "$status" "$folder"
}

set -a
# shellcheck source=jobs/cluster.env
source jobs/cluster.env
set +a
# Lines appear in the log when they are printed; a rank that waits for another one is no news.
export PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# megatron-core's tensor parallelism starts a collective, and then the matrix product behind which it is to hide. It counts on one
# hardware queue for this order, for speed and not for results (tensor_parallel/layers.py of 0.16, which warns without), at
# least on GPUs before Blackwell. Set it before sbatch, or in cluster.env, where another number serves better.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Gathered classes are another number in every step: without segments that grow, the allocator keeps blocks of every size that it has met.
# The longer name is the older one of the same variable.
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
[[ -x $VENV/bin/python || -n $CONTAINER$SRUN_ARGS ]] ||
    fail "no virtual environment at $VENV. Make one there (docs/clusters.md), or name yours in jobs/cluster.env"
