#!/usr/bin/env bash
# A real Slurm with two nodes on this one machine, to try run_with_submitit.py before the cluster does:
#
#     bash scripts/dev/local_slurm.sh start      # prints how to point sbatch, squeue and run_with_submitit.py to it
#     bash scripts/dev/local_slurm.sh status
#     bash scripts/dev/local_slurm.sh fail n2    # the node dies with all that runs on it; its jobs are requeued
#     bash scripts/dev/local_slurm.sh repair n2
#     bash scripts/dev/local_slurm.sh stop
#
# Nodes n1 and n2 are two slurmd on the loopback address. Partition `main` is preempted and requeued by partition `high`.
# Runs as root or as yourself, with keys, ports and state of its own in LOCAL_SLURM_DIR (default /tmp/local_slurm-USER):
# a Slurm that is already on this machine is left alone. Needs the packages slurm-wlm and munge; installs nothing.
set -euo pipefail

dir=${LOCAL_SLURM_DIR:-/tmp/local_slurm-$(id -un)}
port=${LOCAL_SLURM_PORT:-16817} # slurmctld; the nodes take the next two
cpus=${LOCAL_SLURM_CPUS:-2}     # of each node; more than the machine has is allowed
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf

need() {
    local missing=()
    for tool in munged mungekey slurmctld slurmd sbatch; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    [ ${#missing[@]} -eq 0 ] && return
    echo "error: ${missing[*]} not found. Install Slurm and munge, on Debian and Ubuntu:" >&2
    echo "    apt-get update && apt-get install -y slurm-wlm munge" >&2
    exit 2
}

# alive NAME: the daemon whose id NAME.pid holds is running (and the id was not given to another program since)
alive() { [ -s "$dir/$1.pid" ] && [ "$(cat "/proc/$(cat "$dir/$1.pid")/comm" 2>/dev/null)" = "${1%%-*}" ]; }

configure() {
    local host user version
    host=$(hostname -s) user=$(id -un)
    mkdir -p "$dir"/{state,spool-n1,spool-n2}
    chmod 700 "$dir"
    [ -s "$dir/munge.key" ] || mungekey --create --keyfile="$dir/munge.key"
    cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits as long as its credential lives, two minutes by default
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cpus RealMemory=8000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 State=UP
END
    # from 23.11 on, slurmd looks for cgroups unless configured not to
    version=$(slurmctld -V | grep -o '[0-9]*\.[0-9]*' | head -n 1)
    rm -f "$dir/cgroup.conf"
    if [ "$(printf '%s\n' 23.11 "$version" | sort -V | head -n 1)" = 23.11 ]; then
        echo CgroupPlugin=disabled >"$dir/cgroup.conf"
    fi
}

start() {
    need
    if alive slurmctld; then
        echo "already running, in $dir"
        usage_hint
        return
    fi
    configure
    munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --force 2>>"$dir/munged.err" ||
        { cat "$dir/munged.err" >&2; exit 1; }
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -p main -o %T 2>/dev/null | grep -c idle)" = 2 ]; then
            usage_hint
            return
        fi
        sleep 0.5
    done
    echo "error: the nodes are not idle after 30 s; the newest lines of $dir/*.log:" >&2
    tail -n 5 "$dir"/*.log >&2
    stop
    exit 1
}

usage_hint() {
    sinfo -N
    echo "In every shell that is to use it:"
    echo "    export SLURM_CONF=$SLURM_CONF"
}

status() {
    if ! alive slurmctld; then
        echo "not running (bash scripts/dev/local_slurm.sh start)"
        return 3
    fi
    usage_hint
    squeue
}

# fail NODE: its slurmd and all processes that slurmd started end at once, as when a machine loses its power
fail() {
    local pid parent tasks=() steps=()
    [ -s "$dir/slurmd-${1:-}.pid" ] || { echo "error: no such node, or it has failed: ${1:-}" >&2; exit 2; }
    for environ in /proc/[0-9]*/environ; do
        grep -qzx "SLURMD_NODENAME=$1" "$environ" 2>/dev/null || continue
        grep -qzx "SLURM_CONF=$SLURM_CONF" "$environ" 2>/dev/null || continue
        pid=${environ#/proc/} pid=${pid%/environ}
        tasks+=("$pid")
        parent=$(awk '{ print $4 }' "/proc/$pid/stat" 2>/dev/null || true)
        [ "$(cat "/proc/${parent:-0}/comm" 2>/dev/null)" != slurmstepd ] || steps+=("$parent")
    done
    # slurmd and slurmstepd first: they would report the end of their tasks
    kill -9 "$(cat "$dir/slurmd-$1.pid")" "${steps[@]}" "${tasks[@]}" 2>/dev/null || true
    rm -f "$dir/slurmd-$1.pid"
    scontrol update NodeName="$1" State=DOWN Reason=failed # at once, instead of after SlurmdTimeout
}

repair() {
    [ -d "$dir/spool-${1:-}" ] && [ -n "${1:-}" ] || { echo "error: no such node: ${1:-}" >&2; exit 2; }
    alive "slurmd-$1" || slurmd -N "$1"
    scontrol update NodeName="$1" State=RESUME 2>/dev/null || true # refused where it is back already
    for _ in $(seq 60); do
        sinfo -h -n "$1" -o %T | grep -q down || return 0
        sleep 0.5
    done
    echo "error: $1 is still down after 30 s; see $dir/slurmd-$1.log" >&2
    exit 1
}

stop() {
    # the jobs first: a slurmd that ends leaves them running
    if alive slurmctld; then
        squeue -h -o %A | xargs -r scancel 2>/dev/null || true
        for _ in $(seq 80); do
            [ -z "$(squeue -h -t all -o '%T' 2>/dev/null | grep -E 'RUNNING|COMPLETING')" ] && break
            sleep 0.5
        done
    fi
    for name in slurmctld slurmd-n1 slurmd-n2 munged; do
        alive "$name" || continue
        kill "$(cat "$dir/$name.pid")"
        for _ in $(seq 40); do
            alive "$name" || break
            sleep 0.25
        done
    done
    rm -rf "$dir"/{state,spool-n1,spool-n2} "$dir"/*.pid
    echo "stopped; the logs are in $dir"
}

case ${1:-} in
    start) start ;;
    fail) fail "${2:-}" ;;
    repair) repair "${2:-}" ;;
    stop) stop ;;
    status) status ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
esac
