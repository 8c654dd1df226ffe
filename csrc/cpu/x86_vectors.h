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

  // A unit's bytes of the table, in the order of its dimensions.
  template <int kBits>
  static void look_up_unit(const int8_t table[16], const uint32_t* w, uint32_t, int8_t to[32]) {
    static_assert(kBits == 4, "fewer levels are picked from a vector");
    const __m128i levels = _mm_load_si128(reinterpret_cast<const __m128i*>(table)), nibble = _mm_set1_epi8(15);
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    const __m128i even = _mm_shuffle_epi8(levels, _mm_and_si128(x, nibble));
    const __m128i odd = _mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi32(x, 4), nibble));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi8(even, odd));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi8(even, odd));
  }

  // Words of the last eight dimensions of two units with 3-bit codes: out[0] and out[3].
  static void last_words(const uint32_t w[6], uint32_t out[4]) {
    __m128i x[3];
    for (int i = 0; i < 3; i++) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i));
    x[0] = _mm_and_si128(_mm_srli_epi32(x[0], 3), _mm_set1_epi32(0x11111111));
    x[1] = _mm_and_si128(_mm_srli_epi32(x[1], 2), _mm_set1_epi32(0x22222222));
    x[2] = _mm_and_si128(_mm_srli_epi32(x[2], 1), _mm_set1_epi32(0x44444444));
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_or_si128(_mm_or_si128(x[0], x[1]), x[2]));
  }
};

}  // namespace
}  // namespace tqext::cpu
