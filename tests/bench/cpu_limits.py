"""What this machine's CPU can do at most: int8 operations on registers, bytes read from memory.

Both loops are compiled here for this processor. Memory is read as packed weights are: each thread its own
stretch of one buffer, in huge pages where the system gives them. (NumPy's maximum, in ordinary pages, reaches
half of that where a page costs more than its bytes.)
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_ops import build

_BYTES = 512 << 20
_READS = 5  # the best of these counts

_VNNI_PEAK = """
#include <immintrin.h>
extern "C" long run(long n) {
  __m512i sums[12], w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(2);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], w, x);
  }
  long total = 0;
  for (auto& sum : sums) total += _mm512_reduce_add_epi32(sum);
  return total;
}
"""
# As assembly, so that the compiler does not drop products that nobody reads.
_AVX2_PEAK = """
extern "C" long run(long n) {
  for (long i = 0; i < n; ++i) {
    asm volatile(
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm0; vpmaddubsw %%ymm15, %%ymm14, %%ymm1;"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm2; vpmaddubsw %%ymm15, %%ymm14, %%ymm3;"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm4; vpmaddubsw %%ymm15, %%ymm14, %%ymm5;"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm6; vpmaddubsw %%ymm15, %%ymm14, %%ymm7;"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm8; vpmaddubsw %%ymm15, %%ymm14, %%ymm9;"
        "vpmaddubsw %%ymm15, %%ymm14, %%ymm10; vpmaddubsw %%ymm15, %%ymm14, %%ymm11;" ::
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
  }
  return n;
}
"""
# Whole registers at a time: GCC takes wider vectors apart in memory, and the loop is then slower than memory.
_READ = """
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef long Register __attribute__((vector_size(BYTES)));
extern "C" long run(const Register* from, long num_bytes) {
  Register a = {}, b = {}, c = {}, d = {};
  for (long i = 0; i + 4 <= num_bytes / BYTES; i += 4) {
    a ^= from[i];
    b ^= from[i + 1];
    c ^= from[i + 2];
    d ^= from[i + 3];
  }
  a = (a ^ b) ^ (c ^ d);
  long total = 0;
  for (int i = 0; i < BYTES / 8; ++i) total ^= a[i];
  return total;
}
"""


def int8_peak() -> float | None:
    """Operations per second of one core's vpdpbusd, else of its vpmaddubsw; None where it has neither."""
    if frozenset((*build.AVX512, "avx512_vnni")) <= build.cpu_flags():
        run, operations = _compiled(_VNNI_PEAK, "-mavx512f", "-mavx512vnni"), 128
    elif "avx2" in build.cpu_flags():
        run, operations = _compiled(_AVX2_PEAK, "-mavx2"), 64
    else:
        return None
    run.argtypes = [ctypes.c_long]
    steps = 200_000
    return steps * 12 * operations / min(_seconds(run, steps) for _ in range(50))


class ReadBandwidth:
    """Measures again at each call, because other processes and virtual machines share the memory."""

    def __init__(self, threads: int) -> None:
        self._memory = mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        bytes_at_once = b"\1" * (1 << 20)
        for _ in range(_BYTES >> 20):
            self._memory.write(bytes_at_once)
        self._run = _compiled(_READ, "-march=native")
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_long]
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._part = _BYTES // threads // 4096 * 4096
        self._starts = [start + i * self._part for i in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> float:
        """Bytes per second over all threads."""
        seconds = min(_seconds(self._read_all) for _ in range(_READS))
        return self._part * len(self._starts) / seconds

    def _read_all(self) -> None:
        list(self._pool.map(lambda start: self._run(start, self._part), self._starts))


def _compiled(source: str, *flags: str) -> ctypes._CFuncPtr:
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder) / "loop.cc", Path(folder) / "loop.so"
        file.write_text(source)
        command = [
            build.find_compiler(),
            "-O3",
            *flags,
            "-w",
            "-shared",
            "-fPIC",
            str(file),
            "-o",
            str(library),
        ]
        subprocess.run(command, check=True)
        run = ctypes.CDLL(str(library)).run
        run.restype = ctypes.c_long
        return run


def _seconds(call: object, *arguments: int) -> float:
    started = time.perf_counter()
    call(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started
