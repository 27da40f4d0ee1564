#!/usr/bin/env bash
# The project's one test command: environment, lint, types, tests.
#
#   bash tests/run.sh                        everything but the tests marked slow or gpu
#   bash tests/run.sh tests/config            arguments go to pytest
#   bash tests/run.sh -m slow                a marker of your own replaces "not slow and not gpu", one test at a time
#   bash tests/run.sh -n 0                   without the three lanes (see tests/lanes.py), in which order files stand
#
# VENV and PYTHON choose the environment (see tests/environment.sh). No test collected is a failure.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ensure_environment test
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE # each rank and subprocess would compile the tests and the package anew
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

# Types beside the tests, some of which only wait, and behind them for the cores.
types=$(mktemp)
nice "$PYTHON" -m mypy >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT
failed=0
if [[ " $* " == *" -m "* ]]; then # slow tests use the whole machine
    LANES=0
    wait "$mypy" || failed=$?
else
    LANES=3
fi
"$PYTHON" -m pytest -n "$LANES" -m "not slow and not gpu" "$@" || failed=$?
[[ $LANES == 0 ]] || wait "$mypy" || failed=$?
cat "$types"
exit "$failed"
