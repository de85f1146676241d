#!/usr/bin/env bash
# Proves and measures the CUDA bodies on this machine's first GPU, in under eight minutes and without a network.
# Needs nvcc, g++ and a Python that has PyTorch with CUDA. Other packages (numpy, apache-tvm-ffi; msgspec, uvloop,
# aiohttp and the rest of pyproject.toml for serving) may be unpacked wheels in the folder $OCTET_WHEELS.
#
#   OCTET_PYTHON=/path/to/python OCTET_WHEELS=/path/to/wheels tests/gpu/run.sh [--only "correctness,speed"]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root${OCTET_WHEELS:+:$OCTET_WHEELS}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$root"
exec "${OCTET_PYTHON:-python3}" -m tests.gpu.all "$@"
