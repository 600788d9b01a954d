#!/usr/bin/env bash
# Sets up the environment and runs the quickstart; arguments are passed to it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m conlens_jax.quickstart "$@"
