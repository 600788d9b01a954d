# Sourced by the job scripts: the environment of a GPU node, one training, and the requeue.
#
# CONLENS_COMMAND=dump sbatch scripts/slurm/<script>.sh --config=…   runs conlens_jax.dump (or
# evaluate, quickstart) in the place of conlens_jax.train.
# DRY_RUN=1 bash scripts/slurm/<script>.sh --config=…   compiles the same run from shapes on a CPU,
# prints the memory of each device and exits: no node, no GPU, no weights.

# JAX takes its memory at once and keeps it; the rest is for NCCL and the driver.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-1}"
# A proxy between the nodes keeps the processes from meeting.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
PYTHON="${PYTHON:-python}"

# Trains (or runs $CONLENS_COMMAND) with the given flags. Exit code 75 (saved after SIGTERM) puts the
# job back into the queue, where it goes on from what it saved; any other code is the job's.
train() {
  if [ -n "${DRY_RUN:-}" ]; then
    "$PYTHON" -m conlens_jax.train "$@" --config.launch.dry_run=true
    return
  fi
  srun --kill-on-bad-exit=1 "$PYTHON" -m "conlens_jax.${CONLENS_COMMAND:-train}" "$@"
  local code=$?
  if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    return 0
  fi
  return "$code"
}
