#!/usr/bin/env bash
# Several nodes of 8 GPUs, one process per GPU. Each node is a slice: parameters are sharded over its
# GPUs (along mesh.tensor and fsdp), and only gradients cross the network.
#   mkdir -p logs && sbatch --nodes=4 scripts/slurm/several_nodes.sh --config=configs/llama3_3_70b_8xh100.py
# mesh.tensor is that of the config; its preset is overridden.
#SBATCH --job-name=conlens
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
source scripts/slurm/common.sh
train "$@" --config.distributed.coordinator=auto \
  --config.mesh.preset=multislice --config.mesh.slices="$SLURM_JOB_NUM_NODES"
