# shellcheck shell=bash
# What every job script shares; sourced by them inside a job. Node and GPU counts come from Slurm alone.
#
# A stage: site settings, doctor on every node, configuration composed and checked once, ranks, and what comes next:
# done, again (asked to stop, time limit, a rank or a node that failed), or stop with a message (launch/cluster/attempts.py).
# Logs: slurm/logs/NAME-ID.log, and beside it NAME-ID/start-N/ with a file for every rank and every node's check.
set -euo pipefail

# Addresses with a user or password, which the commands refuse, are not to stand in a log.
say() { printf '%s  %s\n' "$(date '+%F %T')" "$*" | sed -E 's#://[^/@[:space:]]+@#://...@#g' >&2; }
fail() { say "error: $*"; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "submit it: sbatch slurm/SCRIPT.sh [key=value ...]"
cd "$SLURM_SUBMIT_DIR"
[ -f slurm/common.sh ] || fail "submit from the root of the repository, not from $SLURM_SUBMIT_DIR"

# --- site settings (slurm/site.example.env says what there is)
PYTHON=(.venv/bin/python)
DEVICE=gpu
SCRATCH=/tmp
MIN_FREE_GB=50
MIN_BANDWIDTH_GBPS=0
SRUN_OPTIONS=()
# The one task of a node starts all its ranks: Slurm must not bind it to a core.
export SLURM_CPU_BIND=none
SITE=${LONGROPE2_SITE:-slurm/site.env}
if [ -f "$SITE" ]; then
    # shellcheck source=slurm/site.example.env
    . "$SITE"
elif [ -n "${LONGROPE2_SITE:-}" ]; then
    fail "LONGROPE2_SITE=$LONGROPE2_SITE: no such file"
fi

NODES=$SLURM_JOB_NUM_NODES
ON_STOP=end
SIGNAL_LEAD=900 # seconds: --signal of the scripts that train
START=${SLURM_RESTART_COUNT:-0}
LOGS=slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID/start-$START
# The first name in plain order: the agent of every node numbers the ranks by it.
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | LC_ALL=C sort | head -n 1)
mkdir -p "$LOGS"

# --- stages; of several words with the same key the last counts

# train KEY=VALUE...: over all GPUs of the job.
train() {
    last_wins "$@"
    count_ranks
    begin "$NODES nodes x $RANKS_PER_NODE ranks: training ${WORDS[*]}"
    ON_STOP=save
    check_nodes
    check_network
    over_all_ranks launch.train "${WORDS[@]}"
    finish
}

# search KEY=VALUE...: over all GPUs of the job. Every finished loss is in a journal: to be ended costs next to nothing.
search() {
    last_wins "$@"
    count_ranks
    begin "$NODES nodes x $RANKS_PER_NODE ranks: search ${WORDS[*]}"
    check_nodes
    check_network
    over_all_ranks launch.search "${WORDS[@]}"
    finish
}

# pack KEY=VALUE...: this process hands the work out as job arrays, in the partition of this job.
pack() {
    DEVICE=cpu
    if in_container; then # in it there is no sbatch: with the cores of this job
        last_wins cluster=local "$@"
    else
        last_wins cluster=slurm cluster.partition="$SLURM_JOB_PARTITION" "$@"
    fi
    begin "packing ${WORDS[*]}"
    check_nodes
    attempt "$(run_folder)/1_segments" pack_from_here "${WORDS[@]}"
    finish
}

# evaluate KEY=VALUE...: one GPU; in an array each task answers its share, and the last to end writes the table.
evaluate() {
    local product count=${SLURM_ARRAY_TASK_COUNT:-1} ended
    last_wins "$@"
    begin "evaluation ${WORDS[*]}"
    product=$(run_folder)/4_evaluations
    check_nodes
    if [ "$count" -gt 1 ]; then
        attempt "$product" exec_here -m launch.evaluate "${WORDS[@]}" "evaluation.shard=$SLURM_ARRAY_TASK_ID/$count"
        ended=slurm/logs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/ended
        mkdir -p "$ended/$SLURM_ARRAY_TASK_ID"
        # The last one to come here counts all; of two that come at once, one makes the folder.
        if [ "$(find "$ended" -mindepth 1 -maxdepth 1 -name '[0-9]*' | wc -l)" -lt "$count" ] || ! mkdir "$ended/table" 2>/dev/null; then
            finish
        fi
    fi
    attempt "$product" exec_here -m launch.evaluate "${WORDS[@]}"
    finish
}

# export_model KEY=VALUE...
export_model() {
    last_wins "$@"
    begin "export ${WORDS[*]}"
    check_nodes
    attempt "$(run_folder)/5_exports" exec_here -m launch.export "${WORDS[@]}"
    finish
}

# --- checks that come first: a job that cannot work does not start

# Every node by itself (GPUs, disk, packages); then all reports side by side.
check_nodes() {
    local bad
    srun "${SRUN_OPTIONS[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --output="$LOGS/doctor-%N.log" \
        "${PYTHON[@]}" -m launch.doctor node "$LOGS" --device "$DEVICE" --scratch "$SCRATCH" \
        --min-free-gb "$MIN_FREE_GB" || true
    bad=$(here -m launch.doctor nodes "$LOGS" "$(node_names)") || refuse "$bad"
}

# Between the nodes: clocks, and the bandwidth of an all-reduce.
check_network() {
    local bad
    (on_every_node network launch.doctor network "$LOGS" --device "$DEVICE") || true
    bad=$(here -m launch.doctor links "$LOGS" --min-gbps "$MIN_BANDWIDTH_GBPS") || refuse "$bad"
}

# refuse [NODES]: the doctor has printed why. At its first start a job stops, somebody is watching; a later one begins again
# without NODES.
refuse() {
    touch "$LOGS/refused"
    if [ "$START" -gt 0 ] && ! third_in_a_row refused; then
        say "starts again${1:+ without $1}"
        requeue "$1"
    fi
    fail "nothing was started${1:+; to do without: sbatch --exclude=$1 ...}"
}

# --- running

# RANKS_PER_NODE: one for each GPU that Slurm gave, or what slurm/site.env says.
count_ranks() {
    trap note_failure EXIT
    RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [ -n "$RANKS_PER_NODE" ] || [ "$DEVICE" = cpu ] || fail "Slurm gave this job no GPUs (SLURM_GPUS_ON_NODE is not set):" \
        "submit it with --gpus-per-node=N, or set RANKS_PER_NODE=N in slurm/site.env, or DEVICE=cpu there to compute on cores"
    RANKS_PER_NODE=${RANKS_PER_NODE:-1}
}

# over_all_ranks MODULE ARGUMENTS...: compose once, then the ranks of all nodes on the configuration that was written.
over_all_ranks() {
    local module=$1 config
    shift
    here -m "$module" --prepare "$LOGS/config-path" "$@" "parallel.processes=$((NODES * RANKS_PER_NODE))"
    config=$(cat "$LOGS/config-path")
    [ -n "$config" ] || finish
    attempt "$(dirname "$config")" on_every_node ranks "$module" --config "$config"
}

# Whether the Python of this job runs where srun puts it, in a container (SRUN_OPTIONS), and not in this shell.
in_container() { [ ${#SRUN_OPTIONS[@]} -gt 0 ]; }

# exec_here WORDS...: Python with WORDS, in this shell's place, so that a signal reaches it; with SRUN_OPTIONS a step of this node.
# For a subshell or the background.
exec_here() {
    in_container || exec "${PYTHON[@]}" "$@"
    exec srun "${SRUN_OPTIONS[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${PYTHON[@]}" "$@"
}
here() { (exec_here "$@"); }

# pack_from_here WORDS...: packing, which submits jobs of its own where it can.
pack_from_here() {
    if in_container; then exec_here -m data_prep.pack "$@"; fi
    outside_this_job "${PYTHON[@]}" -m data_prep.pack "$@"
}

# on_every_node FOLDER MODULE ARGUMENTS...: torchrun (launch/cluster/node_agent.py) on every node of the job. For a subshell or the
# background, where srun takes the shell's place: a signal sent there must reach srun, which hands it to the agents.
on_every_node() {
    local folder=$1
    shift
    mkdir -p "$LOGS/$folder"
    exec srun "${SRUN_OPTIONS[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=120 \
        "${PYTHON[@]}" -m launch.cluster.node_agent --nnodes="$NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$FIRST_NODE:$((20000 + (SLURM_JOB_ID + 97 * START) % 12000))" \
        --rdzv-id="$SLURM_JOB_ID.$START.$folder" --log-dir="$LOGS/$folder" -m "$@"
}

# attempt PRODUCT COMMAND...: run it, note in PRODUCT how it ended, and do what follows; returns when all of it is done.
attempt() {
    local code
    PRODUCT=$1
    shift
    here -m launch.cluster.attempts begin "$PRODUCT"
    stop_in_time
    trap asked_to_stop USR1
    trap terminated TERM
    trap out_of_time ALRM
    "$@" &
    RUNNING=$!
    while true; do # a trap interrupts wait
        INTERRUPTED=
        code=0
        wait "$RUNNING" || code=$?
        [ -n "$INTERRUPTED" ] || break
    done
    conclude "$code"
}

# Where stopping was seen to take longer than Slurm's signal leaves, this script is told earlier, by itself.
stop_in_time() {
    local lead left
    [ "$ON_STOP" = save ] || return 0
    lead=$(here -m launch.cluster.attempts lead "$PRODUCT")
    say_what_sigterm_leaves "$lead"
    left=$(($(end_of_job) - $(date +%s)))
    if [ "$lead" -le "$SIGNAL_LEAD" ] || [ "$left" -le $((2 * lead)) ]; then return 0; fi
    say "a stop may take $lead s, as measured: it is asked for that long before the time limit"
    (sleep $((left - lead)) && kill -USR1 $$) &
    EARLY=$!
}

# say_what_sigterm_leaves LEAD: after SIGTERM (preempted, cancelled) Slurm kills in KillWait; LEAD is what a stop may take.
say_what_sigterm_leaves() {
    local wait
    wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
    if [ "${wait:-0}" -ge "$1" ]; then return 0; fi
    say "note: Slurm kills a job ${wait:-?} s after SIGTERM (KillWait), and a stop may take $1 s here: after a preemption or scancel" \
        "the steps since the last checkpoint are trained again (training.checkpoint_steps); what saves them: a GraceTime for" \
        "preemption, or scancel --batch --signal=USR1 $SLURM_JOB_ID"
}

# conclude CODE: what comes after the ranks.
conclude() {
    local verdict
    trap '' USR1
    [ -z "${TIMER:-}" ] || kill "$TIMER" 2>/dev/null || true
    [ -z "${EARLY:-}" ] || kill "$EARLY" 2>/dev/null || true
    [ -z "${TERMINATED:-}" ] || finish 143 # Slurm itself decides what comes next
    verdict=$(here -m launch.cluster.attempts end "$PRODUCT" --code "$1" --logs "$LOGS/ranks" \
        --nodes "$(node_names)" ${STOPPED:+--stopped})
    case $verdict in
        done) ;;
        requeue*) requeue "${verdict#requeue}" ;;
        *) finish 1 ;;
    esac
}

# SIGUSR1 (#SBATCH --signal): the time limit is near. Ranks that can save are told; other stages are simply ended.
asked_to_stop() {
    local end
    INTERRUPTED=1
    [ -z "${STOPPED:-}" ] || return 0
    STOPPED=1
    say "asked to stop"
    end=$(end_of_job)
    if [ "$end" -gt 0 ]; then # Slurm ends the job then; a quarter of a minute earlier this script still can requeue it
        (sleep $((end - $(date +%s) > 20 ? end - $(date +%s) - 15 : 5)) && kill -ALRM $$) &
        TIMER=$!
    fi
    if [ "$ON_STOP" = save ]; then kill -USR1 "$RUNNING"; else kill -TERM "$RUNNING"; fi
}

# The same before there are ranks: begin again, but not for ever.
stopped_before_the_ranks() {
    touch "$LOGS/stopped-early"
    ! third_in_a_row stopped-early || fail "three times in a row the time limit came before the ranks had begun: give more --time"
    say "asked to stop before the ranks had begun"
    requeue ""
}

# SIGTERM: preempted, cancelled, requeued by hand, or a node is down. Slurm ends the ranks, and starts the job again or not.
terminated() {
    INTERRUPTED=1
    [ -z "${TERMINATED:-}" ] || return 0
    TERMINATED=1
    say "terminated by Slurm"
    # Slurm may start no further step of a job that it ends: the attempt then stays as begun.
    here -m launch.cluster.attempts terminated "$PRODUCT" || say "how it ended could not be noted"
}

# SIGALRM, from asked_to_stop: the ranks did not end in time.
out_of_time() {
    conclude 1
}

# requeue [NODES]: start this job again, as it was submitted, without NODES.
requeue() {
    local exclude=${1// /}
    trap '' TERM # requeueing a job terminates it
    scontrol requeue "$SLURM_JOB_ID" || fail "cannot requeue: submit the same command again, it goes on from there"
    [ -z "$exclude" ] || scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$exclude" || say "could not exclude $exclude"
    note "starts again${exclude:+ without $exclude}"
    trap - EXIT
    exit 75 # REQUEUE_EXIT_CODE of longrope2/command.py, which also owns 2
}

# --- small things

# last_wins WORD...: WORDS are the words, of several with the same key only the last; the key=value ones come as they were given.
last_wins() {
    local -a given=("$@")
    local i j
    WORDS=()
    for ((i = 0; i < $#; i++)); do
        # No array with the keys as subscripts: bash expands those a second time.
        for ((j = i + 1; j < $#; j++)); do
            [ "${given[j]%%=*}" != "${given[i]%%=*}" ] || continue 2
        done
        WORDS+=("${given[i]}")
    done
}

# The run folder that WORDS name; without run.name= it is called like the experiment.
run_folder() {
    local word root=runs name='' experiment=
    for word in "${WORDS[@]}"; do
        case $word in
            run.root=*) root=${word#*=} ;;
            run.name=*) name=${word#*=} ;;
            experiment=*) experiment=${word##*/} experiment=${experiment#experiment=} ;;
        esac
    done
    experiment=${experiment%.yaml}
    echo "$root/${name:-$experiment}"
}

# outside_this_job COMMAND...: without this job's own variables, which would be taken for those of the jobs it submits.
outside_this_job() {
    local name
    for name in $(compgen -v SLURM_); do [ "$name" = SLURM_CONF ] || unset "$name"; done
    exec "$@"
}

# third_in_a_row FILE: whether this start and the two before it have left FILE among their logs.
third_in_a_row() {
    local start
    for start in "$START" $((START - 1)) $((START - 2)); do [ -e "${LOGS%-*}-$start/$1" ] || return 1; done
}

# When Slurm ends this job, in seconds since 1970; 0 if it never does.
end_of_job() { date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null || echo 0; }

node_names() { scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,; }

# Slurm's own name of the file that everything here is written to.
log_file() { scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p' | head -n 1; }

begin() {
    trap note_failure EXIT
    trap stopped_before_the_ranks USR1
    say "$SLURM_JOB_NAME: job $SLURM_JOB_ID, start $START, on $SLURM_JOB_NODELIST: $1"
    say "files of ranks and nodes: $LOGS"
    note "started on $SLURM_JOB_NODELIST"
}

# finish [CODE]: end the job.
finish() {
    local code=${1:-0}
    trap - EXIT
    case $code in
        0) note "done" ;;
        143) note "terminated by Slurm" ;;
        *) note_failure ;;
    esac
    exit "$code"
}

# note TEXT: a line in the pipeline's log, where the job is part of one (slurm/pipeline.sh).
note() {
    [ -n "${PIPELINE_LOG:-}" ] || return 0
    printf '%s  %s (job %s): %s\n' "$(date '+%F %T')" "$SLURM_JOB_NAME" "$SLURM_JOB_ID" "$1" >>"$PIPELINE_LOG"
}
note_failure() { note "failed; read $(log_file), mend it, and give the pipeline's command again: it goes on from here"; }
