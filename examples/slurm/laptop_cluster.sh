#!/bin/bash
# A Slurm cluster on one machine, to try the jobs in this directory: real controller and node daemons on the loopback
# interface, with CPUs and GPUs that exist only by name. Needs root on Debian or Ubuntu, in a container or a VM.
#
#   laptop_cluster.sh install               Slurm and munge from the distribution's packages
#   laptop_cluster.sh start DIR [NODES]     4 nodes, or NODES, that claim 64 CPUs and 8 GPUs; everything is kept in DIR
#   laptop_cluster.sh stop DIR              cancel all jobs and stop the daemons
#
# Between start and stop, `export SLURM_CONF=DIR/slurm.conf` makes sbatch, srun, squeue and scontrol speak to it.
# SLURM_PORT (16800) and the 100 ports above it have to be free.

set -eu

fail() {
    echo "error: $*" >&2
    exit 1
}

install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update || true # packages may be at hand without it
    apt-get -qq install -y --no-install-recommends slurm-wlm munge > /dev/null
}

write_settings() {
    local dir=$1 nodes=$2 port=${SLURM_PORT:-16800} last=$(($2 - 1))
    cat > "$dir/slurm.conf" << END
ClusterName=laptop
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its last start's credential has expired.
AuthInfo=socket=$dir/munge.socket,cred_expire=15
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
# No cgroups, which containers seldom own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=5
# A node that was set down stays down until it is resumed.
ReturnToService=1
JobRequeue=1
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[0-$last] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=64 RealMemory=256000 Gres=gpu:8
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    cat > "$dir/gres.conf" << END
AutoDetect=off
NodeName=node[0-$last] Name=gpu File=$dir/fakegpu[0-7]
END
}

# One of its own, whatever else runs on the machine.
start_munge() {
    local dir=$1
    [ -e "$dir/munge.key" ] || mungekey --create --keyfile="$dir/munge.key"
    # By force: DIR may well be below /tmp, which others can write to.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --seed-file="$dir/munge.seed" --log-file="$dir/munged.log" 2> /dev/null
}

start() {
    local dir=$1 nodes=$2 port=${SLURM_PORT:-16800}
    command -v slurmctld slurmd munged > /dev/null || fail "Slurm is not installed: $0 install"
    [ "$(id -u)" = 0 ] || fail "the daemons start as root only"
    [ ! -e "$dir/slurm.conf" ] || fail "$dir has a cluster already: $0 stop $dir"
    if (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
        fail "port $port is in use, perhaps by another such cluster: stop it, or set SLURM_PORT"
    fi
    mkdir -p "$dir/state"
    dir=$(realpath "$dir")
    write_settings "$dir" "$nodes"
    for gpu in {0..7}; do
        [ -e "$dir/fakegpu$gpu" ] || mknod "$dir/fakegpu$gpu" c 1 3 # another /dev/null
    done
    start_munge "$dir"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c
    for ((node = 0; node < nodes; node++)); do
        mkdir -p "$dir/spool.node$node"
        slurmd -c -N "node$node"
    done
    for ((second = 0; second < 30; second++)); do
        if [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l)" = "$nodes" ]; then
            sinfo
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 1
    done
    fail "the nodes are not ready; see $dir/*.log"
}

stop() {
    local dir
    dir=$(realpath "$1")
    export SLURM_CONF=$dir/slurm.conf
    [ -e "$SLURM_CONF" ] || fail "$dir has no cluster"
    scancel --me 2> /dev/null || true
    for ((second = 0; second < 60; second++)); do # KillWait and more
        [ -n "$(squeue -h 2> /dev/null)" ] || break
        sleep 1
    done
    for file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" || true
        while kill -0 "$pid" 2> /dev/null; do sleep 0.2; done
    done
    rm -rf "$dir"/{slurm.conf,gres.conf,state,munge.*} "$dir"/spool.* "$dir"/fakegpu*
}

case "${1:-} $#" in
    "install 1") install ;;
    "start 2" | "start 3") start "$2" "${3:-4}" ;;
    "stop 2") stop "$2" ;;
    *) fail "use $0 install, $0 start DIR [NODES], or $0 stop DIR" ;;
esac
