#!/usr/bin/env bash
# A real Slurm cluster on this machine's loopback, for the tests. Needs root: each node is a slurmd that is process 1 of
# its own UTS, mount and PID namespace, with its own host name and port; killing that process is a power failure.
#
#   cluster.sh install              Slurm and shellcheck by apt-get, where they are missing
#   cluster.sh up [NODES] [GPUS]    start what does not run yet: nodes n1, n2, ... with so many pretended GPUs each
#   cluster.sh kill-node NODE       power off
#   cluster.sh start-node NODE      power on
#   cluster.sh down                 stop what was started here, by recorded pid alone, and remove the folder
#
# DLM_TEST_CLUSTER is its folder, DLM_TEST_CLUSTER_PORT the first of NODES + 1 ports. SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail

dir=${DLM_TEST_CLUSTER:-/tmp/dlm_test_cluster}
port=${DLM_TEST_CLUSTER_PORT:-27800}
export SLURM_CONF=$dir/slurm.conf

fail() { echo "cluster.sh: $*" >&2; exit 2; }

install() {
    local missing=() pair
    for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge shellcheck:shellcheck; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || fail "${missing[*]} missing: install them as root (apt-get install ${missing[*]})"
    command -v apt-get >/dev/null || fail "${missing[*]} missing, and this system has no apt-get: install them by hand"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm-basic-plugins "${missing[@]}"
}

# A pid file holds "pid start-time", so that a number which another process got later is never signalled.
started() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -ra stat <<<"${stat##*) }"
    [ "${stat[0]}" != Z ] && echo "${stat[19]}"
}
alive() { local pid since; { read -r pid since <"$1"; } 2>/dev/null && [ "$(started "$pid")" = "$since" ]; }
launch() {  # launch NAME COMMAND...: in the background, in a session of its own
    local name=$1
    shift
    setsid "$@" >>"$dir/log/$name.out" 2>&1 </dev/null &
    echo "$! $(started $!)" >"$dir/$name.pid"
}
stop() {
    local pid
    if alive "$1"; then
        read -r pid _ <"$1"
        kill -KILL "$pid"
        for _ in {1..100}; do alive "$1" || break; sleep 0.05; done
    fi
    rm -f "$1"
}

configure() {
    local nodes=$1 gpus=$2 i
    mkdir -p "$dir"/{state,log,dev,munge}
    chmod 755 "$dir"
    chmod 711 "$dir/munge"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    { grep -vE '\sn[0-9]+$' /etc/hosts || true; for i in $(seq "$nodes"); do echo "127.0.0.1 n$i"; done; } >"$dir/hosts"
    # Clones of /dev/null stand for the GPUs: only character devices make Slurm set CUDA_VISIBLE_DEVICES.
    for i in $(seq 0 $((gpus - 1))); do mknod "$dir/dev/nvidia$i" c 1 3; done
    echo "Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
    echo "CgroupAutomount=no" >"$dir/cgroup.conf"
    cat >"$SLURM_CONF" <<END
ClusterName=dlmtest
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
# Jobs of two clusters on one machine must not share a number: their ports come from it.
FirstJobId=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials that expire soon: a requeued job waits for that, two minutes by default.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmdPidFile=$dir/state/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
SlurmdParameters=config_overrides
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
OverTimeLimit=0
InactiveLimit=0
MinJobAge=1200
SchedulerParameters=sched_min_interval=100000,bf_interval=1,requeue_delay=1
SchedulerTimeSlice=5
GresTypes=gpu
NodeName=DEFAULT CPUs=256 Sockets=2 CoresPerSocket=128 ThreadsPerCore=1 RealMemory=4000000 Gres=gpu:$gpus
$(for i in $(seq "$nodes"); do echo "NodeName=n$i NodeAddr=127.0.0.1 Port=$((port + i))"; done)
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
END
}

start_node() {
    alive "$dir/$1.pid" && return
    mkdir -p "$dir/spool.$1"
    # shellcheck disable=SC2016  # the inner shell expands them
    launch "$1" unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c \
        'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -D -N "$1" -f "$2/slurm.conf"' _ "$1" "$dir"
}

up() {
    local nodes=${1:-16} gpus=${2:-8}
    [ "$(id -u)" = 0 ] || fail "needs root, for the nodes' namespaces"
    [ -e "$SLURM_CONF" ] || configure "$nodes" "$gpus"
    nodes=$(grep -c '^NodeName=n' "$SLURM_CONF")
    if ! alive "$dir/munged.pid"; then
        launch munged munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
            --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/log/munge.log" --num-threads=2
        for _ in {1..200}; do munge -S "$dir/munge/socket" -n >/dev/null 2>&1 && break; sleep 0.05; done
    fi
    alive "$dir/slurmctld.pid" || launch slurmctld slurmctld -D -f "$SLURM_CONF"
    for i in $(seq "$nodes"); do start_node "n$i"; done
    for _ in {1..600}; do
        alive "$dir/slurmctld.pid" || { tail -n 5 "$dir/log/slurmctld.out" >&2; fail "slurmctld died"; }
        [ "$(sinfo -h -N -p gpu -t idle,alloc,mix -o %N 2>/dev/null | wc -l)" = "$nodes" ] && return
        sleep 0.05
    done
    sinfo -N -o '%N %T %E' >&2
    fail "the nodes do not come up"
}

down() {
    local file
    for file in "$dir"/n*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        [ ! -e "$file" ] || stop "$file"
    done
    rm -rf "$dir"
}

case ${1:-} in
    install) install ;;
    up) up "${@:2}" ;;
    kill-node) stop "$dir/$2.pid" ;;
    start-node) start_node "$2" ;;
    down) down ;;
    *) sed -n '2,11p' "$0"; exit 2 ;;
esac
