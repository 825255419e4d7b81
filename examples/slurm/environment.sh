# shellcheck shell=bash
# Settings that the jobs in this directory share. Sourced by the batch scripts, in the root of the repository.

PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since Slurm 22.05, a step has one CPU per task unless it is given the number again.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Rank 0 is on the first node. Slurm's address of that node also works if names of nodes do not resolve. Each task finds
# rank, world size and port (mor_megatron/distributed/launch.py).
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first_node}

# NCCL finds networks and GPUs by itself; name the interface if it picks one that the nodes do not share.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0

# PyTorch's allocator grows its blocks instead of leaving gaps: routed models ask for another size every time.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}

# More options of every step, separated by blanks; tools/launch_slurm.py puts those of containers here.
read -ra srun_options <<< "${SRUN_OPTIONS:-}"
