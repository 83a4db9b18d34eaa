#!/bin/bash
# The first minutes on this machine's GPU: bash bench/gpu.sh [--minutes 8] [--formulas swiglu gelu ...]
# Kernels are checked and timed, and whole training steps measured, with nothing but torch, Triton and this repository.
# Results: bench/results/<gpu>-elementwise.json and .md. Ends with 1 if a check failed.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec "${PYTHON:-python3}" -m bench.gpu "$@"
