#!/usr/bin/env bash
# The kernels' own tests once more with AddressSanitizer in the place of the emulator's hooks (csrc/emulate/README.md):
# it knows every allocation of the process, so it also sees what lies beside the arrays that a call was given.
#   tests/cuda_ops/gpu/asan.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python="${OCTET_VENV:-$PWD/.venv}/bin/python"
runtime="$("$python" -c 'from cuda_ops.emulator import address_sanitizer_runtime as find; print(find() or "")')"
[[ -n "$runtime" ]] || { echo 'the compiler has no AddressSanitizer runtime: nothing was run'; exit 0; }
# It looks for the function that throws when it starts, long before Python loads a C++ library.
runtime+=" $("${CXX:-g++}" -print-file-name=libstdc++.so.6)"
here=tests/cuda_ops/gpu
OCTET_EMULATOR_SANITIZE=address ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 PYTHONMALLOC=malloc LD_PRELOAD="$runtime" \
  exec "$python" -m pytest -q --capture=sys "$@" "$here"/test_{attention,attention_int8,linear,moe,row_kernels,quantize,device_sampling,all_reduce}.py
