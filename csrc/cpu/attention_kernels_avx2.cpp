// AVX2: the fp32 tile kernel with eight lanes.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "attention_kernels.h"
#include "scratch.h"
#include "softmax.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "exp2_polynomial.h"
#include "fp32_attention.h"
#include "mean_scores.h"
#include "x86_vectors.h"

namespace tqext::cpu {
namespace {

struct Avx2 : X86Vectors {
  using F = __m256;
  using I = __m256i;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;       // 12 sums, 2 vectors of the panel and a broadcast in 16 registers
  static constexpr int kPanelsOne = 4;  // 8 sums hide a latency of 4 at two multiply-adds a cycle
  static constexpr int kMeans = 2;      // 8 sums, for the same reason

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_bfloat(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static float sum(F v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float max_lane(F v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  // 2^x for x <= 0, relative error 1e-7; 0 below -100, NaN stays.
  static F exp2(F x) {
    const F n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(x, n);
    const F y = exp2_polynomial<Avx2>(f);
    const I bits = _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    return _mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_cmp_ps(x, _mm256_set1_ps(-100.0f), _CMP_NLT_UQ));
  }

  static I load_int(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I set1_int(int x) { return _mm256_set1_epi32(x); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  template <int n>
  static I shift_right(I x) {
    return _mm256_srli_epi32(x, n);
  }
  static I shift_right_lanes(I x, I n) { return _mm256_srlv_epi32(x, n); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static I load_table(const int8_t* levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }
  static I look_up(I table, I index) { return _mm256_shuffle_epi8(table, index); }
  static constexpr int kPick = 8;
  // Lane `index` of the table, of which the three lowest bits count.
  static F pick(F table, I index) { return _mm256_permutevar8x32_ps(table, index); }
  // Byte b of every lane, signed.
  template <int b>
  static F byte_to_float(I x) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(b == 3 ? x : _mm256_slli_epi32(x, 24 - 8 * b), 24));
  }
  // The first word in all lanes.
  static I spread_words(const uint32_t& a, const uint32_t&) { return _mm256_set1_epi32(int(a)); }
  // Eight signed bytes.
  static F load_bytes(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
  }
  static F sign_of_top_bit(I x) {  // bit 31 set: +1, else -1
    return _mm256_xor_ps(_mm256_set1_ps(-1.0f), _mm256_and_ps(_mm256_castsi256_ps(x), _mm256_set1_ps(-0.0f)));
  }
  // Words 0 .. n_words - 1 of eight tokens from t on, the token as the lane; tokens from n on read token n - 1.
  static void load_words(const uint32_t* words, ptrdiff_t stride, int t, int n, int n_words, I out[4]) {
    const uint32_t* w[8];
    for (int i = 0; i < 8; i++) w[i] = words + smaller(t + i, n - 1) * stride;
    if (n_words == 1) {
      out[0] = _mm256_setr_epi32(w[0][0], w[1][0], w[2][0], w[3][0], w[4][0], w[5][0], w[6][0], w[7][0]);
      return;
    }
    const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32(n_words), _mm_setr_epi32(0, 1, 2, 3));
    I r[4];
    for (int i = 0; i < 4; i++) {
      r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskload_epi32(reinterpret_cast<const int*>(w[i]), mask)),
                                     _mm_maskload_epi32(reinterpret_cast<const int*>(w[i + 4]), mask), 1);
    }
    const I a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
    const I c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
  }
};

}  // namespace

void attend_coded_avx2(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                       Partial* partials) {
  Fp32Attention<Avx2>::attend_coded(head, shape, rows, begin, end, partials);
}

void attend_exact_avx2(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials) {
  Fp32Attention<Avx2>::attend_exact(head, rows, begin, end, partials);
}

void score_means_avx2(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset) {
  MeanScores<Avx2>::score(q, n_rows, means, first, n, offset);
}

}  // namespace tqext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
