// AVX-512.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of gcc 12
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "attention_kernels.h"
#include "scratch.h"
#include "softmax.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "fp32_attention.h"

namespace tqext::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 12;      // 24 sums, 2 vectors of the panel and a broadcast in 32 registers
  static constexpr int kPanelsOne = 4;  // 8 sums hide a latency of 4 at two multiply-adds a cycle

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_bfloat(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static float max_lane(F v) { return _mm512_reduce_max_ps(v); }
  // 2^x for x <= 0, relative error 1e-7; 0 below -100, NaN stays.
  static F exp2(F x) {
    const F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
    F y = _mm512_set1_ps(1.3276471781512866e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.67554133276717e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55071327415071e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40221197238820e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93146967064360e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0000000716546738f));
    const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ);
    return _mm512_castsi512_ps(
        _mm512_maskz_add_epi32(keep, _mm512_castps_si512(y), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
  }

  static I load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static I set1_int(int x) { return _mm512_set1_epi32(x); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  template <int n>
  static I shift_right(I x) {
    return _mm512_srli_epi32(x, n);
  }
  static I shift_right_by(I x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I load_table(const int8_t* levels) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }
  static I look_up(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  // Byte b of every lane, signed.
  template <int b>
  static F byte_to_float(I x) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(b == 3 ? x : _mm512_slli_epi32(x, 24 - 8 * b), 24));
  }
  static F sign_of_top_bit(I x) {  // bit 31 set: +1, else -1
    return _mm512_xor_ps(_mm512_set1_ps(-1.0f), _mm512_and_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(-0.0f)));
  }
  // Words 0 .. n_words - 1 of sixteen tokens from t on, the token as the lane; tokens from n on read token n - 1.
  static void load_words(const uint32_t* words, ptrdiff_t stride, int t, int n, int n_words, I out[4]) {
    const __mmask8 mask = __mmask8((1 << n_words) - 1);
    __m128i w[16];
    for (int i = 0; i < 16; i++) w[i] = _mm_maskz_loadu_epi32(mask, words + smaller(t + i, n - 1) * stride);
    I r[4];
    for (int i = 0; i < 4; i++) {
      r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(w[i]), w[i + 4], 1);
      r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], w[i + 8], 2), w[i + 12], 3);
    }
    const I a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
    const I c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
  }
  // rows[i][d + j] to to[j * stride + i].
  static void transpose_4x4(float* const rows[4], int d, float* to, ptrdiff_t stride) {
    __m128 r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm_loadu_ps(rows[i] + d);
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    for (int j = 0; j < 4; j++) _mm_storeu_ps(to + j * stride, r[j]);
  }
};

}  // namespace

void attend_coded_avx512(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                         Partial* partials) {
  Fp32Attention<Avx512>::attend_coded(head, shape, rows, begin, end, partials);
}

void attend_exact_avx512(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials) {
  Fp32Attention<Avx512>::attend_exact(head, rows, begin, end, partials);
}

}  // namespace tqext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
