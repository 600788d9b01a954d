#!/usr/bin/env bash
# Sets up the environment with the test tools and runs the tests; arguments are passed to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
# One process per core; each runs whole files, so that fixtures are created once.
exec python -m pytest -n auto --dist loadfile "$@"
