#!/usr/bin/env bash
# All that needs a GPU: the one-GPU check with one hardware queue and with eight, and the tests marked gpu.
#
#   bash tests/gpu/run.sh [FOLDER]      Records go to FOLDER (default: $OUT, else a new folder under /tmp)
#
# PYTHON chooses the interpreter; torch is enough for the check, the marked tests are run where pytest is installed.
# Under 5 minutes on one H100 or H200. The exit code is 1 where something does not hold.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}"
folder="${1:-${OUT:-$(mktemp -d)}}"
mkdir -p "$folder"
status=0
CUDA_DEVICE_MAX_CONNECTIONS=1 "$PYTHON" -m tests.gpu.one_gpu --out "$folder/one_gpu.jsonl" || status=1
CUDA_DEVICE_MAX_CONNECTIONS=8 "$PYTHON" -m tests.gpu.one_gpu speed --rounds 3 --out "$folder/one_gpu_8.jsonl" || status=1
if "$PYTHON" -c "import pytest" 2> /dev/null; then
    # Without .pytest.ini, which asks for plugins; here pytest alone is enough. 5: every one of them is left out.
    "$PYTHON" -m pytest -q -c /dev/null --rootdir "$PWD" -m gpu tests/kernels tests/gpu || [[ $? == 5 ]] || status=1
else
    echo "the tests marked gpu are left out: there is no pytest (pip install pytest)"
fi
echo "Records: $folder"
exit $status
