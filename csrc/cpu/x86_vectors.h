// What AVX2 and AVX-512 have in common. Included inside the target pragma of each: internal linkage only.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace tqext::cpu {
namespace {

struct X86Vectors {
  // rows[i][d + j] to to[j * stride + i].
  static void transpose_4x4(float* const rows[4], int d, float* to, ptrdiff_t stride) {
    __m128 r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(rows[i] + d);
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    for (int j = 0; j < 4; j++) _mm_storeu_ps(to + j * stride, r[j]);
  }
};

}  // namespace
}  // namespace tqext::cpu
