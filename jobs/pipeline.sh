#!/bin/bash
# Submits the whole way from a table and photos to an artefact as SLURM jobs, each after the one before; in the project's
# root, on a node where sbatch works:
#
#   bash jobs/pipeline.sh --manifest products.parquet --images photos/ --catalogue /shared/catalogue \
#       --run-dir /shared/runs/a --artefact /shared/artefacts/a [--recipe RECIPE] [--clicks LOG [--refine]]
#
# Stages: ingest (an array), merge, govern, tokenizer, train, eval, export. With --clicks, classes come from the click log;
# with --refine too, the first training's embeddings govern again, and a second training (RUN-refined) starts from the first.
# Words for each stage and its sbatch: jobs/cluster.env, or the environment. Prints the job of each stage. A stage that
# fails cancels the later ones, and RUN.pipeline/log names it. Started again, what is finished is left out.
set -euo pipefail

# ended STATUS: at the end of the stage STAGE, called by its job.
ended() {
    local name number names=() numbers=() line
    if (($1 == 0)); then
        line="$STAGE ended (job $SLURM_JOB_ID)"
        # The parts of an ingest are their own marks.
        [[ $STAGE == ingest ]] || mv "$PIPELINE/$STAGE.words" "$PIPELINE/$STAGE.done"
    else
        while read -r name number; do
            names+=("$name") numbers+=("$number")
        done < <(sed "1,/^$STAGE /d" "$PIPELINE/jobs")
        line="stage $STAGE failed with exit code $1 (job $SLURM_JOB_ID); cancelled: ${names[*]:-nothing}"
        ((${#numbers[@]} == 0)) || scancel "${numbers[@]}"
    fi
    echo "$line"
    echo "$(date '+%F %T') $line" >>"$PIPELINE/log"
}

if [[ ${1:-} == --ended ]]; then
    ended "$2"
    exit
fi

[[ -f jobs/common.sh ]] || {
    echo "error: $PWD is not Shelfmark's folder. Go there first" >&2
    exit 2
}
[[ -n ${SLURM_JOB_ID:-} ]] || RDZV_PORT=0 # cluster.env makes it of a job's number
source jobs/common.sh

required=(manifest images catalogue run-dir artefact)
manifest="" images="" catalogue="" run="" artefact="" clicks="" refine=""
usage="See the first lines of jobs/pipeline.sh"
while (($#)); do
    case $1 in
        --refine) refine=yes && shift && continue ;;
        --manifest | --images | --catalogue | --run-dir | --artefact | --recipe | --clicks) ;;
        *) fail "unknown option $1. $usage" ;;
    esac
    [[ -n ${2:-} ]] || fail "$1 has no value. $usage"
    case $1 in
        --manifest) manifest=$2 ;; --images) images=$2 ;; --catalogue) catalogue=${2%/} ;; --run-dir) run=${2%/} ;;
        --artefact) artefact=$2 ;; --recipe) RECIPE=$2 ;; --clicks) clicks=$2 ;;
    esac
    shift 2
done
values=("$manifest" "$images" "$catalogue" "$run" "$artefact")
for i in "${!required[@]}"; do
    [[ -n ${values[i]} ]] || fail "--${required[i]} is missing. $usage"
done
[[ -e $manifest ]] || fail "there is no manifest $manifest"
[[ -f $RECIPE ]] || fail "there is no recipe $RECIPE. Recipes lie in jobs/recipes; jobs/cluster.env names the default"
[[ -z $refine || -n $clicks ]] || fail "--refine is for classes that come from a click log. Give --clicks too"

export PIPELINE=$run.pipeline
mkdir -p "$PIPELINE"
if [[ -f $PIPELINE/jobs ]]; then
    queued=$(squeue --noheader --format=%A --jobs="$(cut -d' ' -f2 "$PIPELINE/jobs" | paste -sd,)" 2>/dev/null | sort -u | paste -sd' ') || true
    [[ -z $queued ]] || fail "this pipeline is in the queue (jobs $queued). Wait for its end, or scancel them"
fi
: >"$PIPELINE/jobs"
# What sbatch refuses leaves nothing in the queue.
trap '(($? == 0)) || cut -d" " -f2 "$PIPELINE/jobs" | xargs -r scancel' EXIT
first="" previous=""

# submit NAME SBATCH_WORDS SCRIPT WORDS...: the job of a stage, after the one before.
submit() {
    local name=$1 options
    # shellcheck disable=SC2206  # split into words on purpose
    options=($2)
    shift 2
    if [[ -z $previous ]]; then options+=(--hold); else options+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes); fi
    previous=$(STAGE=$name sbatch --parsable "${options[@]}" "$@")
    previous=${previous%%;*}
    first=${first:-$previous}
    echo "$name $previous" >>"$PIPELINE/jobs"
    printf '%-16s job %s\n' "$name" "$previous"
}

# stage NAME SBATCH_WORDS SCRIPT WORDS...: submits it, unless it has ended with these words and no stage before it runs again.
stage() {
    local name=$1 words="${*:3}"
    if [[ -z $previous && $(cat "$PIPELINE/$name.done" 2>/dev/null) == "$words" ]]; then
        printf '%-16s finished before\n' "$name"
        return
    fi
    rm -f "$PIPELINE/$name.done"
    echo "$words" >"$PIPELINE/$name.words"
    submit "$@"
}

# shellcheck disable=SC2206  # all *_ARGS are split into words on purpose
more_ingest=($INGEST_ARGS) more_govern=($GOVERN_ARGS) more_tokenizer=($TOKENIZER_ARGS) more_train=($TRAIN_ARGS) \
    more_eval=($EVAL_ARGS) more_export=($EXPORT_ARGS) more_refine=($REFINE_ARGS)
[[ -z $clicks ]] || more_govern+=(--clicks "$clicks")
on_one="$COMMAND_SBATCH --job-name=shelfmark"

if [[ -f $catalogue/catalogue.json ]]; then
    printf '%-16s finished before\n' ingest merge
else
    missing=()
    for ((i = 1; i <= INGEST_PARTS; i++)); do
        [[ -d $catalogue.parts/part-$i-of-$INGEST_PARTS ]] || missing+=("$i")
    done
    if ((${#missing[@]})); then
        PARTS=$INGEST_PARTS submit ingest "$INGEST_SBATCH --array=$(IFS=, && echo "${missing[*]}")" jobs/ingest.sh \
            --manifest "$manifest" --images "$images" --out "$catalogue" "${more_ingest[@]}"
    else
        printf '%-16s finished before\n' ingest
    fi
    stage merge "$on_one-merge" jobs/command.sh merge "$catalogue"
fi
stage govern "$on_one-govern" jobs/command.sh govern "$catalogue" "${more_govern[@]}"
stage tokenizer "$on_one-tokenizer" jobs/command.sh tokenizer "$catalogue" "${more_tokenizer[@]}"
stage train "$TRAIN_SBATCH" jobs/train.sh "$RECIPE" --data.catalogue "$catalogue" --run-dir "$run" "${more_train[@]}"
if [[ -n $refine ]]; then
    stage refine-export "$EVAL_SBATCH" jobs/export.sh "$run" --out "$run.embeddings"
    stage refine-embed "$on_one-refine-embed" jobs/command.sh embed "$run.embeddings" "$catalogue" \
        --out "$run.queries.parquet"
    stage refine-govern "$on_one-refine-govern" jobs/command.sh govern "$catalogue" "${more_govern[@]}" \
        --embeddings "$run.embeddings/documents,$run.queries.parquet" "${more_refine[@]}"
    stage refine-train "$TRAIN_SBATCH" jobs/train.sh "$RECIPE" --data.catalogue "$catalogue" --run-dir "$run-refined" \
        --train.init_from "$run" "${more_train[@]}"
    run=$run-refined
fi
stage eval "$EVAL_SBATCH" jobs/eval.sh "$run" "${more_eval[@]}"
stage export "$EVAL_SBATCH" jobs/export.sh "$run" --out "$artefact" "${more_export[@]}"
[[ -z $first ]] || scontrol release "$first"
