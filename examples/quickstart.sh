#!/usr/bin/env bash
# Trains the scaled-down 4-layer model with 16 experts per layer, one on each of 16 processes of this machine.
#
#   bash examples/quickstart.sh [arguments of train_ep16.py, for example --steps 200 --data my_texts/]
#
# The first call makes a virtual environment (VENV, default .venv) with the pinned versions; later calls start at
# once. PYTHON names the interpreter (3.10 or newer). Everything runs on CPU, on a machine with GPUs too: for 16
# GPUs see README.md beside this file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tests/environment.sh"

ensure_environment
arguments=(--deepspeed_config "$ROOT/ds_configs/ep16_cpu.json" --save "$ROOT/checkpoints/quickstart" "$@")
echo "starting 16 processes; importing torch and deepspeed in all of them takes about a minute on two cores"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
export PATH="$VENV/bin:$PATH" # the launcher starts its children with the environment's interpreter
exec "$VENV/bin/deepspeed" --num_gpus 16 --log_level warning "$ROOT/examples/train_ep16.py" "${arguments[@]}"
