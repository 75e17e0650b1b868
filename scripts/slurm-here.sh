#!/usr/bin/env bash
# slurm-here.sh - run a command with a Slurm cluster of its own, on this machine: real daemons,
# several nodes.
#
#   slurm-here.sh [options] -- COMMAND [ARGUMENTS...]
#   slurm-here.sh -n 2 -- srun -N 2 -n 4 hostname          an example
#   slurm-here.sh --check        exit 0 if it could run here; else 126 and the reason
#
# Everything (configuration, munge key, sockets, spool, logs) lies in a temporary folder; no running
# Slurm, no file in /etc and no service is touched, and at the end, also after Ctrl-C, no process
# and no file is left. The daemons are up after about a second. Works as root and as an ordinary
# user.
#
#   -n NODES     nodes (default 2). Each is a slurmd. Their names are box-1, box-2, ... with
#                --netns, else 127.0.0.1, 127.0.0.2, ...: names that every rank can resolve without
#                a change to /etc/hosts
#   -c CPUS      processors that each node claims to have (default 4); they need not exist
#   -t SECONDS   time for everything (default 300)
#   --netns      each node in a network namespace with host name and address of its own, as hosts
#                are: loopback reaches nobody else, so ranks on two nodes need a token. Needs root
#   -v           the daemons' logs go to stderr at the end, not only when something fails
#
# COMMAND finds srun, sbatch, squeue, scontrol... in PATH and the cluster in SLURM_CONF. Partition
# `main` is the default; a job in partition `urgent` preempts one in `main`, which gets SIGTERM, 30
# seconds, and is queued again. A job that is queued again starts after about six seconds
# (cred_expire; Slurm's own default is 120).
#
# stdout, stderr and the exit code are those of COMMAND. Besides: 124 time is up; 125 the daemons
# did not start (their logs go to stderr); 126 wrong usage or something missing on this machine.
#
# Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin # the daemons, which Debian hides from ordinary users

nodes=2 cpus=4 seconds=300 netns=no verbose=no action=run

die() {
    echo "slurm-here: $*" >&2
    exit 126
}

while [ $# -gt 0 ]; do
    case $1 in
    --) shift; break ;;
    -h | --help) sed -n '2,/^set -/ { /^set -/d; s/^# \{0,1\}//; p; }' "${BASH_SOURCE[0]}"; exit 0 ;;
    --check) action=check; shift; continue ;;
    --netns) netns=yes; shift; continue ;;
    -v) verbose=yes; shift; continue ;;
    -[nct]) [ $# -ge 2 ] || die "option $1 needs a value" ;;
    *) die "unknown option $1 (COMMAND comes after --; see --help)" ;;
    esac
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 takes a whole number from 1 on, not $2"
    case $1 in
    -n) nodes=$2 ;;
    -c) cpus=$2 ;;
    -t) seconds=$2 ;;
    esac
    shift 2
done
[ "$nodes" -le 64 ] || die "-n is at most 64"

for tool in slurmctld slurmd srun sinfo munged munge; do
    command -v "$tool" >/dev/null ||
        die "no $tool here (Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge)"
done
# shellcheck source=scripts/boxes.bash
. "$here/boxes.bash"
if [ "$netns" = yes ]; then
    missing=$(boxes_missing)
    [ -z "$missing" ] || die "--netns needs $missing"
fi
[ "$action" = run ] || exit 0
[ $# -gt 0 ] || die "no COMMAND (it comes after --; see --help)"

# Not below TMPDIR: a socket's path has at most 108 bytes.
folder=$(mktemp -d /tmp/slurm-here.XXXXXX)
user=$(id -un)
daemons=()
command_pid=

started() {
    daemons+=("$1")
    disown "$1" # else the shell would tell how it ended
}

logs() {
    for file in "$folder"/log/*; do
        [ -s "$file" ] || continue
        echo "--- ${file##*/}" >&2
        tail -n 40 "$file" >&2
    done
}

stop() {
    local code=$? pid try
    trap '' INT TERM HUP
    [ "$verbose" = no ] || logs
    if [ -n "$command_pid" ] && kill -0 "$command_pid" 2>/dev/null; then
        kill -TERM -- "-$command_pid" 2>/dev/null || true
    fi
    # Jobs first: their processes belong to slurmstepd, which outlives slurmd.
    if [ "${#daemons[@]}" -gt 1 ] && [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ]; then
        timeout 5 scancel --user="$user" 2>/dev/null || true
        for ((try = 0; try < 50; try++)); do
            [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    kill ${daemons[@]+"${daemons[@]}"} 2>/dev/null || true
    for ((try = 0; try < 20; try++)); do
        kill -0 ${daemons[@]+"${daemons[@]}"} 2>/dev/null || break
        sleep 0.02
    done
    # slurmctld takes seconds to save what is deleted here anyway.
    kill -KILL ${daemons[@]+"${daemons[@]}"} 2>/dev/null || true
    # Tasks that did not obey, and helpers of the daemons, by the folder that stands in their
    # environment.
    for pid in $(grep -lsaF "$folder/slurm.conf" /proc/[0-9]*/environ 2>/dev/null | grep -o '[0-9]*'); do
        case $pid in "$$" | "$BASHPID") ;; *) kill -KILL "$pid" 2>/dev/null || true ;; esac
    done
    [ "$netns" = no ] || boxes_down "$folder"
    rm -rf "$folder"
    exit "$code"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

fail() {
    echo "slurm-here: $*" >&2
    logs
    exit 125
}

mkdir -p "$folder"/log "$folder"/state "$folder"/munge
chmod 700 "$folder"/munge
chmod 755 "$folder"
if [ "$netns" = yes ]; then
    boxes_up "$folder" "$nodes"
    hub=$(<"$folder/net").254
else
    hub=127.0.0.1
fi

# Ports below those that Linux gives to outgoing connections, ten for each process; taken ones are passed over.
port=$((20000 + $$ % 1000 * 10))
free_port() {
    while port=$((port + 1)); do
        (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || break
    done
}

# munge: Slurm's daemons believe a message because a key in this folder signed it.
(umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
# munged wants no folder on the way to its socket that others may write, but for sticky ones such as
# /tmp.
munged --foreground --force --num-threads=2 --key-file="$folder/munge/key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/log/munged" --seed-file="$folder/munge/seed" \
    </dev/null >/dev/null 2>>"$folder/log/munged.stderr" &
started $!

free_port
controller_port=$port
# Slurm refuses a host name with a dot after its first, which the real name of this machine may
# have.
{
    cat <<END
ClusterName=here
SlurmctldHost=$(hostname -s 2>/dev/null || hostname)($hub)
SlurmctldPort=$controller_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
END
    names=()
    for ((node = 1; node <= nodes; node++)); do
        free_port
        if [ "$netns" = yes ]; then
            name=box-$node address=$(<"$folder/net").$node
        else
            name=127.0.0.$node address=127.0.0.1
        fi
        names+=("$name")
        echo "NodeName=$name NodeHostname=$name NodeAddr=$address Port=$port CPUs=$cpus RealMemory=1000 State=UNKNOWN"
    done
    all=$(IFS=,; echo "${names[*]}")
    echo "PartitionName=main Nodes=$all Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE"
    echo "PartitionName=urgent Nodes=$all PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE"
} >"$folder/slurm.conf"
# Not used: processes are tracked by their parents.
echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"
export SLURM_CONF=$folder/slurm.conf
# What a Slurm around this one has set is not meant for this one.
for variable in $(compgen -e SLURM_); do
    [ "$variable" = SLURM_CONF ] || unset "$variable"
done

for ((try = 0; try < 300; try++)); do
    [ ! -S "$folder/munge.socket" ] || break
    sleep 0.01
done
[ -S "$folder/munge.socket" ] || fail "munged does not start"
slurmctld -D -f "$SLURM_CONF" </dev/null >/dev/null 2>>"$folder/log/slurmctld.stderr" &
started $!
for ((node = 1; node <= nodes; node++)); do
    if [ "$netns" = yes ]; then
        (exec nsenter --target "$(<"$folder/box-$node.pid")" --net --uts --mount -- \
            slurmd -D -N "box-$node" -f "$SLURM_CONF" </dev/null >/dev/null 2>>"$folder/log/slurmd-box-$node.stderr") &
    else
        slurmd -D -N "127.0.0.$node" -f "$SLURM_CONF" </dev/null >/dev/null 2>>"$folder/log/slurmd-$node.stderr" &
    fi
    started $!
done
for ((try = 0; try < 300; try++)); do
    [ "$(sinfo --noheader --Node --partition=main --format=%T 2>/dev/null | grep -cx idle || true)" != "$nodes" ] || break
    kill -0 "${daemons[@]}" 2>/dev/null || fail "a daemon ended at once"
    sleep 0.1
done
[ "$try" -lt 300 ] || fail "not all nodes are there: $(sinfo --noheader --Node --format='%N %T' 2>&1 | tr '\n' ' ')"
[ "$verbose" = no ] || echo "slurm-here: $nodes nodes after ${SECONDS}s" >&2

# In a process group of its own, so that it can be stopped with all that it started.
set -m
timeout --kill-after=10 "$seconds" "$@" &
command_pid=$!
set +m
code=0
wait "$command_pid" || code=$?
command_pid=
exit "$code"
