#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "arrays.h"
#include "q1_matmul_kernels.h"

#define TQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma")))
#define TQ_AVX512_LAMBDA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma"), always_inline))
#define TQ_AVX512_INLINE TQ_AVX512_LAMBDA inline

// A register of 16 floats is a table of the 16 signed sums of four inputs, and vpermps looks 16 rows up in it at
// once: lane = row, and the low four bits of a lane are the sign bits of its next four columns. One lookup and one
// addition serve 64 weights (a masked addition serves 16 and needs a mask register loaded for each). Of codes with two bits
// the four bits are two columns: twice the lookups for twice the bytes.
//
// One row of x: 16 rows of 128 columns are 288 bytes, 32 lookups, 32 additions, 28 shifts and 20 shuffles, on two ports
// 21 ns at 2.7 GHz; with the lines moved from memory and L2 it takes 41 ns, where the machine reads as many bytes in
// 26 ns on one thread (Cascade Lake). Tried and not faster: five columns a lookup (vpermt2ps), unaligned loads in place
// of shifts, tables held in L1, a word transposed between the lookups of another. vpdpbusd on activations in three
// bytes needs five operations for 64 weights instead of three.

namespace tqext::cpu {
namespace {

constexpr int kGroup = 128, kQuad = 4;  // columns, words that are transposed together by load_words
constexpr int kTable = 16;              // floats
constexpr int kTile = 32;               // rows: two index registers share each table that is loaded
constexpr int kPanelTables = 32;        // inputs * groups of bits whose tables are built at a time: 64 KiB of L2

// Word w of 16 rows, lane = row.
struct Words {
  __m512i word[kQuad];
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

// out[c]: 32-bit word c of 16 rows that are `stride` bytes apart, lane = row; load(p) reads a row.
template <class Load>
TQ_AVX512_INLINE void transpose(const void* rows, ptrdiff_t stride, const Load& load, __m512i (&out)[16]) {
  __m512i v[16], t[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) v[r] = load(static_cast<const char*>(rows) + r * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      v[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
      v[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
    }
  // v[4i + j], 128-bit lane l: word 4l + j of rows 4i..4i+3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44), low23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee), high23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
    out[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    out[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    out[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    out[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// Scales of 16 rows and two groups: [group % 2][row], fp16.
using ScalePair = uint16_t[2][16];

// out[g / 2 * out_stride][g % 2][r] = scale of row r, group g; 16 rows, up to 32 groups.
TQ_AVX512 void transpose_scales(const uint16_t* scales, ptrdiff_t stride, int n_groups, ScalePair* out, int out_stride) {
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n_groups) - 1);
  const __m512i even_odd = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                            30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  __m512i v[16];
  transpose(scales, stride * 2, [&](const void* p) TQ_AVX512_LAMBDA { return _mm512_maskz_loadu_epi16(mask, p); }, v);
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c)
    if (2 * c < n_groups) _mm512_store_si512(out[c * out_stride], _mm512_permutexvar_epi16(even_odd, v[c]));
}

TQ_AVX512_INLINE __m512 load_scales(const ScalePair& pair, int group) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(pair[group % 2])));
}

template <int kBits>
TQ_AVX512 void build_tables(const float* x, int n_lookups, float* table, ptrdiff_t step) {
  if constexpr (kBits == 2) {
    const __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), one = _mm512_set1_epi32(1);
    const __m512 factor0 = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(index, _mm512_set1_epi32(3)), one));
    const __m512 factor1 = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(index, 2), one));
    for (int i = 0; i < n_lookups; ++i, x += 2, table += step)
      _mm512_store_ps(table, _mm512_fmadd_ps(factor1, _mm512_set1_ps(x[1]), _mm512_mul_ps(factor0, _mm512_set1_ps(x[0]))));
    return;
  }
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
template <int kWords, int n_inputs>
TQ_AVX512_INLINE void tile_group(const uint32_t* w, ptrdiff_t stride, const float* tables, __m512 (&sum)[2][n_inputs]) {
  constexpr int n_chains = n_inputs == 1 ? 2 : 1;  // hides the latency of the addition
  __m512 acc[2][n_inputs][n_chains];
#pragma GCC unroll 8
  for (int i = 0; i < n_inputs; ++i)
    for (int c = 0; c < n_chains; ++c) acc[0][i][c] = acc[1][i][c] = _mm512_setzero_ps();
#pragma GCC unroll 1
  for (int quad = 0; quad < kWords; quad += kQuad, w += kQuad) {
    const Words low = load_words(w, stride), high = load_words(w + 16 * stride, stride);
    if constexpr (n_inputs <= 2) {
#pragma GCC unroll 4
      for (int k = 0; k < kQuad; ++k, tables += 8 * n_inputs * kTable) add_word(low.word[k], high.word[k], tables, acc);
    } else {
#pragma GCC unroll 1
      for (int k = 0; k < kQuad; ++k, tables += 8 * n_inputs * kTable) add_word(low.word[k], high.word[k], tables, acc);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < n_inputs; ++i)
    for (int t = 0; t < 2; ++t) sum[t][i] = n_chains == 2 ? _mm512_add_ps(acc[t][i][0], acc[t][i][n_chains - 1]) : acc[t][i][0];
}

template <int kBits, int n_inputs>
TQ_AVX512 void run(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int row_begin, int row_end, float* out,
                   ptrdiff_t out_stride) {
  constexpr int kWords = kGroup * kBits / 32, kLookups = 8 * kWords;
  constexpr int kPanelGroups = std::max(kPanelTables / (n_inputs * kBits), 1);
  constexpr int kTurn = 256;  // rows that use a group's tables while these are in L1
  alignas(64) float tables[kPanelGroups * kLookups * n_inputs * kTable];
  alignas(64) ScalePair scales[(kPanelGroups + 1) / 2][kTurn / 16];
  uint32_t padded_weight[kTile * kPanelGroups * kWords];
  uint16_t padded_scales[kTile * kPanelGroups];

  for (int panel = 0; panel < m.n_groups; panel += kPanelGroups) {
    const int n_groups = std::min(kPanelGroups, m.n_groups - panel);
    for (int i = 0; i < n_inputs; ++i)
      build_tables<kBits>(x + i * x_stride + panel * kGroup, n_groups * kLookups, tables + i * kTable, n_inputs * kTable);
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
          for (int g = 0; g < n_groups; g += 32) {
            const bool full = tile < last_tile;
            const uint16_t* from =
                full ? m.scales + (tile + half) * m.scale_stride + panel + g : padded_scales + half * kPanelGroups + g;
            transpose_scales(from, full ? m.scale_stride : kPanelGroups, std::min(32, n_groups - g),
                             &scales[g / 2][(tile - turn + half) / 16], kTurn / 16);
          }
      for (int g = 0; g < n_groups; ++g) {
        for (int tile = turn; tile < turn_end; tile += kTile) {
          const bool full = tile < last_tile;
          const ptrdiff_t stride = full ? m.weight_stride : kPanelGroups * kWords;
          const uint32_t* weight = full ? m.weight + tile * stride + panel * kWords : padded_weight;
          __m512 acc[2][n_inputs];
          tile_group<kWords, n_inputs>(weight + g * kWords, stride, tables + g * kLookups * n_inputs * kTable, acc);
          const ScalePair* const scale = scales[g / 2] + (tile - turn) / 16;
          const __m512 scale0 = load_scales(scale[0], g), scale1 = load_scales(scale[1], g);
#pragma GCC unroll 8
          for (int i = 0; i < n_inputs; ++i) {
            acc[0][i] = _mm512_mul_ps(scale0, acc[0][i]);
            acc[1][i] = _mm512_mul_ps(scale1, acc[1][i]);
          }
          const int n_rows = std::min(kTile, turn_end - tile);
          const __mmask16 mask0 = static_cast<__mmask16>(n_rows >= 16 ? 0xffff : (1 << n_rows) - 1);
          const __mmask16 mask1 = static_cast<__mmask16>(n_rows >= 16 ? (1 << (n_rows - 16)) - 1 : 0);
          const bool first = panel == 0 && g == 0;
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

constexpr int kTallTile = 64;    // rows that share each table that is loaded
constexpr int kTallTables = 96;  // groups of bits whose tables are built at a time: 192 KiB of L2
constexpr int kLineWords = 16;   // of a row in a cache line

// Reads ahead, line by line and row after row as they lie in memory; line by line over all rows was 17 % slower, two
// groups' lines at once 18 % (matrices beyond the last-level cache, Cascade Lake).
template <int kGroupBytes>  // of a row
struct Ahead {
  const char* row;
  ptrdiff_t at = 0, width, stride;  // bytes

  Ahead(const void* rows, int n_groups, ptrdiff_t stride)
      : row(static_cast<const char*>(rows) + kTallTile * stride), width(n_groups * kGroupBytes), stride(stride) {}

  void fetch() {  // a tile's share of a group
    constexpr int kLines = kTallTile * kGroupBytes / 64;
    if (stride == width) {
#pragma GCC unroll 1  // sixteen back to back were 7 % slower
      for (int i = 0; i < kLines; ++i) _mm_prefetch(row + 64 * i, _MM_HINT_T1);
      row += 64 * kLines;
    } else {  // two lines more: rows do not start or end with a line
      for (int i = 0; i < kLines + 2; ++i) {
        _mm_prefetch(row + at, _MM_HINT_T1);
        if ((at += 64) >= width) at = 0, row += stride;
      }
    }
  }
};

// Up to 16 words of 16 rows, to[c]: word c. A function of its own: with the lookups it would not fit the cache of
// decoded instructions (inline it was 2 % slower).
TQ_AVX512 __attribute__((noinline)) void stage_line(const uint32_t* weight, ptrdiff_t stride, int n_words,
                                                    uint32_t (*to)[kTallTile]) {
  __m512i v[16];
  if (n_words >= 16) {
    transpose(weight, stride * 4, [&](const void* p) TQ_AVX512_LAMBDA { return _mm512_loadu_si512(p); }, v);
  } else {
    const __mmask16 mask = static_cast<__mmask16>((1 << n_words) - 1);
    transpose(weight, stride * 4, [&](const void* p) TQ_AVX512_LAMBDA { return _mm512_maskz_loadu_epi32(mask, p); }, v);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) _mm512_store_si512(to[c], v[c]);
}

struct Tables : OwnsArrays {
  explicit Tables(size_t n_floats) : n_floats(n_floats) { Arrays::place(*this); }
  void place(Arrays& arrays) { tables = arrays.take<float>(n_floats); }

  size_t n_floats;
  float* tables = nullptr;
};

// One row of x, kTallTile rows of the weight or more.
template <int kBits>
TQ_AVX512 void run_one(const Q1Matrix& m, const float* x, int row_begin, int row_end, float* out) {
  constexpr int kWords = kGroup * kBits / 32, kLookups = 8 * kWords, kTallGroups = kTallTables / kBits;
  constexpr int kParts = kTallTile / 16, kLineGroups = kLineWords / kWords;
  const Tables memory(kTallGroups * kLookups * kTable);
  float* const tables = memory.tables;
  alignas(64) uint32_t words[2][kLineWords][kTallTile];  // of the line in use, and of the next
  alignas(64) ScalePair scales[16][kParts];
  for (int panel = 0; panel < m.n_groups; panel += kTallGroups) {
    const int n_groups = std::min(kTallGroups, m.n_groups - panel);
    build_tables<kBits>(x + panel * kGroup, n_groups * kLookups, tables, kTable);
    Ahead<kWords * 4> weight_ahead(m.weight + row_begin * m.weight_stride + panel * kWords, n_groups, m.weight_stride * 4);
    Ahead<2> scales_ahead(m.scales + row_begin * m.scale_stride + panel, n_groups, m.scale_stride * 2);
    for (int done = row_begin; done < row_end; done += kTallTile) {
      const int tile = std::min(done, row_end - kTallTile);  // the last one may repeat rows
      const uint32_t* const weight = m.weight + tile * m.weight_stride + panel * kWords;
      const uint16_t* const scale = m.scales + tile * m.scale_stride + panel;
      const auto stage = [&](int g, int part) TQ_AVX512_LAMBDA {
        stage_line(weight + 16 * part * m.weight_stride + g * kWords, m.weight_stride, (n_groups - g) * kWords,
                   reinterpret_cast<uint32_t (*)[kTallTile]>(words[g / kLineGroups % 2][0] + 16 * part));
      };
      __m512 total[kParts];
#pragma GCC unroll 4
      for (int t = 0; t < kParts; ++t) total[t] = _mm512_setzero_ps();
      for (int t = 0; t < kParts; ++t) stage(0, t);
      for (int g = 0; g < n_groups; ++g) {
        if (g % 32 == 0)
          for (int t = 0; t < kParts; ++t)
            transpose_scales(scale + 16 * t * m.scale_stride + g, m.scale_stride, std::min(32, n_groups - g), &scales[0][t],
                             kParts);
        if (const int next = (g / kLineGroups + 1) * kLineGroups; next < n_groups)
          for (int t = g % kLineGroups; t < kParts; t += kLineGroups) stage(next, t);
        weight_ahead.fetch();
        scales_ahead.fetch();
        const float* table = tables + g * kLookups * kTable;
        __m512 acc[kParts];
#pragma GCC unroll 4
        for (int t = 0; t < kParts; ++t) acc[t] = _mm512_setzero_ps();
#pragma GCC unroll 1
        for (int k = 0; k < kWords; ++k) {
          const uint32_t* const word = words[g / kLineGroups % 2][g % kLineGroups * kWords + k];
          __m512i index[kParts];
#pragma GCC unroll 4
          for (int t = 0; t < kParts; ++t) index[t] = _mm512_load_si512(word + 16 * t);
#pragma GCC unroll 8
          for (int n = 0; n < 8; ++n, table += kTable) {
            const __m512 sums = _mm512_load_ps(table);
#pragma GCC unroll 4
            for (int t = 0; t < kParts; ++t) {
              acc[t] = _mm512_add_ps(acc[t], _mm512_permutexvar_ps(index[t], sums));
              if (n < 7) index[t] = _mm512_srli_epi32(index[t], 4);
              asm("" : "+v"(acc[t]));  // keeps gcc 12 from gathering the lookups, as in add_word
            }
          }
        }
#pragma GCC unroll 4
        for (int t = 0; t < kParts; ++t) total[t] = _mm512_fmadd_ps(load_scales(scales[g % 32 / 2][t], g), acc[t], total[t]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kParts; ++t) {
        const __mmask16 fresh = static_cast<__mmask16>(0xffffu << std::clamp(done - tile - 16 * t, 0, 16));
        float* const y = out + tile + 16 * t;
        if (panel > 0) total[t] = _mm512_add_ps(total[t], _mm512_maskz_loadu_ps(fresh, y));
        _mm512_mask_storeu_ps(y, fresh, total[t]);
      }
    }
  }
}

}  // namespace

void q1_matmul_avx512(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                      float* out, ptrdiff_t out_stride) {
  if (n_inputs == 1 && row_end - row_begin >= kTallTile) return run_one<1>(m, x, row_begin, row_end, out);
  with_inputs(n_inputs, [&]<int n>() { run<1, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

void ternary_matmul_avx512(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                           float* out, ptrdiff_t out_stride) {
  if (n_inputs == 1 && row_end - row_begin >= kTallTile) return run_one<2>(m, x, row_begin, row_end, out);
  with_inputs(n_inputs, [&]<int n>() { run<2, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

}  // namespace tqext::cpu

#endif
