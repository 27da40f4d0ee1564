# Sourced by tests/run.sh and examples/quickstart.sh: makes the virtual environment and installs the pinned versions.
# An environment that it did not make, or made for another checkout, is not changed: it is checked, and what it lacks is
# said.
#
#   ensure_environment [EXTRAS]   EXTRAS is a comma-separated list of extras of setup.py, for example "test,mpi".
#
# Reads  VENV    the environment's folder (default: .venv beside this repository's setup.py)
#        PYTHON  the interpreter that makes it (default: python3; 3.10 or newer)
# Sets   ROOT    the repository,  VENV  its environment,  PYTHON  the environment's interpreter; for an environment that
#        was not made here, PYTHONPATH, so that it runs this checkout.
#
# Nothing is installed again until setup.py or .constraints.txt changes.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MADE_HERE=.made-by-ds-moe-ep # a file in each environment that was: it names the checkout

ensure_environment() {
    local extras=${1:-} base=${PYTHON:-python3} stamp wanted
    VENV=${VENV:-$ROOT/.venv}
    [[ $VENV == /* ]] || VENV=$PWD/$VENV
    PYTHON=$VENV/bin/python
    if [[ -n $(ls -A "$VENV" 2>/dev/null) ]] && ! is_made_here; then
        check_environment "$extras"
        return
    fi
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

is_made_here() {
    [[ -e $VENV/$MADE_HERE ]] && [[ ! -s $VENV/$MADE_HERE || $(<"$VENV/$MADE_HERE") == "$ROOT" ]]
}

check_environment() {
    if [[ ! -x $PYTHON ]]; then
        echo "error: VENV=$VENV is a folder without bin/python: name an environment, or a folder that does not exist" >&2
        return 1
    fi
    is_new_enough "$PYTHON" VENV || return
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$ROOT/tests/missing.py" "$1"
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' && return
    echo "error: $2=$1 is $("$1" --version 2>&1): Python 3.10 or newer is needed; name one by $2=..." >&2
    return 1
}

make_environment() {
    local base=$1
    if ! command -v "$base" >/dev/null; then
        echo "error: PYTHON=$base is no command: install Python 3.10 or newer, or name one by PYTHON=..." >&2
        return 1
    fi
    is_new_enough "$base" PYTHON || return
    if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "error: $base has no venv module: on Debian and Ubuntu install the package python3-venv, then run this again" >&2
        return 1
    fi
    # The mark comes first: an environment whose making was interrupted is made again.
    mkdir -p "$VENV" && echo "$ROOT" >"$VENV/$MADE_HERE" || return
    "$base" -m venv "$VENV"
}

fingerprint() {
    cat "$ROOT/setup.py" "$ROOT/.constraints.txt" |
        "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}
