#!/usr/bin/env bash
# Sets up the environment with the test tools and runs the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
# A process a core, each with whole files: their fixtures are made once.
exec python -m pytest -n auto --dist loadfile "$@"
