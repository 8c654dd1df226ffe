#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include <algorithm>

#include "q1_matmul_kernels.h"

#define TQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma")))
#define TQ_AVX512_INLINE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma"), always_inline)) inline

// A register of 16 floats is a table of the 16 signed sums of four inputs, and vpermps looks 16 rows up in it at
// once: lane = row, and the low four bits of a lane are the sign bits of its next four columns. One lookup and one
// addition serve 64 weights (a masked addition serves 16 and needs a mask register loaded for each).

namespace tqext::cpu {
namespace {

constexpr int kGroup = 128, kWords = kGroup / 32, kLookups = kGroup / 4;
constexpr int kTable = 16;        // floats
constexpr int kTile = 32;         // rows: two index registers share each table that is loaded
constexpr int kPanelTables = 32;  // inputs * groups whose tables are built at a time: 64 KiB of L2

// Word w of 16 rows, lane = row.
struct Words {
  __m512i word[kWords];
};

TQ_AVX512_INLINE __m512i load_quarter(const uint32_t* w, ptrdiff_t stride) {  // rows 0, 4, 8, 12: four words each
  const auto load = [](const uint32_t* p) __attribute__((target("avx2"), always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  };
  __m512i v = _mm512_castsi128_si512(load(w));
  v = _mm512_inserti32x4(v, load(w + 4 * stride), 1);
  v = _mm512_inserti32x4(v, load(w + 8 * stride), 2);
  return _mm512_inserti32x4(v, load(w + 12 * stride), 3);
}

TQ_AVX512_INLINE Words load_words(const uint32_t* w, ptrdiff_t stride) {
  const __m512i a = load_quarter(w, stride), b = load_quarter(w + stride, stride);
  const __m512i c = load_quarter(w + 2 * stride, stride), d = load_quarter(w + 3 * stride, stride);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), cd_low = _mm512_unpacklo_epi32(c, d);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
  return {{_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
           _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)}};
}

// out[g * out_stride + r] = scale of row r, group g; 16 rows, up to 16 groups.
TQ_AVX512_INLINE void transpose_scales(const uint16_t* scales, ptrdiff_t stride, int n_groups, float* out, int out_stride) {
  const __mmask16 mask = static_cast<__mmask16>((1u << n_groups) - 1);
  __m512 v[16], t[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) v[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + r * stride));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[4 * i + h]), b = _mm512_castps_pd(t[4 * i + 2 + h]);
      v[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // v[4i + j], 128-bit lane l: group 4l + j of rows 4i..4i+3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x44), low23 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xee), high23 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xee);
    t[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    t[8 + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 16
  for (int g = 0; g < 16; ++g)
    if (g < n_groups) _mm512_storeu_ps(out + g * out_stride, t[g]);
}

TQ_AVX512 void build_tables(const float* x, int n_lookups, float* table, ptrdiff_t step) {
  const __m512 minus = _mm512_set1_ps(-1), plus = _mm512_set1_ps(1);
  const __m512 sign0 = _mm512_mask_blend_ps(0xaaaa, minus, plus), sign1 = _mm512_mask_blend_ps(0xcccc, minus, plus);
  const __m512 sign2 = _mm512_mask_blend_ps(0xf0f0, minus, plus), sign3 = _mm512_mask_blend_ps(0xff00, minus, plus);
  for (int i = 0; i < n_lookups; ++i, x += 4, table += step) {
    const __m512 low = _mm512_fmadd_ps(sign1, _mm512_set1_ps(x[1]), _mm512_mul_ps(sign0, _mm512_set1_ps(x[0])));
    const __m512 high = _mm512_fmadd_ps(sign3, _mm512_set1_ps(x[3]), _mm512_mul_ps(sign2, _mm512_set1_ps(x[2])));
    _mm512_store_ps(table, _mm512_add_ps(low, high));
  }
}

// Adds one word (32 columns) of 32 rows.
template <int n_inputs, int n_chains>
TQ_AVX512_INLINE void add_word(__m512i index0, __m512i index1, const float* tables, __m512 (&acc)[2][n_inputs][n_chains]) {
#pragma GCC unroll 8
  for (int n = 0; n < 8; ++n) {
    const int c = n % n_chains;
#pragma GCC unroll 8
    for (int i = 0; i < n_inputs; ++i) {
      const __m512 table = _mm512_load_ps(tables + (n * n_inputs + i) * kTable);
      acc[0][i][c] = _mm512_add_ps(acc[0][i][c], _mm512_permutexvar_ps(index0, table));
      acc[1][i][c] = _mm512_add_ps(acc[1][i][c], _mm512_permutexvar_ps(index1, table));
      // gcc 12 otherwise gathers all lookups before the additions, and spills them.
      asm("" : "+v"(acc[0][i][c]), "+v"(acc[1][i][c]));
    }
    index0 = _mm512_srli_epi32(index0, 4);
    index1 = _mm512_srli_epi32(index1, 4);
  }
}

// One group of one tile, before the scale.
template <int n_inputs>
TQ_AVX512_INLINE void tile_group(const uint32_t* w, ptrdiff_t stride, const float* tables, __m512 (&sum)[2][n_inputs]) {
  constexpr int n_chains = n_inputs == 1 ? 2 : 1;  // hides the latency of the addition
  __m512 acc[2][n_inputs][n_chains];
#pragma GCC unroll 8
  for (int i = 0; i < n_inputs; ++i)
    for (int c = 0; c < n_chains; ++c) acc[0][i][c] = acc[1][i][c] = _mm512_setzero_ps();
  const Words low = load_words(w, stride), high = load_words(w + 16 * stride, stride);
  if constexpr (n_inputs <= 2) {
#pragma GCC unroll 4
    for (int k = 0; k < kWords; ++k) add_word(low.word[k], high.word[k], tables + k * 8 * n_inputs * kTable, acc);
  } else {
#pragma GCC unroll 1
    for (int k = 0; k < kWords; ++k) add_word(low.word[k], high.word[k], tables + k * 8 * n_inputs * kTable, acc);
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_inputs; ++i)
    for (int t = 0; t < 2; ++t) sum[t][i] = n_chains == 2 ? _mm512_add_ps(acc[t][i][0], acc[t][i][n_chains - 1]) : acc[t][i][0];
}

template <int n_inputs>
TQ_AVX512 void run(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int row_begin, int row_end, float* out,
                   ptrdiff_t out_stride) {
  constexpr int kPanelGroups = kPanelTables / n_inputs;
  // Alone, an input's tables stream from L2 and a tile runs through its whole panel; several inputs keep one group's
  // tables in L1 while many rows use them.
  constexpr int kTurn = n_inputs == 1 ? kTile : 256;
  constexpr int kGroupStep = n_inputs == 1 ? kPanelGroups : 1;
  alignas(64) float tables[kPanelGroups * kLookups * n_inputs * kTable];
  alignas(64) float scales[kPanelGroups * kTurn];
  uint32_t padded_weight[kTile * kPanelGroups * kWords];
  uint16_t padded_scales[kTile * kPanelGroups];

  for (int panel = 0; panel < m.n_groups; panel += kPanelGroups) {
    const int n_groups = std::min(kPanelGroups, m.n_groups - panel);
    for (int i = 0; i < n_inputs; ++i)
      build_tables(x + i * x_stride + panel * kGroup, n_groups * kLookups, tables + i * kTable, n_inputs * kTable);
    for (int turn = row_begin; turn < row_end; turn += kTurn) {
      const int turn_end = std::min(turn + kTurn, row_end);
      const int last_tile = turn + (turn_end - turn) / kTile * kTile;  // the one that is not full, if any
      if (last_tile < turn_end) {
        memset(padded_weight, 0, sizeof(padded_weight));
        memset(padded_scales, 0, sizeof(padded_scales));
        for (int r = last_tile; r < turn_end; ++r) {
          memcpy(padded_weight + (r - last_tile) * kPanelGroups * kWords, m.weight + r * m.weight_stride + panel * kWords,
                 n_groups * kWords * sizeof(uint32_t));
          memcpy(padded_scales + (r - last_tile) * kPanelGroups, m.scales + r * m.scale_stride + panel,
                 n_groups * sizeof(uint16_t));
        }
      }
      for (int tile = turn; tile < turn_end; tile += kTile)
        for (int half = 0; half < kTile; half += 16)
          for (int g = 0; g < n_groups; g += 16) {
            const bool full = tile < last_tile;
            const uint16_t* from =
                full ? m.scales + (tile + half) * m.scale_stride + panel + g : padded_scales + half * kPanelGroups + g;
            transpose_scales(from, full ? m.scale_stride : kPanelGroups, std::min(16, n_groups - g),
                             scales + g * kTurn + tile - turn + half, kTurn);
          }
      for (int g_begin = 0; g_begin < n_groups; g_begin += kGroupStep) {
        const int g_end = std::min(g_begin + kGroupStep, n_groups);
        for (int tile = turn; tile < turn_end; tile += kTile) {
          const bool full = tile < last_tile;
          const ptrdiff_t stride = full ? m.weight_stride : kPanelGroups * kWords;
          const uint32_t* weight = full ? m.weight + tile * stride + panel * kWords : padded_weight;
          __m512 acc[2][n_inputs];
#pragma GCC unroll 8
          for (int i = 0; i < n_inputs; ++i) acc[0][i] = acc[1][i] = _mm512_setzero_ps();
          for (int g = g_begin; g < g_end; ++g) {
            // The next tile's rows one after the other, as they lie in memory: line by line over all rows was 17 % slower
            // (matrices beyond the last-level cache, Cascade Lake).
            if (n_inputs == 1 && full) {
              const int n_ahead = (kTile + n_groups - 1) / n_groups;
              for (int r = g * n_ahead; r < std::min(kTile, (g + 1) * n_ahead); ++r)
                for (int word = 0; word < n_groups * kWords; word += 16)
                  _mm_prefetch(reinterpret_cast<const char*>(weight + (kTile + r) * stride + word), _MM_HINT_T1);
            }
            __m512 sum[2][n_inputs];
            tile_group<n_inputs>(weight + g * kWords, stride, tables + g * kLookups * n_inputs * kTable, sum);
            const float* const scale = scales + g * kTurn + tile - turn;
            const __m512 scale0 = _mm512_load_ps(scale), scale1 = _mm512_load_ps(scale + 16);
#pragma GCC unroll 8
            for (int i = 0; i < n_inputs; ++i) {
              acc[0][i] = _mm512_fmadd_ps(scale0, sum[0][i], acc[0][i]);
              acc[1][i] = _mm512_fmadd_ps(scale1, sum[1][i], acc[1][i]);
            }
          }
          const int n_rows = std::min(kTile, turn_end - tile);
          const __mmask16 mask0 = static_cast<__mmask16>(n_rows >= 16 ? 0xffff : (1 << n_rows) - 1);
          const __mmask16 mask1 = static_cast<__mmask16>(n_rows >= 16 ? (1 << (n_rows - 16)) - 1 : 0);
          const bool first = panel == 0 && g_begin == 0;
#pragma GCC unroll 8
          for (int i = 0; i < n_inputs; ++i) {
            float* const y = out + i * out_stride + tile;
            if (!first) {
              acc[0][i] = _mm512_add_ps(acc[0][i], _mm512_maskz_loadu_ps(mask0, y));
              acc[1][i] = _mm512_add_ps(acc[1][i], _mm512_maskz_loadu_ps(mask1, y + 16));
            }
            _mm512_mask_storeu_ps(y, mask0, acc[0][i]);
            _mm512_mask_storeu_ps(y + 16, mask1, acc[1][i]);
          }
        }
      }
    }
  }
}

}  // namespace

void q1_matmul_avx512(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                      float* out, ptrdiff_t out_stride) {
  switch (n_inputs) {
    case 1:
      return run<1>(m, x, x_stride, row_begin, row_end, out, out_stride);
    case 2:
      return run<2>(m, x, x_stride, row_begin, row_end, out, out_stride);
    case 3:
      return run<3>(m, x, x_stride, row_begin, row_end, out, out_stride);
    case 4:
      return run<4>(m, x, x_stride, row_begin, row_end, out, out_stride);
    case 5:
      return run<5>(m, x, x_stride, row_begin, row_end, out, out_stride);
    case 6:
      return run<6>(m, x, x_stride, row_begin, row_end, out, out_stride);
    case 7:
      return run<7>(m, x, x_stride, row_begin, row_end, out, out_stride);
    default:
      return run<8>(m, x, x_stride, row_begin, row_end, out, out_stride);
  }
}

}  // namespace tqext::cpu

#endif
