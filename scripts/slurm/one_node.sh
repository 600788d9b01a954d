#!/usr/bin/env bash
# One node of 8 GPUs, one process:
#   mkdir -p logs && sbatch scripts/slurm/one_node.sh --config=configs/llama3_1_8b_8xh100.py
#SBATCH --job-name=conlens
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
source scripts/slurm/common.sh
train "$@"
