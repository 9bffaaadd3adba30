#!/bin/bash
# slurm/pipeline.sh MODEL [[STAGE:]key=value | [STAGE:]--sbatch-option=value]...
#
#   slurm/pipeline.sh llama3_128k run.root=/data/runs search:corpus.folder=/data/pg19 train:training.tokens=1e9 train:--time=3-0
#
# pack -> search -> train -> evaluate -> export: one job after the other (slurm/STAGE_MODEL.sh). A word with STAGE: before it is
# for that stage alone, others are for all. A stage that is complete is skipped; when one fails, those behind it are cancelled,
# and the same command goes on from there.
set -euo pipefail
STAGES=(pack search train evaluate export)
PRODUCTS=(1_segments 2_factors 3_checkpoints 4_evaluations 5_exports)

fail() { echo "error: $*" >&2; exit 2; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || fail "which model? slurm/pipeline.sh MODEL [[STAGE:]key=value ...]; one of $(basename -s .sh slurm/models/*.sh | paste -sd' ')"
model=$1
shift
[ -f "slurm/models/$model.sh" ] || fail "no slurm/models/$model.sh; one of $(basename -s .sh slurm/models/*.sh | paste -sd' ')"
# shellcheck source=slurm/models/llama3_128k.sh
. "slurm/models/$model.sh"

root=runs name='' experiment=$EXPERIMENT
for word; do
    case $word in
        run.root=*) root=${word#*=} ;;
        run.name=*) name=${word#*=} ;;
        experiment=*) experiment=${word##*/} experiment=${experiment#experiment=} experiment=${experiment%.yaml} ;;
        *:run.root=* | *:run.name=*) fail "$word: all stages share one run folder; give run.root and run.name without a stage" ;;
        --*=* | [a-z]*:--*=*) ;;
        --* | [a-z]*:--*) fail "$word: give sbatch's options as --option=value" ;;
        pack:* | search:* | train:* | evaluate:* | export:*) ;;
        *=*) ;;
        *) fail "$word: neither [STAGE:]key=value nor [STAGE:]--option=value, STAGE one of ${STAGES[*]}" ;;
    esac
done
run=$root/${name:-$experiment}
# The path as it stands, with spaces and backslashes.
queued=$(squeue -h -o '%i %k' | RUN=$run awk '{ id = $1; sub(/^[^ ]+ /, "") } $0 == ENVIRON["RUN"] { print id }' | paste -sd' ')
[ -z "$queued" ] || fail "$run is in the queue already: jobs $queued; wait, or scancel $queued"

# The words of "$@" that are for STAGE: sbatch's options into OPTIONS, the stage's own into WORDS.
words_of() {
    local stage=$1 word
    shift
    OPTIONS=() WORDS=()
    for word; do
        case $word in
            "$stage":*) word=${word#*:} ;;
            pack:* | search:* | train:* | evaluate:* | export:*) continue ;;
        esac
        if [[ $word == --* ]]; then OPTIONS+=("$word"); else WORDS+=("$word"); fi
    done
}

mkdir -p "$run"
export PIPELINE_LOG=$run/pipeline.log
previous='' jobs=()
for i in "${!STAGES[@]}"; do
    stage=${STAGES[i]} job_name=${STAGES[i]}_$model
    if [ -f "$run/${PRODUCTS[i]}/manifest.json" ]; then
        printf '%-9s complete: %s\n' "$stage" "$run/${PRODUCTS[i]}"
        continue
    fi
    words_of "$stage" "$@"
    after=()
    [ -z "$previous" ] || after=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable --comment="$run" "${after[@]}" "${OPTIONS[@]}" "slurm/$job_name.sh" "${WORDS[@]}")
    previous=${job%%;*}
    jobs+=("$previous")
    printf '%-9s job %s, log slurm/logs/%s-%s.log\n' "$stage" "$previous" "$job_name" "$previous"
done
[ ${#jobs[@]} -gt 0 ] || { echo "nothing to do"; exit 0; }
echo "watch:    squeue -j $(IFS=, && echo "${jobs[*]}")"
echo "          tail -f $PIPELINE_LOG"
