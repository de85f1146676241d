// common/vec.h   Sixteen floats at a time, the same sixteen lanes at every instruction set.
//
// F32x16 is one AVX-512 register, two AVX2 registers or an array. Because the lanes and the order of
// `sum` are the same everywhere, the shape of a reduction is a property of the op, not of the machine;
// what may still differ between instruction sets is whether a multiply-add rounds once or twice.
//
// Each body defines: zeros, broadcast, load, load_first, load_nibbles, store, store_first, fma,
// + - * /, max, min, select_less, round, pow2, sum, max_lane, turn_pairs, transpose. Higher functions are in
// vec_math.h.

#pragma once

#include "bf16.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif
