#!/usr/bin/env bash
# Pretrain on several nodes under SLURM; from the root of a checkout:
#
#   sbatch --nodes 2 training/slurm.sh clever-resnet50.in100-caug --data /data/imagenet100
#
# Set the partition, account and GPUs per node of your cluster. Two minutes before the time limit
# the run is stopped, and the job goes back into the queue to go on from its last checkpoint; torchrun
# restarts processes that die, all of them from the last checkpoint. A run that fails stays failed.
#SBATCH --job-name=clever
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch training/slurm.sh RECIPE [KEY=VALUE]... [OPTIONS]" >&2
    exit 2
fi
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
out_of_time=
trap 'out_of_time=1; kill -TERM "$run"' TERM

srun --kill-on-bad-exit=1 --cpus-per-task "$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-4}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    --max-restarts 3 \
    -m training.pretrain "$@" --device cuda --workers 8 &
run=$!
wait "$run"
status=$?
if [ -n "$out_of_time" ]; then
    wait "$run" # the trap ended the first wait
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
