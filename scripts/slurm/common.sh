# Sourced by the job scripts: the environment of a GPU node, the training command, and requeueing.
#
# CONLENS_COMMAND=dump sbatch scripts/slurm/<script>.sh --config=…   runs conlens_jax.dump (or
# evaluate, quickstart) instead of conlens_jax.train.
# DRY_RUN=1 bash scripts/slurm/<script>.sh --config=…   compiles the same run from shapes on a CPU,
# prints the memory per device and exits: no node, no GPU, no weights.

# JAX preallocates its memory; the rest is for NCCL and the driver.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-1}"
# A proxy between the nodes prevents the processes from connecting.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
PYTHON="${PYTHON:-python}"

# Trains (or runs $CONLENS_COMMAND) with the given flags. Exit code 75 (saved after SIGTERM) requeues
# the job, which then resumes from its checkpoint; any other code is that of the job.
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
