#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include <algorithm>

#include "q1_matmul_kernels.h"

#define TQ_AVX2 __attribute__((target("avx2,f16c,fma")))
#define TQ_AVX2_INLINE __attribute__((target("avx2,f16c,fma"), always_inline)) inline

// As the AVX-512 kernel, with tables of 8 floats: lane = row of 8, three bits a lookup. A word takes ten lookups of three bits
// and one of two.

namespace tqext::cpu {
namespace {

constexpr int kGroup = 128, kQuad = 4;  // columns, words that are transposed together
constexpr int kTable = 8;               // floats
constexpr int kLookups = 11;            // of a word
constexpr int kTile = 8;                // rows
constexpr int kPanelTables = 16;  // inputs * groups of bits whose tables are built at a time: 22 KiB, L1 with room for weights

struct Words {
  __m256i word[kQuad];  // lane = row
};

TQ_AVX2_INLINE __m256i load_pair(const uint32_t* w, ptrdiff_t stride) {  // rows 0 and 4
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 4 * stride)), 1);
}

TQ_AVX2_INLINE Words load_words(const uint32_t* w, ptrdiff_t stride) {
  const __m256i a = load_pair(w, stride), b = load_pair(w + stride, stride);
  const __m256i c = load_pair(w + 2 * stride, stride), d = load_pair(w + 3 * stride, stride);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), cd_low = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  return {{_mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
           _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)}};
}

TQ_AVX2_INLINE __m256 load_scales(const uint16_t* s, ptrdiff_t stride) {
  // Inserted one by one: stores to a buffer would stall the load that follows.
  const auto four = [&](const uint16_t* p) __attribute__((target("avx2"), always_inline)) {
    return _mm_insert_epi16(_mm_insert_epi16(_mm_insert_epi16(_mm_cvtsi32_si128(p[0]), p[stride], 1), p[2 * stride], 2),
                            p[3 * stride], 3);
  };
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(four(s), four(s + 4 * stride)));
}

// Of the eight indices, what their bit `place` adds when it is bit b of a word.
template <int kBits>
TQ_AVX2_INLINE __m256 factors(int place, int b) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bit = _mm256_set1_epi32(1 << place);
  return _mm256_blendv_ps(_mm256_set1_ps(BitFactor<kBits>::zero(b)), _mm256_set1_ps(BitFactor<kBits>::one(b)),
                          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(index, bit), bit)));
}

// The tables of one word of one input, `step` floats apart.
template <int kBits>
TQ_AVX2 void build_tables(const float* x, float* table, ptrdiff_t step) {
  using Factor = BitFactor<kBits>;
#pragma GCC unroll 11
  for (int i = 0; i < kLookups; ++i, table += step) {
    const int b = 3 * i;
    __m256 t = _mm256_mul_ps(factors<kBits>(0, b), _mm256_set1_ps(x[Factor::column(b)]));
    t = _mm256_fmadd_ps(factors<kBits>(1, b + 1), _mm256_set1_ps(x[Factor::column(b + 1)]), t);
    // The last has two bits.
    if (i + 1 < kLookups) t = _mm256_fmadd_ps(factors<kBits>(2, b + 2), _mm256_set1_ps(x[Factor::column(b + 2)]), t);
    _mm256_store_ps(table, t);
  }
}

template <int n_inputs, int n_chains>
TQ_AVX2_INLINE void add_word(__m256i index, const float* tables, __m256 (&acc)[n_inputs][n_chains]) {
#pragma GCC unroll 11
  for (int n = 0; n < kLookups; ++n) {
    const int c = n % n_chains;
#pragma GCC unroll 8
    for (int i = 0; i < n_inputs; ++i) {
      const __m256 table = _mm256_load_ps(tables + (n * n_inputs + i) * kTable);
      acc[i][c] = _mm256_add_ps(acc[i][c], _mm256_permutevar8x32_ps(table, index));
      asm("" : "+x"(acc[i][c]));  // gcc 12 otherwise gathers all lookups before the additions, and spills them
    }
    index = _mm256_srli_epi32(index, 3);
  }
}

template <int kBits, int n_inputs>
TQ_AVX2 void run(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int row_begin, int row_end, float* out,
                 ptrdiff_t out_stride) {
  constexpr int kWords = kGroup * kBits / 32, kPanelGroups = std::max(kPanelTables / (n_inputs * kBits), 1);
  constexpr int kWordTables = kLookups * n_inputs * kTable;
  constexpr int n_chains = n_inputs == 1 ? 4 : n_inputs == 2 ? 2 : 1;  // hides the latency of the addition
  alignas(32) float tables[kPanelGroups * kWords * kWordTables];
  uint32_t padded_weight[kTile * kPanelGroups * kWords];
  uint16_t padded_scales[kTile * kPanelGroups];

  for (int panel = 0; panel < m.n_groups; panel += kPanelGroups) {
    const int n_groups = std::min(kPanelGroups, m.n_groups - panel);
    for (int i = 0; i < n_inputs; ++i)
      for (int w = 0; w < n_groups * kWords; ++w)
        build_tables<kBits>(x + i * x_stride + panel * kGroup + w * (32 / kBits), tables + w * kWordTables + i * kTable,
                            n_inputs * kTable);
    for (int tile = row_begin; tile < row_end; tile += kTile) {
      const int n_rows = std::min(kTile, row_end - tile);
      const uint32_t* weight = m.weight + tile * m.weight_stride + panel * kWords;
      const uint16_t* scales = m.scales + tile * m.scale_stride + panel;
      ptrdiff_t weight_stride = m.weight_stride, scale_stride = m.scale_stride;
      if (n_rows < kTile) {
        memset(padded_weight, 0, sizeof(padded_weight));
        memset(padded_scales, 0, sizeof(padded_scales));
        for (int r = 0; r < n_rows; ++r) {
          memcpy(padded_weight + r * kPanelGroups * kWords, weight + r * weight_stride, n_groups * kWords * sizeof(uint32_t));
          memcpy(padded_scales + r * kPanelGroups, scales + r * scale_stride, n_groups * sizeof(uint16_t));
        }
        weight = padded_weight, weight_stride = kPanelGroups * kWords;
        scales = padded_scales, scale_stride = kPanelGroups;
      }
      __m256 total[n_inputs];
#pragma GCC unroll 8
      for (int i = 0; i < n_inputs; ++i) total[i] = _mm256_setzero_ps();
      for (int g = 0; g < n_groups; ++g) {
        if (g * kWords % 16 == 0 && n_rows == kTile)  // a cache line holds 16 words
          for (int r = 0; r < kTile; ++r)
            _mm_prefetch(reinterpret_cast<const char*>(weight + (kTile + r) * weight_stride + g * kWords), _MM_HINT_T0);
        __m256 acc[n_inputs][n_chains];
#pragma GCC unroll 8
        for (int i = 0; i < n_inputs; ++i)
          for (int c = 0; c < n_chains; ++c) acc[i][c] = _mm256_setzero_ps();
        const float* const group_tables = tables + g * kWords * kWordTables;
#pragma GCC unroll 1
        for (int quad = 0; quad < kWords; quad += kQuad) {
          const Words words = load_words(weight + g * kWords + quad, weight_stride);
#pragma GCC unroll 4
          for (int w = 0; w < kQuad; ++w) add_word(words.word[w], group_tables + (quad + w) * kWordTables, acc);
        }
        const __m256 scale = load_scales(scales + g, scale_stride);
#pragma GCC unroll 8
        for (int i = 0; i < n_inputs; ++i) {
          __m256 sum = acc[i][0];
          for (int c = 1; c < n_chains; ++c) sum = _mm256_add_ps(sum, acc[i][c]);
          total[i] = _mm256_fmadd_ps(scale, sum, total[i]);
        }
      }
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n_rows), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
#pragma GCC unroll 8
      for (int i = 0; i < n_inputs; ++i) {
        float* const y = out + i * out_stride + tile;
        if (panel != 0) total[i] = _mm256_add_ps(total[i], _mm256_maskload_ps(y, mask));
        _mm256_maskstore_ps(y, mask, total[i]);
      }
    }
  }
}

}  // namespace

void q1_matmul_avx2(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end, float* out,
                    ptrdiff_t out_stride) {
  with_inputs(n_inputs, [&]<int n>() { run<1, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

void ternary_matmul_avx2(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                         float* out, ptrdiff_t out_stride) {
  with_inputs(n_inputs, [&]<int n>() { run<2, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

}  // namespace tqext::cpu

#endif
