#!/usr/bin/env bash
# An array of seeds, one GPU and one run folder each: RUN_DIR/seed0, RUN_DIR/seed1, …
#   mkdir -p logs && RUN_DIR=runs/seeds sbatch --array=0-4 scripts/slurm/seeds.sh --config=configs/lens_simple.py
#SBATCH --job-name=conlens-seeds
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A-%a.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
source scripts/slurm/common.sh
train "$@" --config.train.seed="$SLURM_ARRAY_TASK_ID" \
  --config.run_dir="${RUN_DIR:-runs/seeds}/seed$SLURM_ARRAY_TASK_ID"
