# shellcheck shell=bash
# What the templates in this folder share; a template sources it and calls `train`, or `work` for one process.
# docs/slurm.md explains it. Settings are read from the environment, or from slurm/site.sh:
#
#   DLM_PYTHON        the interpreter                                        .venv/bin/python, else python3
#   DLM_LAUNCHER      srun (a task a rank), torchrun or deepspeed (a task a node)                       srun
#   DLM_ATTEMPTS      so many attempts in a row without a new checkpoint end the job                       3
#   DLM_PREFLIGHT     0: no check of the nodes before training                                             1
#   DLM_PREFLIGHT_SECONDS  its time limit                                                                600
#   DLM_PREFLIGHT_SLOW  a node that all-reduces at less than this part of the median rate is bad          0.5
#   DLM_SNAPSHOT      0: run the code of the repository, not a copy of it                                  1
#   DLM_SRUN_OPTIONS  more options of srun: --cpu-bind=cores, --gpu-bind=none, a container's ...
set -uo pipefail

restart=${SLURM_RESTART_COUNT:-0}
chain=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}
self=$chain${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}  # one task of an array has the array's number for its own
asked='' terminated='' exclude='' step_pid='' run='' logs='' action='' message=''

say() { echo "$(date +%H:%M:%S) job ${SLURM_JOB_ID}.$restart: $*"; }
refuse() { say "error: $*" >&2; exit 2; }

enter_repository() {
    [ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is a job script: sbatch $0 (from the repository)" >&2; exit 2; }
    cd "${root:?is set by the template}" || exit 2
    local site=${DLM_SITE:-$root/slurm/site.sh}
    # shellcheck disable=SC1090
    if [ -e "$site" ]; then source "$site" || refuse "$site failed"; fi
    python=${DLM_PYTHON:-$root/.venv/bin/python}
    [ -n "${DLM_PYTHON:-}" ] || [ -x "$python" ] || python=python3
    command -v "$python" >/dev/null || refuse "no interpreter $python: make setup, or set DLM_PYTHON"
    attempts=${DLM_ATTEMPTS:-3}
    code=$root
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

# --- what Slurm gave this job -------------------------------------------------------------------------------------

read_allocation() {
    num_nodes=$SLURM_JOB_NUM_NODES
    ranks_a_node=${SLURM_NTASKS_PER_NODE:-${SLURM_TASKS_PER_NODE%%(*}}
    case $ranks_a_node in *[!0-9]*) refuse "the nodes have different numbers of tasks ($SLURM_TASKS_PER_NODE)" ;; esac
    num_ranks=$((num_nodes * ranks_a_node))
    cpus_a_rank=${SLURM_CPUS_PER_TASK:-1}
    gpus_a_node=${SLURM_GPUS_ON_NODE:-0}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Below the ports that systems give to clients, and another one at each restart: the last may still be held.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + restart) % 12000))
    export MASTER_ADDR MASTER_PORT
}

set_environment() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_a_rank}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # its warnings name the interface or the peer that failed
    # The last collectives of each rank, written when one runs into its time limit: which rank did not come, and where.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
    export TORCH_FR_DUMP_TEMP_FILE=$logs/collectives_rank_
    # Compiled kernels belong on the node's own disk: thousands of small files, written by all ranks at once.
    local scratch=${TMPDIR:-/tmp}/dlm_${SLURM_JOB_ID}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
}

# --- signals and steps ----------------------------------------------------------------------------------------------

ask_to_stop() {  # the ranks of a run look for a file after each step, and agree: no process of theirs is signalled
    if [ -n "$run" ]; then
        : >"$run/control/stop.$SLURM_JOB_ID"
    elif [ -n "$step_pid" ]; then
        kill -TERM "$step_pid"
    fi
}
on_usr1() { asked=1; say "asked to stop before the limit, or for a job that comes first: then requeue"; ask_to_stop; }
on_term() { terminated=1; say "Slurm ends this job (preempted, cancelled or requeued)"; ask_to_stop; }

step() {  # step COMMAND...: runs it, listening to signals meanwhile; returns its exit code
    local result
    "$@" &
    step_pid=$!
    while :; do
        wait "$step_pid"
        result=$?
        kill -0 "$step_pid" 2>/dev/null || break  # else: a signal came, the step goes on
    done
    step_pid=''
    return "$result"
}

tasks() {  # tasks A_NODE CPUS COMMAND...: srun on all nodes; a log a task where there is a folder for them
    local each=$1 cpus=$2
    shift 2
    # shellcheck disable=SC2086  # several options
    exec srun --nodes="$num_nodes" --ntasks=$((num_nodes * each)) --ntasks-per-node="$each" --cpus-per-task="$cpus" \
        --distribution=block --kill-on-bad-exit=1 --wait=60 --unbuffered --open-mode=append \
        ${logs:+"--output=$logs/%t.log"} ${DLM_SRUN_OPTIONS:-} "$@"
}

launch() {  # launch MODULE ARGUMENTS...: on every rank, by the launcher of choice
    local all=$((ranks_a_node * cpus_a_rank)) host hostfile=${logs:-$PWD}/slurm-hostfile-$SLURM_JOB_ID.log
    case ${DLM_LAUNCHER:-srun} in
        srun) step tasks "$ranks_a_node" "$cpus_a_rank" "$python" "$code/slurm/_run.py" "$@" ;;
        torchrun)  # static rendezvous: c10d would deal the ranks in another order than Slurm its nodes
            # shellcheck disable=SC2016  # the inner shell expands them
            step tasks 1 "$all" bash -c 'exec "$0" -m torch.distributed.run --node_rank "$SLURM_NODEID" "$@"' \
                "$python" --nnodes "$num_nodes" --nproc_per_node "$ranks_a_node" \
                --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$code/slurm/_run.py" "$@" ;;
        deepspeed)
            for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
                echo "$host slots=$ranks_a_node"
            done >"$hostfile"
            # shellcheck disable=SC2016
            step tasks 1 "$all" bash -c 'exec "$0" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "$@"' \
                "$python" --hostfile "$hostfile" --no_ssh --no_local_rank \
                --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$code/slurm/_run.py" "$@" ;;
        *) refuse "DLM_LAUNCHER=$DLM_LAUNCHER: srun, torchrun or deepspeed" ;;
    esac
}

# --- before training ------------------------------------------------------------------------------------------------

snapshot() {  # all attempts of a job run the code that stood here when its first one began
    [ "${DLM_SNAPSHOT:-1}" != 0 ] || return 0
    code=$run/slurm/code.$chain
    if [ ! -d "$code" ]; then
        local new=$code.$$
        { mkdir "$new" && cp -R dlm_scale kernels slurm "$new"; } || refuse "cannot copy the code to $new"
        git rev-parse HEAD >"$new/git_commit" 2>/dev/null
        mv -T "$new" "$code" || refuse "cannot copy the code to $code"
    fi
    export PYTHONPATH=$code:$PYTHONPATH  # for what the ranks start themselves
}

describe_attempt() {
    { scontrol show job "$self"; env | grep -E '^(SLURM|DLM|NCCL|TORCH|CUDA|MASTER|OMP|GLOO|TRITON)_' | sort; } \
        >"$logs/job.txt" 2>&1
}

preflight() {  # returns once all nodes are good; else excludes the bad ones, and begins anew elsewhere
    [ "${DLM_PREFLIGHT:-1}" != 0 ] || return 0
    local folder=$logs/preflight bad
    mkdir -p "$folder"
    echo "$SLURM_JOB_ID.$restart" >"$folder/token"
    step preflight_step "$folder"
    bad=$("$python" "$code/slurm/_run.py" dlm_scale.preflight judge "$folder" "$num_ranks" \
        "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)") || refuse "preflight: see $folder"
    if [ -n "$bad" ] && [ -z "$asked$terminated" ]; then
        exclude="${bad//$'\n'/,}"
        say "preflight: excluding $exclude"
        return 1
    fi
}
preflight_step() {
    exec timeout "${DLM_PREFLIGHT_SECONDS:-600}" srun --nodes="$num_nodes" --ntasks="$num_ranks" --distribution=block \
        --ntasks-per-node="$ranks_a_node" --cpus-per-task="$cpus_a_rank" --wait=60 --output="$1/%t.log" \
        "$python" "$code/slurm/_run.py" dlm_scale.preflight probe "$1" "$device" "$gpus_a_node"
}

# --- after an attempt -----------------------------------------------------------------------------------------------

wait_for_ranks() {  # srun may be ended by the signal at which they still save
    while squeue --noheader --steps --jobs="$self" --format=%i 2>/dev/null | grep -qE '\.[0-9]+$'; do step sleep 1; done
}

all_nodes_answer() {
    env -u SLURM_GPUS_PER_NODE -u SLURM_NTASKS_PER_NODE -u SLURM_CPUS_PER_TASK \
        timeout 30 srun --overlap --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --gres=none --mem=0 \
        true >/dev/null 2>&1
}

wait_for_slurm_to_see_dead_nodes() {
    # A job that requeues itself while one of its nodes is dead, but not yet known to be, may come back without its GPUs
    # (seen with Slurm 22.05). Slurm requeues it by itself, and cleanly, as soon as it knows.
    local limit
    limit=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
    for _ in $(seq $(((${limit:-300} + 60) / 10))); do
        all_nodes_answer && return
        say "a node does not answer: waiting for Slurm to see it, and to requeue this job"
        [ -z "$terminated" ] || return
        step sleep 10
    done
}

requeue() {
    # The list of excluded nodes can only be changed while the job is queued again, and Slurm has not ended this script.
    [ -z "$exclude" ] || trap 'terminated=1; scontrol update JobId="$self" ExcNodeList="$exclude"' TERM
    scontrol requeue "$self" || [ -n "$terminated" ] || {  # it may be ended itself before it can say: done
        say "error: this cluster does not let the job requeue itself; submit the same command again: $message" >&2
        exit 1
    }
    sleep 600 &
    wait
    exit 0
}

begin_again() {  # a chain goes on in its next link, under a new job number; its last link, and any other job, in itself
    local link=${SLURM_ARRAY_TASK_ID:-} next
    if [ -z "$link" ] || [ "$link" = "${SLURM_ARRAY_TASK_MAX:-$link}" ]; then
        [ "$action" = stopped ] || wait_for_slurm_to_see_dead_nodes
        say "requeue: $message"
        requeue
    fi
    for next in $([ -z "$exclude" ] || seq $((link + 1)) "$SLURM_ARRAY_TASK_MAX"); do
        scontrol update JobId="${chain}_$next" ExcNodeList="$exclude" && break  # the rest of the chain is one record
    done
    say "link $link of $SLURM_ARRAY_TASK_MAX ends, the next goes on: $message"
    exit 0  # a job with --dependency=afterok on the chain must not miss it
}

last_words() {  # of the ranks that said why they ended
    local file
    for file in $(grep -lE 'Error|FAILED|error:' "$logs"/*.log 2>/dev/null | head -n 3); do
        echo "--- $file" >&2
        tail -n 4 "$file" >&2
    done
}

conclude() {  # conclude EXIT_CODE: says how the attempt ended, and what follows
    local said
    rm -f "$run/control/stop.$SLURM_JOB_ID"
    said=$("$python" -m dlm_scale.slurm end "$run" --exit_code "$1" --asked "${asked:-0}" --terminated \
        "${terminated:-0}" --attempts "$attempts" ${exclude:+--excluded "$exclude"}) || {
        [ -z "$terminated" ] || exit 0  # what ends this job has ended that, too
        say "error: no verdict" >&2
        exit 1
    }
    action=${said%% *} message=${said#* }
    case $action in
        finished | halted | left) say "$message"; exit 0 ;;
        stopped) begin_again ;;
        crashed | excluded) last_words; begin_again ;;
        refused) last_words; say "error: $message" >&2; exit 2 ;;
        *) last_words; say "error: $message" >&2; exit 1 ;;
    esac
}

# --- the calls of the templates -------------------------------------------------------------------------------------

train() {  # train CONFIG OVERRIDES...
    enter_repository
    read_allocation
    trap on_usr1 USR1
    trap on_term TERM
    local said
    said=$("$python" -m dlm_scale.slurm begin --ranks "$num_ranks" --ranks_per_node "$ranks_a_node" \
        --attempts "$attempts" "$@")
    local rc=$?
    [ $rc = 0 ] || exit $rc  # it has said why; a wrong config is not tried again
    { read -r action device run && read -r message; } <<<"$said"
    case $action in go) ;; done) say "$message"; exit 0 ;; *) say "error: $message" >&2; exit 1 ;; esac
    if [ "$device" != cpu ] && [ "$gpus_a_node" != "$ranks_a_node" ]; then
        refuse "$gpus_a_node GPUs but $ranks_a_node tasks a node: --gpus-per-node=N --ntasks-per-node=N," \
            "or train.device=cpu"
    fi
    logs=$run/slurm/logs/$SLURM_JOB_ID.$restart
    mkdir -p "$logs" || refuse "cannot write to $run"
    export DLM_REFUSAL_FILE=$logs/refusal
    rm -f "$run/control/stop.$SLURM_JOB_ID" "$DLM_REFUSAL_FILE"
    snapshot
    set_environment
    describe_attempt
    say "$message; nodes $SLURM_JOB_NODELIST, $num_ranks ranks by ${DLM_LAUNCHER:-srun}; logs in $logs"
    preflight || conclude 1
    if [ -z "$asked$terminated" ]; then launch dlm_scale.train "$@"; fi
    local result=$?
    [ -z "$terminated" ] || wait_for_ranks
    conclude "$result"
}

work() {  # work PROGRAM ARGUMENTS...: one process that may be begun again at any time, and then goes on
    trap on_usr1 USR1
    trap on_term TERM
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    step "$python" -u "$@"
    local rc=$?
    if [ $rc = 0 ] || [ $rc = 2 ] || [ -n "$terminated" ]; then exit $rc; fi
    if [ -z "$asked" ] && [ "$restart" -ge "$attempts" ]; then
        say "error: exit code $rc; giving up after $restart requeues (DLM_ATTEMPTS=$attempts)" >&2
        exit $rc
    fi
    message="exit code $rc"
    say "requeue: $message"
    requeue
}
