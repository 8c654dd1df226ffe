// What AVX2 and AVX-512 have in common. Included inside the target pragma of each: internal linkage only.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

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

  // The table's bytes at the nibbles of four words, low nibbles first.
  static void look_up_nibbles(const int8_t table[16], const uint32_t words[4], int8_t to[32]) {
    const __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(table)), nibble = _mm_set1_epi8(15);
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    const __m128i even = _mm_shuffle_epi8(levels, _mm_and_si128(x, nibble));
    const __m128i odd = _mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi32(x, 4), nibble));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(even, odd));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi8(even, odd));
  }
};

}  // namespace
}  // namespace tqext::cpu
