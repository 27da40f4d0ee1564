# Sourced by tests/run.sh and examples/quickstart.sh: makes the virtual environment and installs the pinned versions.
#
#   ensure_environment [EXTRAS]   EXTRAS is a comma-separated list of extras of setup.py, for example "test,mpi".
#
# Reads  VENV    the environment's folder (default: .venv beside this repository's setup.py)
#        PYTHON  the interpreter that makes it (default: python3; 3.10 or newer)
# Sets   ROOT    the repository,  VENV  its environment,  PYTHON  the environment's interpreter.
#
# Nothing is installed again until setup.py or .constraints.txt changes.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

ensure_environment() {
    local extras=${1:-} base=${PYTHON:-python3} stamp wanted
    VENV=${VENV:-$ROOT/.venv}
    [[ $VENV == /* ]] || VENV=$PWD/$VENV
    PYTHON=$VENV/bin/python
    # An environment whose making was interrupted has an interpreter but no pip: it is made again.
    "$PYTHON" -c 'import pip' 2>/dev/null || make_environment "$base" || return
    stamp=$VENV/.installed-${extras//,/-}
    wanted=$(fingerprint) || return
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    echo "installing the pinned versions${extras:+ with the extras $extras} into $VENV" >&2
    # As an environment variable the constraints hold for build environments too; pip splits it at
    # blanks, so it is a relative path.
    if ! (cd "$ROOT" && PIP_CONSTRAINT=.constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$PYTHON" -m pip install --quiet --editable ".${extras:+[$extras]}"); then
        echo "error: pip could not install the versions of .constraints.txt; its own message stands above" >&2
        return 1
    fi
    echo "$wanted" >"$stamp"
}

make_environment() {
    local base=$1
    if ! command -v "$base" >/dev/null; then
        echo "error: PYTHON=$base is no command: install Python 3.10 or newer, or name one by PYTHON=..." >&2
        return 1
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: PYTHON=$base is $("$base" --version 2>&1): Python 3.10 or newer is needed; name one by PYTHON=..." >&2
        return 1
    fi
    if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "error: $base has no venv module: on Debian and Ubuntu install the package python3-venv, then run this again" >&2
        return 1
    fi
    "$base" -m venv "$VENV"
}

fingerprint() {
    cat "$ROOT/setup.py" "$ROOT/.constraints.txt" |
        "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}
