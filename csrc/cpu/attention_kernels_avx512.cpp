// AVX-512 with VNNI, without VBMI (Cascade Lake on). Coded tokens are attended in integers, in four steps a block:
//   1. load_keys: 16 tokens' words, transposed, so that a lane is a token; nothing but codes left in every nibble
//   2. scores: nibble -> level + 128 by vpshufb, vpdpbusd with the query in bytes; no horizontal sum
//   3. softmax relative to the block's maximum; weight times scale as an integer in bytes, relative to the row's largest such
//      product in the block; the biases, moved to the middle of the codes' range, are one multiply-add per group
//   4. values: words of four tokens, transposed twice, so that a lane is one dimension of four tokens; vpdpbusd with the
//      weights; a code is masked where it stands, not shifted down, and counts from the middle of the range
// Values coded as keys differ in the last two steps: one norm a token instead of scales and biases, so all lanes share a
// weight, and nibble -> level + 128 by vpshufb as in step 2. Their 3-bit words are sorted so that word i of four units is one
// register, whose spare bits then make the fourth word; dims 32 and 64 fill it with the units of four and two quads of tokens.
// A query element and a weight are 2 bytes for fp16 and bf16 queries, 3 for fp32: errors to 4.6e-4 and 4.0e-6 of the largest
// output (tests/native/attention_kernels_check.cpp). A token of 4 rows, dims 128, 3-bit keys and 2-bit values: 98 bytes, 32 or
// 48 vpdpbusd (two a cycle at best) and about 35 other vector operations; 21 and 25 ns measured (Xeon 2.5 GHz, Cascade Lake,
// one thread, gcc 12), where the vpdpbusd alone take 8 and 12 ns at that machine's 4 per ns. A third of the time goes to
// unpacking (steps 1 and 4's transpositions), half to vpdpbusd. Up to 4 rows share a pass; more rows share step 1, the loads
// and, from kManyRows on, a block's levels as bytes: 7.0 ns for 4 rows of a prompt, where the vpdpbusd alone take 4.6 (Emerald
// Rapids, 2 bytes, Lloyd-Max values). Value dims that are not a power of two need one vpermd per vpdpbusd, since their slots
// cross the groups' borders (coded in groups). 3-bit Lloyd-Max values take 0.92 to 1.0 of the time of 2-bit groups, 4-bit ones
// 0.8 to 0.9 of that of 4-bit groups (dims 128, 4 rows, Sapphire Rapids). Residual signs (rare) go through the fp32 tile
// kernel, as exact tokens do.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of gcc 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "attention_kernels.h"
#include "softmax.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "exp2_polynomial.h"
#include "fp32_attention.h"
#include "integer_attention.h"
#include "mean_scores.h"
#include "x86_vectors.h"

namespace tqext::cpu {
namespace {

// Words of four rows to words of their column, in every 128-bit lane: r[i] word c = out[c] word i.
inline void transpose(const __m512i r[4], __m512i out[4]) {
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
  const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi64(a, b);
  out[1] = _mm512_unpackhi_epi64(a, b);
  out[2] = _mm512_unpacklo_epi64(c, d);
  out[3] = _mm512_unpackhi_epi64(c, d);
}

struct Avx512 : X86Vectors {
  using F = __m512;
  using I = __m512i;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 12;      // 24 sums, 2 vectors of the panel and a broadcast in 32 registers
  static constexpr int kPanelsOne = 4;  // 8 sums hide a latency of 4 at two multiply-adds a cycle
  static constexpr int kMeans = 4;

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
  // 2^x for x <= 0, relative error 1e-7; 0 below -100 (no subnormal numbers, which are slow), NaN stays.
  static F exp2(F x) {
    const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F y = exp2_polynomial<Avx512>(f);
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ), y, _mm512_sub_ps(x, f));
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
  static I shift_right_lanes(I x, I n) { return _mm512_srlv_epi32(x, n); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I load_table(const int8_t* levels) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }
  static I look_up(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  static constexpr int kPick = 16;
  // Two words, each in eight lanes.
  static I spread_words(const uint32_t& a, const uint32_t& b) {
    return _mm512_mask_set1_epi32(_mm512_set1_epi32(int(a)), 0xff00, int(b));
  }
  // Lane `index` of the table, of which the four lowest bits count.
  static F pick(F table, I index) { return _mm512_permutexvar_ps(index, table); }
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
    transpose(r, out);
  }
};

// ---------------------------------------------------------------- integer kernel

constexpr int kBlock = 128;         // tokens per update of the softmax state; 64 was 6 % slower, 96 no faster
constexpr int kQuads = kBlock / 4;  // a 32-bit lane of the value pass is one dimension of four tokens
constexpr int kManyRows = 9;        // from here on a block's levels are worth keeping as bytes

// acc += sum of four u8 * s8. As asm because gcc 12 copies every accumulator of the intrinsic.
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}

// Sum of pieces, most significant first, `step` registers apart.
template <int N>
inline __m512 join(const __m512i* piece, ptrdiff_t step) {
  const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(piece[(N - 2) * step], 8), piece[(N - 1) * step]);
  if constexpr (N == 2) return _mm512_cvtepi32_ps(low);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(piece[0]), _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low));
}

// Four words of 16 tokens: out[c] lane i = word c of token i. Only n_words are read; the other lanes are zero.
inline void load_4x16(const uint32_t* words, ptrdiff_t stride, int n_words, __m512i out[4]) {
  __m512i z[4];
  if (n_words >= 4) {
    for (int r = 0; r < 4; r++) {
      const uint32_t* x = words + r * stride;
      z[r] = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
      z[r] = _mm512_mask_broadcast_i32x4(z[r], 0x00f0, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 4 * stride)));
      z[r] = _mm512_mask_broadcast_i32x4(z[r], 0x0f00, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * stride)));
      z[r] = _mm512_mask_broadcast_i32x4(z[r], 0xf000, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 12 * stride)));
    }
  } else {
    const __mmask8 mask = __mmask8((1 << n_words) - 1);
    for (int r = 0; r < 4; r++) {
      const uint32_t* x = words + r * stride;
      z[r] = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(mask, x));
      z[r] = _mm512_mask_broadcast_i32x4(z[r], 0x00f0, _mm_maskz_loadu_epi32(mask, x + 4 * stride));
      z[r] = _mm512_mask_broadcast_i32x4(z[r], 0x0f00, _mm_maskz_loadu_epi32(mask, x + 8 * stride));
      z[r] = _mm512_mask_broadcast_i32x4(z[r], 0xf000, _mm_maskz_loadu_epi32(mask, x + 12 * stride));
    }
  }
  transpose(z, out);
}

// One call's state. N: bytes of a query element and of a weight.
template <int N, ValueCoding kCoding>
class IntegerAttention : OwnsArrays {
  static constexpr bool kLloyd = kCoding == kValueLloyd;

 public:
  IntegerAttention(const CodedHead& head, const CodecShape& shape, const QueryRows& rows)
      : head_(head),
        rows_(rows),
        key_dim_(shape.key_dim),
        value_dim_(shape.value_dim),
        key_bits_(shape.key_bits),
        value_bits_(shape.value_bits),
        key_words_(code_words(shape.key_dim, shape.key_bits)),
        value_words_(code_words(shape.value_dim, shape.value_bits)),
        n_units_(shape.value_dim <= 64 ? shape.value_dim / kUnit : 4),
        fold_(kLloyd && value_bits_ == 3 ? 4 / n_units_ : 1),
        n_chunks_(kLloyd && value_bits_ == 3 ? 4 * ((value_words_ + 11) / 12) : (value_words_ + 3) / 4),
        n_slots_(!kLloyd            ? 8 / value_bits_
                 : value_bits_ == 2 ? 4
                                    : 2),
        n_groups_(kLloyd ? 1 : shape.value_dim / kGroup),
        n_params_(value_params(shape.value_dim, kCoding)),
        straddle_(!kLloyd && (shape.value_dim & (shape.value_dim - 1)) != 0),
        n_patterns_(kLloyd || value_dim_ <= 128 ? 1 : value_dim_ / 128),
        out_size_(n_chunks_ * n_slots_ * 16),
        many_(rows.n_rows >= kManyRows),
        natural_(head.key_stride == key_words_ && head.value_stride == value_words_ && head.param_stride == n_params_) {
    Arrays::place(*this);
    const size_t n_rows = rows.n_rows;
    table_ = load_table(shape.codebook);
    if constexpr (kLloyd) set_value_tables(shape);
    for (int chunk = 0; chunk < n_chunks_ && !kLloyd; chunk++) {
      for (int slot = 0; slot < n_slots_; slot++) {
        for (int lane = 0; lane < 16; lane++) {
          const int d = dimension(chunk, slot, lane);
          group_of_[(chunk * n_slots_ + slot) * 16 + lane] = d < 0 ? 0 : d / kGroup;
        }
      }
    }
    for (int r = 0; r < rows.n_rows; r++) max_[r] = kNegInf;
    clear(out_, n_rows * out_size_);
    clear(sums_, n_rows * 16);
    if (!kLloyd) clear(bias_sums_, n_rows * n_groups_ * 16);
    for (int r = 0; r < rows.n_rows; r++) split_query(r);
  }

  void attend(int begin, int end) {
    const int last = last_attended(rows_);
    for (int t0 = begin; t0 < end && t0 < last; t0 += kBlock) {
      load_block(t0, smaller(kBlock, end - t0));
      ahead_ = t0 + kBlock < end && natural_;
      attend_sets(*this, rows_.n_rows);
    }
  }

  void finish(Partial* partials) const {
    const int n_rows = rows_.n_rows;
    for (int r = 0; r < n_rows && fold_ > 1; r++) {
      for (int d = 0; d < value_dim_; d++) partials[r].out[d] = 0;
    }
    for (int i = 0; i < out_size_ / 16; i++) {
      alignas(64) int32_t to[16];
      for (int lane = 0; lane < 16; lane++) to[lane] = dimension(i / n_slots_, i % n_slots_, lane);
      const __m512i index = _mm512_load_si512(to);
      const __mmask16 used = _mm512_cmpge_epi32_mask(index, _mm512_setzero_si512());
      for (int r = 0; r < n_rows; r++) {
        const float* from = out_ + size_t(r) * out_size_ + 16 * i;
        if (fold_ == 1) {
          _mm512_mask_i32scatter_ps(partials[r].out, used, index, _mm512_load_ps(from), 4);
        } else {  // several lanes of a dimension
          for (int lane = 0; lane < 16; lane++) partials[r].out[to[lane]] += from[lane];
        }
      }
    }
    for (int r = 0; r < n_rows; r++) {
      Partial& p = partials[r];
      p.max = max_[r];
      p.sum = _mm512_reduce_add_ps(_mm512_load_ps(sums_ + 16 * r));
      for (int g = 0; g < n_groups_ && !kLloyd; g++) {
        const float bias = _mm512_reduce_add_ps(_mm512_load_ps(bias_sums_ + (size_t(r) * n_groups_ + g) * 16));
        for (int d = 0; d < kGroup; d++) p.out[kGroup * g + d] += bias;
      }
      finish_row(p, nan_[r], value_dim_);
    }
  }

 private:
  template <class Attention>
  friend void attend_sets(Attention& attention, int n_rows);
  friend class Arrays;

  void place(Arrays& arrays) {
    const size_t n_rows = rows_.n_rows, n_sets = (n_rows + kSet - 1) / kSet;
    planes_ = arrays.take<uint32_t>(size_t(key_dim_ / 8) * kBlock);
    key_levels_ = many_ ? arrays.take<uint32_t>(size_t(key_dim_ / 4) * kBlock) : nullptr;
    value_levels_ = many_ ? arrays.take<uint8_t>(size_t(n_chunks_) * n_slots_ * kQuads * 64) : nullptr;
    norms_ = arrays.take<float>(kBlock);
    values_ = arrays.take<uint8_t>(size_t(n_chunks_) * kQuads * 64);
    scales_ = arrays.take<float>(size_t(n_groups_) * kBlock);
    biases_ = kLloyd ? nullptr : arrays.take<float>(size_t(n_groups_) * kBlock);
    largest_scales_ = arrays.take<float>(kBlock);
    scores_ = arrays.take<float>(kSet * kBlock);
    weights_ = arrays.take<int8_t>(kSet * N * row_weights());
    group_of_ = kLloyd ? nullptr : arrays.take<int32_t>(out_size_);
    query_ = arrays.take<int32_t>(n_sets * key_dim_ * N);
    tail_keys_ = arrays.take<uint32_t>(16 * size_t(key_words_));
    tail_values_ = arrays.take<uint32_t>(16 * size_t(value_words_));
    tail_params_ = kLloyd ? nullptr : arrays.take<uint32_t>(16 * size_t(n_groups_));
    out_ = arrays.take<float>(n_rows * out_size_);
    sums_ = arrays.take<float>(n_rows * 16);  // softmax weights, in lanes
    bias_sums_ = kLloyd ? nullptr : arrays.take<float>(n_rows * n_groups_ * 16);
    query_offset_ = arrays.take<int32_t>(n_rows * N);
    query_step_ = arrays.take<float>(n_rows);
    max_ = arrays.take<float>(n_rows);
    nan_ = arrays.take<bool>(n_rows);
  }

  static void clear(float* x, size_t n) {
    for (size_t i = 0; i < n; i += 16) _mm512_store_ps(x + i, _mm512_setzero_ps());
  }

  // Bytes of a row's weights, of each significance.
  size_t row_weights() const {
    if (kLloyd) return fold_ == 1 ? kBlock : kBlock / 4 / fold_ * 64;
    return size_t(kQuads) * (straddle_ ? 64 : 16 * n_patterns_);
  }

  // The codebook plus 128, as often as it fits.
  static __m512i load_table(const int8_t* levels) {
    alignas(16) uint8_t x[16];
    for (int i = 0; i < 16; i++) x[i] = uint8_t(levels[i] + 128);
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(x)));
  }

  // Dimension of a lane of out_, or -1: lanes that fill up the last chunk. out_: [chunk][slot][lane].
  int dimension(int chunk, int slot, int lane) const {
    const int byte = lane % 4, word = lane / 4;
    if (!kLloyd) {  // byte of word 4 * chunk + word
      const int w = 4 * chunk + word;
      return w < value_words_ ? value_words_ * (n_slots_ * byte + slot) + w : -1;
    }
    int unit = chunk, eight = word;  // of the unit's dimensions
    if (value_bits_ == 2) {
      unit = 2 * chunk + word / 2;
      eight = word % 2 + slot / 2 * 2;
    } else if (value_bits_ == 3) {
      unit = chunk / 4 * 4 + (word & (n_units_ - 1));  // one, two or four
      eight = chunk % 4;
    }
    return unit < value_dim_ / kUnit ? kUnit * unit + 8 * eight + 2 * byte + slot % 2 : -1;
  }

  // The row as integers in N bytes relative to its largest element, in the order of use: [word of codes][even, odd
  // nibbles][row of the set][piece]. A row that is not finite is marked: integers would lose it.
  void split_query(int r) {
    const int n_set = smaller(kSet, rows_.n_rows - r / kSet * kSet);
    int32_t* to = query_ + size_t(r / kSet) * kSet * key_dim_ / 4 * N + r % kSet * N;
    const float* q = rows_.q + size_t(r) * key_dim_;
    __m512 top = _mm512_setzero_ps(), check = _mm512_setzero_ps();
    for (int d = 0; d < key_dim_; d += 16) {
      const __mmask16 in = __mmask16(key_dim_ - d >= 16 ? 0xffff : (1 << (key_dim_ - d)) - 1);
      const __m512 x = _mm512_maskz_loadu_ps(in, q + d);
      top = _mm512_max_ps(top, _mm512_abs_ps(x));
      check = _mm512_fmadd_ps(x, _mm512_setzero_ps(), check);
    }
    nan_[r] = !(_mm512_reduce_add_ps(check) == 0);
    const float largest = nan_[r] ? 0.0f : _mm512_reduce_max_ps(top);
    const __m512 factor = _mm512_set1_ps(query_factor<N>(largest, query_step_[r]));
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    __m512i sums[N];
    for (int p = 0; p < N; p++) sums[p] = _mm512_setzero_si512();
    for (int d = 0; d < key_dim_; d += 16) {
      const __m512 x = nan_[r] ? _mm512_setzero_ps() : _mm512_loadu_ps(q + d);
      __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
      for (int p = N - 1; p >= 0; p--) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
        sums[p] = _mm512_add_epi32(sums[p], digit);
        alignas(16) int32_t dwords[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(dwords), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(digit), order));
        for (int i = 0; i < 4; i++) to[(d / 4 + i) * n_set * N + p] = dwords[i];
      }
    }
    for (int p = 0; p < N; p++)
      query_offset_[r * N + p] = -128 * _mm512_reduce_add_epi32(sums[p]);  // the table holds level + 128
  }

  // ---- lines asked for ahead: this block's values while it is scored, the next block's keys while values are summed

  struct Stream {
    const char* next;
    ptrdiff_t step;  // 64, or 0: nothing to ask for
  };

  Stream stream(const void* base, ptrdiff_t offset, ptrdiff_t size) const {
    if (!ahead_ || offset >= size) return {reinterpret_cast<const char*>(scores_), 0};
    return {static_cast<const char*>(base) + offset, 64};
  }
  Stream values_ahead(ptrdiff_t offset) const {
    const ptrdiff_t size = ptrdiff_t(kBlock) * value_words_ * 4;
    if (offset < size) return stream(head_.value_codes + block_ * head_.value_stride, offset, size);
    return stream(head_.value_params + block_ * head_.param_stride, offset - size, ptrdiff_t(kBlock) * n_params_ * 2);
  }
  Stream keys_ahead(ptrdiff_t offset) const {
    return stream(head_.key_codes + (block_ + kBlock) * head_.key_stride, offset, ptrdiff_t(kBlock) * key_words_ * 4);
  }

  // ---- one block of tokens, for all rows

  // Values and their parameters wait until the scores are there, to be in the cache once only.
  void load_block(int t0, int n) {
    block_ = t0;
    n_ = n;
    n_padded_ = round_up(n, 16);
    n_bad_keys_ = 0;
    values_loaded_ = false;
    const int whole = n / 16 * 16;
    if (whole < n) copy_tail(t0, whole, n);
    if (rows_.n_rows > kSet) {
      for (int t = 0; t < n_padded_; t += 16) load_keys(t, n, t);
    }
    if (many_) expand_keys();
    load_norms();
  }

  void load_block_values() {
    if (values_loaded_) return;
    values_loaded_ = true;
    load_value_codes();
    if (many_) expand_values();
  }

  // Levels + 128 of the block's keys: [word][even, odd nibbles][token], four dimensions a lane.
  void expand_keys() {
    const __m512i nibble = _mm512_set1_epi32(0x0f0f0f0f), table = table_;
    for (int j = 0; j < key_dim_ / 8; j++) {
      for (int t = 0; t < n_padded_; t += 16) {
        const __m512i x = _mm512_load_si512(planes_ + j * kBlock + t);
        uint32_t* to = key_levels_ + 2 * j * kBlock + t;
        _mm512_store_si512(to, _mm512_shuffle_epi8(table, _mm512_and_si512(x, nibble)));
        _mm512_store_si512(to + kBlock, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(x, 4), nibble)));
      }
    }
  }

  // What the value pass multiplies with weights: levels + 128, or codes where they stand. [chunk][slot][quad].
  void expand_values() {
    const int n_steps = n_padded_ / 4 / fold_;
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int c = 0; c < n_chunks_; c++) {
      const uint8_t* from = values_ + size_t(c) * kQuads * 64;
      for (int slot = 0; slot < n_slots_; slot++) {
        uint8_t* to = value_levels_ + size_t(c * n_slots_ + slot) * kQuads * 64;
        const __m512i mask = _mm512_set1_epi8(char(((1 << value_bits_) - 1) << (value_bits_ * slot)));
        for (int step = 0; step < n_steps; step++) {
          const __m512i x = _mm512_load_si512(from + step * 64);
          __m512i y;
          if constexpr (kLloyd) {
            y = _mm512_shuffle_epi8(value_tables_[slot / 2], _mm512_and_si512(slot % 2 ? _mm512_srli_epi32(x, 4) : x, nibble));
          } else {
            y = _mm512_and_si512(x, mask);
          }
          _mm512_store_si512(to + step * 64, y);
        }
      }
    }
  }

  void load_value_codes() {
    n_bad_ = 0;
    const int n = n_, whole = n / 16 * 16;
    const uint32_t* values = head_.value_codes + block_ * head_.value_stride;
    if constexpr (kLloyd) {
      load_value_norms();
      if (value_bits_ == 3) {
        for (int t = 0; t < n_padded_; t += 4 * fold_) {
          const bool in_tail = t >= whole;
          load_lloyd_3(in_tail ? tail_values_ + (t - whole) * value_words_ : values + t * head_.value_stride,
                       in_tail ? value_words_ : head_.value_stride, values_ + size_t(t / 4 / fold_) * 64);
        }
        return;
      }
    } else {
      for (int g = 0; g < n_groups_; g += 4) load_params(head_.value_params + block_ * head_.param_stride, g, whole, n);
    }
    for (int t = 0; t < whole; t += 4) load_values(values + t * head_.value_stride, head_.value_stride, t / 4);
    for (int t = whole; t < n_padded_; t += 4) load_values(tail_values_ + (t - whole) * value_words_, value_words_, t / 4);
  }

  // The last, incomplete 16 tokens, filled up with zeros.
  void copy_tail(int t0, int from, int n) {
    const uint32_t* keys = head_.key_codes + t0 * head_.key_stride;
    const uint32_t* values = head_.value_codes + t0 * head_.value_stride;
    const uint16_t* params = head_.value_params + t0 * head_.param_stride;
    for (int i = 0; i < 16; i++) {
      const int t = from + i;
      for (int w = 0; w < key_words_; w++) tail_keys_[i * key_words_ + w] = t < n ? keys[t * head_.key_stride + w] : 0;
      for (int w = 0; w < value_words_; w++)
        tail_values_[i * value_words_ + w] = t < n ? values[t * head_.value_stride + w] : 0;
      for (int g = 0; g < n_groups_ && !kLloyd; g++) {
        uint32_t x = 0;
        if (t < n) __builtin_memcpy(&x, params + t * head_.param_stride + 2 * g, 4);
        tail_params_[i * n_groups_ + g] = x;
      }
    }
  }

  // Three words of 3-bit codes to four planes; the fourth's bits are the tops of the nibbles.
  static void store_3_bit(__m512i w0, __m512i w1, __m512i w2, uint32_t* to, ptrdiff_t step = kBlock) {
    const __m512i code = _mm512_set1_epi32(0x77777777);
    const __m512i a = _mm512_srli_epi32(w0, 3), b = _mm512_srli_epi32(w1, 2), c = _mm512_srli_epi32(w2, 1);
    __m512i last = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x11111111), a, b, 0xca);  // bit 0 of a, else b
    last = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x44444444), c, last, 0xca);
    _mm512_store_si512(to, _mm512_and_si512(w0, code));
    _mm512_store_si512(to + step, _mm512_and_si512(w1, code));
    _mm512_store_si512(to + 2 * step, _mm512_and_si512(w2, code));
    _mm512_store_si512(to + 3 * step, _mm512_and_si512(last, code));
  }

  // Words of 16 tokens -> planes: plane 4u + i, lane t, nibble k = code of dimension 32u + 8i + k, no other bits.
  // Tokens t .. t + 15 of a block of n to lanes `at` on.
  void load_keys(int t, int n, int at) {
    const bool whole = t + 16 <= n;
    load_keys(whole ? head_.key_codes + (block_ + t) * head_.key_stride : tail_keys_, whole ? head_.key_stride : key_words_,
              at);
  }

  void load_keys(const uint32_t* keys, ptrdiff_t stride, int t) {
    if (key_bits_ == 3 && key_dim_ % 128 == 0) {
      uint32_t* to = planes_ + t;
      for (int w = 0; w < key_words_; w += 12, to += 16 * kBlock) {
        __m512i x[12];
        for (int i = 0; i < 3; i++) load_4x16(keys + w + 4 * i, stride, 4, x + 4 * i);
        for (int i = 0; i < 4; i++) store_3_bit(x[3 * i], x[3 * i + 1], x[3 * i + 2], to + 4 * i * kBlock);
      }
      return;
    }
    alignas(64) uint32_t words[kMaxDim / 8][16];
    for (int w = 0; w < key_words_; w += 4) {
      // The last load may overlap the one before, to stay within the token.
      const int from = w + 4 <= key_words_ || key_words_ < 4 ? w : key_words_ - 4;
      __m512i x[4];
      load_4x16(keys + from, stride, key_words_, x);
      for (int c = 0; c < 4; c++) _mm512_store_si512(words[from + c], x[c]);
    }
    uint32_t* to = planes_ + t;
    for (int unit = 0; unit < key_dim_ / kUnit; unit++, to += 4 * kBlock) {
      const uint32_t (*word)[16] = words + unit * key_bits_;
      if (key_bits_ == 3) {
        store_3_bit(_mm512_load_si512(word[0]), _mm512_load_si512(word[1]), _mm512_load_si512(word[2]), to);
      } else if (key_bits_ == 2) {
        const __m512i code = _mm512_set1_epi32(0x33333333);
        for (int i = 0; i < 2; i++) {
          _mm512_store_si512(to + i * kBlock, _mm512_and_si512(_mm512_load_si512(word[i]), code));
          _mm512_store_si512(to + (2 + i) * kBlock, _mm512_and_si512(_mm512_srli_epi32(_mm512_load_si512(word[i]), 2), code));
        }
      } else {
        for (int i = 0; i < 4; i++) _mm512_store_si512(to + i * kBlock, _mm512_load_si512(word[i]));
      }
    }
  }

  void load_norms() {
    n_bad_keys_ = load_halves(head_.key_norms + block_ * head_.norm_stride, head_.norm_stride, norms_, bad_keys_);
  }

  // The block's numbers as fp32; those that are not finite become zero, and their tokens' places are returned.
  int load_halves(const uint16_t* from, ptrdiff_t stride, float* to, int* places) const {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff), largest = _mm256_set1_epi16(0x7bff);
    int n_places = 0;
    for (int t = 0; t < n_padded_; t += 16) {
      __m256i half;
      if (stride == 1 && t + 16 <= n_) {
        half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + t));
      } else {
        alignas(32) uint16_t copy[16] = {};
        for (int i = 0; i < smaller(16, n_ - t); i++) copy[i] = from[(t + i) * stride];
        half = _mm256_load_si256(reinterpret_cast<const __m256i*>(copy));
      }
      const __mmask16 bad = _mm256_cmpgt_epi16_mask(_mm256_and_si256(half, magnitude), largest);
      if (__builtin_expect(bad != 0, 0)) {
        half = _mm256_maskz_mov_epi16(__mmask16(~bad), half);
        for (int i = 0; i < 16; i++) {
          if (bad >> i & 1) places[n_places++] = t + i;
        }
      }
      _mm512_store_ps(to + t, _mm512_cvtph_ps(half));
    }
    return n_places;
  }

  // Scales of groups g .. g + 3, and biases moved to the middle of the codes' range, from which `values` counts: a group's
  // values lie around zero, and their two sums would otherwise cancel each other to the last digits.
  void load_params(const uint16_t* params, int g, int whole, int n) {
    const int n_words = smaller(4, n_groups_ - g);
    const __m512i split = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m512i gather = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512 middle = _mm512_set1_ps(0.5f * float((1 << value_bits_) - 1)), zero = _mm512_setzero_ps();
    for (int t = 0; t < n_padded_; t += 16) {
      __m512i x[4];
      if (t < whole) {
        load_4x16(reinterpret_cast<const uint32_t*>(params + t * head_.param_stride + 2 * g), head_.param_stride / 2, n_words,
                  x);
      } else {
        load_4x16(tail_params_ + g, n_groups_, n_words, x);
      }
      __m512 largest = g ? _mm512_load_ps(largest_scales_ + t) : zero;
      for (int i = 0; i < n_words; i++) {
        const __m512i y = _mm512_permutexvar_epi64(gather, _mm512_shuffle_epi8(x[i], split));
        __m512 scale = _mm512_cvtph_ps(_mm512_castsi512_si256(y));
        __m512 bias = _mm512_fmadd_ps(scale, middle, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(y, 1)));
        // Infinite or NaN parameters leave infinity or NaN in the bias: 0 * x == 0 holds for all other numbers.
        const __mmask16 good = _mm512_cmp_ps_mask(_mm512_mul_ps(bias, zero), zero, _CMP_EQ_OQ);
        if (__builtin_expect(good != 0xffff, 0)) {
          scale = _mm512_maskz_mov_ps(good, scale);
          bias = _mm512_maskz_mov_ps(good, bias);
          for (int k = 0; k < 16 && t + k < n; k++) {
            if (!(good >> k & 1)) bad_[n_bad_++] = t + k;
          }
        }
        _mm512_store_ps(scales_ + (g + i) * kBlock + t, scale);
        _mm512_store_ps(biases_ + (g + i) * kBlock + t, bias);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(scale));
      }
      _mm512_store_ps(largest_scales_ + t, largest);
    }
  }

  // Words of four tokens -> chunks of four words: lane 4w + j = byte j of word w of the four tokens.
  void load_values(const uint32_t* x, ptrdiff_t stride, int quad) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    uint8_t* to = values_ + size_t(quad) * 64;
    if (stride == 8 && value_words_ == 8) {
      const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 16);
      const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
      _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_permutex2var_epi32(a, low, b), bytes));
      _mm512_store_si512(to + kQuads * 64, _mm512_shuffle_epi8(_mm512_permutex2var_epi32(a, high, b), bytes));
      return;
    }
    const __m512i words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int c = 0; c < n_chunks_; c++, x += 4, to += kQuads * 64) {
      const __mmask8 in = __mmask8(value_words_ - 4 * c >= 4 ? 15 : (1 << (value_words_ - 4 * c)) - 1);
      __m512i z = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(in, x));
      z = _mm512_mask_broadcast_i32x4(z, 0x00f0, _mm_maskz_loadu_epi32(in, x + stride));
      z = _mm512_mask_broadcast_i32x4(z, 0x0f00, _mm_maskz_loadu_epi32(in, x + 2 * stride));
      z = _mm512_mask_broadcast_i32x4(z, 0xf000, _mm_maskz_loadu_epi32(in, x + 3 * stride));
      _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, z), bytes));
    }
  }

  // ---- values coded as keys: a chunk is four words (3 bits: of four units, or of the same word of several quads' units) of
  // four tokens, its nibbles are indices of the table

  void load_value_norms() {
    n_bad_ = load_halves(head_.value_params + block_ * head_.param_stride, head_.param_stride, scales_, bad_);
    for (int t = 0; t < n_padded_; t += 16) {
      _mm512_store_ps(largest_scales_ + t, _mm512_abs_ps(_mm512_load_ps(scales_ + t)));
    }
  }

  void set_value_tables(const CodecShape& shape) {
    int8_t levels[2][16];
    for (int i = 0; i < 16; i++) {
      levels[0][i] = shape.value_codebook[value_bits_ == 2 ? i % 4 : i];
      levels[1][i] = shape.value_codebook[i / 4];
    }
    value_tables_[0] = load_table(levels[0]);
    value_tables_[1] = load_table(levels[1]);
    // Word w of four tokens' units: where load_lloyd_3 finds it in 48 words that follow each other, or in three runs of four
    // words of four tokens.
    whole_runs_ = n_units_ == 4 && value_dim_ != 128;
    for (int i = 0; i < 16; i++) {
      const int quad = i / 4 / n_units_, unit = i / 4 % n_units_, token = 4 * quad + i % 4;
      for (int w = 0; w < 3; w++) {
        const int word = 3 * unit + w;
        word_index_[w][i] = whole_runs_ ? 16 * (word / 4) + 4 * token + word % 4 : 3 * n_units_ * token + word;
      }
    }
  }

  // 3 bits: four tokens' units, up to four at a time; of fewer than three units, those of several quads, as if one token had
  // them. Plane i has dimensions 8i .. 8i + 7 of each, a lane is a byte of four tokens.
  void load_lloyd_3(const uint32_t* x, ptrdiff_t stride, uint8_t* to) const {
    if (whole_runs_) {
      for (int w = 0; w < value_words_; w += 12, to += 4 * kQuads * 64) {
        __m512i z[3];
        for (int i = 0; i < 3; i++) {
          const int n_words = value_words_ - w - 4 * i;
          const __mmask8 in = __mmask8(n_words >= 4 ? 15 : n_words > 0 ? (1 << n_words) - 1 : 0);
          const uint32_t* from = x + w + 4 * i;
          z[i] = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(in, from));
          z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x00f0, _mm_maskz_loadu_epi32(in, from + stride));
          z[i] = _mm512_mask_broadcast_i32x4(z[i], 0x0f00, _mm_maskz_loadu_epi32(in, from + 2 * stride));
          z[i] = _mm512_mask_broadcast_i32x4(z[i], 0xf000, _mm_maskz_loadu_epi32(in, from + 3 * stride));
        }
        store_lloyd_3(z, to);
      }
      return;
    }
    alignas(64) uint32_t copy[48];
    if (stride != value_words_) {
      for (int i = 0; i < 48; i++) copy[i] = x[i / value_words_ * stride + i % value_words_];
      x = copy;
    }
    const __m512i z[3] = {_mm512_loadu_si512(x), _mm512_loadu_si512(x + 16), _mm512_loadu_si512(x + 32)};
    store_lloyd_3(z, to);
  }

  void store_lloyd_3(const __m512i z[3], uint8_t* to) const {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i words[3];
    for (int w = 0; w < 3; w++) {
      const __m512i index = _mm512_load_si512(word_index_[w]);
      const __m512i y = _mm512_permutex2var_epi32(z[0], index, z[1]);
      const __mmask16 third = _mm512_cmpgt_epi32_mask(index, _mm512_set1_epi32(31));
      words[w] = _mm512_shuffle_epi8(_mm512_mask_permutexvar_epi32(y, third, index, z[2]), bytes);
    }
    store_3_bit(words[0], words[1], words[2], reinterpret_cast<uint32_t*>(to), kQuads * 16);
  }

  // ---- rows r .. r + H - 1 on the block

  // Not inlined: four rows in three bytes are 5 % slower with the caller's state.
  template <int H>
  __attribute__((noinline)) void attend_set(int r) {
    ahead_ &= r == 0;  // once a block
    StepOffset offsets[H];
    for (int h = 0; h < H; h++) offsets[h] = StepOffset(rows_, r + h, block_, n_);
    __m512 tops[H];
    if (many_) {
      scores<H, false, true>(r, offsets, tops);
    } else if (key_bits_ == 4) {
      scores<H, true, false>(r, offsets, tops);
    } else {
      scores<H, false, false>(r, offsets, tops);
    }
    alignas(64) float factors[16] = {};  // of the old state (0 ..) and of this block (8 ..)
    float reference[H];
    bool negligible = true;
    for (int h = 0; h < H; h++) {
      const float block_max = finish_scores(r + h, scores_ + h * kBlock, offsets[h], tops[h]);
      negligible &= raise_max(block_max, max_[r + h], factors[h], factors[8 + h]);
      reference[h] = block_max == kNegInf ? 0.0f : block_max;
    }
    if (negligible) return;
    _mm512_store_ps(factors, Avx512::exp2(_mm512_load_ps(factors)));
    load_block_values();
    float largest_product[H];
    for (int h = 0; h < H; h++) {
      float* s = scores_ + h * kBlock;
      const __m512 top = _mm512_set1_ps(reference[h]);
      __m512 sum = _mm512_setzero_ps(), largest = sum;
      for (int t = 0; t < n_padded_; t += 16) {
        const __m512 p = Avx512::exp2(_mm512_sub_ps(_mm512_load_ps(s + t), top));
        _mm512_store_ps(s + t, p);
        sum = _mm512_add_ps(sum, p);
        largest = _mm512_max_ps(largest, _mm512_mul_ps(p, _mm512_load_ps(largest_scales_ + t)));
      }
      largest_product[h] = _mm512_reduce_max_ps(largest);
      float* to = sums_ + 16 * (r + h);
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(factors[h]),
                                          _mm512_mul_ps(sum, _mm512_set1_ps(factors[8 + h]))));
    }
    for (int i = 0; i < n_bad_; i++) {
      for (int h = 0; h < H; h++) nan_[r + h] |= scores_[h * kBlock + bad_[i]] != 0;
    }
    if constexpr (kLloyd) {
      split_lloyd_weights<H>(largest_product);
      if (many_) {
        fold_ == 1 ? lloyd_values<H, false, true>(r, factors) : lloyd_values<H, true, true>(r, factors);
      } else {
        fold_ == 1 ? lloyd_values<H, false, false>(r, factors) : lloyd_values<H, true, false>(r, factors);
      }
    } else {
      add_biases<H>(r, factors);
      split_weights<H>(largest_product);
      if (many_) {
        value_bits_ == 2 ? values<H, 2, true>(r, factors) : values<H, 4, true>(r, factors);
      } else {
        value_bits_ == 2 ? values<H, 2, false>(r, factors) : values<H, 4, false>(r, factors);
      }
    }
  }

  // Integer dot products with the token as the lane, times norm; tokens beyond the block come out as the offset. tops: the
  // largest of each lane.
  template <int H, bool kFourBits, bool kMany>
  void scores(int r, const StepOffset* offsets, __m512* tops) {
    for (int h = 0; h < H; h++) tops[h] = _mm512_set1_ps(kNegInf);
    constexpr int V = H * N <= 3 ? 4 : 2;  // registers of 16 tokens at a time
    const int32_t* query = query_ + size_t(r / kSet) * kSet * key_dim_ / 4 * N;
    // One set of rows unpacks keys where it needs them, so that they stay in the first-level cache.
    const bool fused = rows_.n_rows <= kSet;
    const __m512i nibble = _mm512_set1_epi32(0x0f0f0f0f), table = table_;
    for (int t = 0; t < n_padded_; t += 16 * V) {
      [[maybe_unused]] Stream ahead = values_ahead(ptrdiff_t(t) * key_dim_ / 2);
      __m512i acc[H][N][V];
      for (int h = 0; h < H; h++) {
        for (int p = 0; p < N; p++) {
          for (int v = 0; v < V; v++) acc[h][p][v] = _mm512_set1_epi32(query_offset_[(r + h) * N + p]);
        }
      }
      if (fused) {
        for (int v = 0; v < V && t + 16 * v < n_padded_; v++) load_keys(t + 16 * v, n_, 16 * v);
      }
      const uint32_t* plane = kMany ? key_levels_ + t : planes_ + (fused ? 0 : t);
      const int32_t* q = query;
      for (int j = 0; j < key_dim_ / 8; j++, plane += kMany ? 2 * kBlock : kBlock, q += 2 * H * N) {
        if constexpr (!kMany) {
          for (int i = 0; i < V; i++, ahead.next += ahead.step) _mm_prefetch(ahead.next, _MM_HINT_T0);
        }
        __m512i low[V], high[V];
        for (int v = 0; v < V; v++) {
          if constexpr (kMany) {
            low[v] = _mm512_load_si512(plane + 16 * v);
            high[v] = _mm512_load_si512(plane + kBlock + 16 * v);
            continue;
          }
          const __m512i x = _mm512_load_si512(plane + 16 * v), y = _mm512_srli_epi32(x, 4);
          low[v] = _mm512_shuffle_epi8(table, kFourBits ? _mm512_and_si512(x, nibble) : x);
          high[v] = _mm512_shuffle_epi8(table, kFourBits ? _mm512_and_si512(y, nibble) : y);
        }
        for (int h = 0; h < H; h++) {
          for (int p = 0; p < N; p++) {
            const __m512i even = _mm512_set1_epi32(q[h * N + p]), odd = _mm512_set1_epi32(q[(H + h) * N + p]);
            for (int v = 0; v < V; v++) dot(acc[h][p][v], low[v], even);
            for (int v = 0; v < V; v++) dot(acc[h][p][v], high[v], odd);
          }
        }
      }
      for (int h = 0; h < H; h++) {
        const __m512 step = _mm512_set1_ps(query_step_[r + h]);
        for (int v = 0; v < V; v++) {
          // A register whose tokens are of two blocks is that of a call which ends with the first.
          const __m512 offset = _mm512_set1_ps(offsets[h].value[t + 16 * v >= offsets[h].cut]);
          const __m512 factor = _mm512_mul_ps(_mm512_load_ps(norms_ + t + 16 * v), step);
          const __m512 score = _mm512_fmadd_ps(join<N>(&acc[h][0][v], V), factor, offset);
          _mm512_store_ps(scores_ + h * kBlock + t + 16 * v, score);
          tops[h] = _mm512_max_ps(tops[h], score);
        }
      }
    }
  }

  // Applies what is particular to a row; returns the largest score.
  float finish_scores(int r, float* s, const StepOffset& offset, __m512 top) {
    const int limit = smaller(n_, rows_.end[r] - block_);
    const bool nothing = !rows_.bias && limit == kBlock && n_bad_keys_ == 0 && !offset.bad[0] && !offset.bad[1];
    if (nothing) return _mm512_reduce_max_ps(top);
    if (rows_.bias) {
      const float* bias = rows_.bias[r] + block_;
      for (int t = 0; t < limit; t += 16) {
        const __mmask16 in = __mmask16(limit - t >= 16 ? 0xffff : (1 << (limit - t)) - 1);
        const __m512 b = _mm512_maskz_loadu_ps(in, bias + t), x = _mm512_add_ps(_mm512_load_ps(s + t), b);
        _mm512_store_ps(s + t, x);
      }
    }
    for (int t = limit < 0 ? 0 : limit; t < n_padded_; t++) s[t] = kNegInf;
    for (int i = 0; i < n_bad_keys_; i++) nan_[r] |= s[bad_keys_[i]] != kNegInf;
    nan_[r] |= offset.lost(s, n_);
    top = _mm512_set1_ps(kNegInf);
    for (int t = 0; t < n_padded_; t += 16) top = _mm512_max_ps(top, _mm512_load_ps(s + t));
    return _mm512_reduce_max_ps(top);
  }

  template <int H>
  void add_biases(int r, const float* factors) {
    int g = 0;
    for (; g + 4 <= n_groups_; g += 4) add_biases<H, 4>(r, g, factors);
    for (; g < n_groups_; g++) add_biases<H, 1>(r, g, factors);
  }

  // Of groups g .. g + G - 1.
  template <int H, int G>
  void add_biases(int r, int g, const float* factors) {
    __m512 acc[H][G];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < G; i++) acc[h][i] = _mm512_setzero_ps();
    }
    for (int t = 0; t < n_padded_; t += 16) {
      __m512 b[G];
#pragma GCC unroll 4
      for (int i = 0; i < G; i++) b[i] = _mm512_load_ps(biases_ + (g + i) * kBlock + t);
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        const __m512 p = _mm512_load_ps(scores_ + h * kBlock + t);
#pragma GCC unroll 4
        for (int i = 0; i < G; i++) acc[h][i] = _mm512_fmadd_ps(b[i], p, acc[h][i]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
      float* to = bias_sums_ + (size_t(r + h) * n_groups_ + g) * 16;
#pragma GCC unroll 4
      for (int i = 0; i < G; i++) {
        const __m512 old = _mm512_mul_ps(_mm512_load_ps(to + 16 * i), _mm512_set1_ps(factors[h]));
        _mm512_store_ps(to + 16 * i, _mm512_fmadd_ps(acc[h][i], _mm512_set1_ps(factors[8 + h]), old));
      }
    }
  }

  // Weight times scale of four groups as integers relative to the row's largest such product in this block (the largest scale
  // alone may belong to a token that is hardly attended, and leave no bits to the others), in bytes:
  // [row][piece][quad][group][token of the quad].
  template <int H>
  void split_weights(const float* largest_product) {
    __m512 inverse[H];
    for (int h = 0; h < H; h++) {
      inverse[h] = _mm512_set1_ps(weight_factor<N>(largest_product[h], weight_step_[h]));
    }
    const int n_sets = straddle_ ? (n_groups_ + 3) / 4 : n_patterns_;
    const __m512 magic = _mm512_set1_ps(Pieces<N>::kMagic);
    const __m512i ones = _mm512_set1_epi8(1);
    for (int set = 0; set < n_sets; set++) {
      int group[4];
      for (int j = 0; j < 4; j++) {
        group[j] = straddle_           ? smaller(4 * set + j, n_groups_ - 1)
                   : value_dim_ >= 128 ? value_dim_ / 128 * j + set
                                       : j * value_dim_ / 128;
      }
      __m512i total[H][N];  // sums of the pieces' bytes, as they lie
      for (int h = 0; h < H; h++) {
        for (int i = 0; i < N; i++) total[h][i] = _mm512_setzero_si512();
      }
      for (int t = 0; t < n_padded_; t += 16) {
        __m512 factor[4];
        for (int j = 0; j < 4; j++) factor[j] = _mm512_load_ps(scales_ + group[j] * kBlock + t);
        for (int h = 0; h < H; h++) {
          const __m512 p = _mm512_mul_ps(_mm512_load_ps(scores_ + h * kBlock + t), inverse[h]);
          __m512i x[4], piece[N];
          for (int j = 0; j < 4; j++) x[j] = _mm512_castps_si512(_mm512_fmadd_ps(p, factor[j], magic));
          split_bytes(x, piece);
          for (int i = 0; i < N; i++) {
            dot(total[h][i], ones, piece[i]);
            if (straddle_) {
              int8_t* to = weights_ + ((h * N + i) * kQuads + t / 4) * 64 + 16 * set;
              _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(piece[i]));
              _mm_store_si128(reinterpret_cast<__m128i*>(to + 64), _mm512_extracti32x4_epi32(piece[i], 1));
              _mm_store_si128(reinterpret_cast<__m128i*>(to + 128), _mm512_extracti32x4_epi32(piece[i], 2));
              _mm_store_si128(reinterpret_cast<__m128i*>(to + 192), _mm512_extracti32x4_epi32(piece[i], 3));
            } else {
              _mm512_store_si512(weights_ + (((set * H + h) * N + i) * kQuads + t / 4) * 16, piece[i]);
            }
          }
        }
      }
      for (int h = 0; h < H; h++) {
        __m512i sum = total[h][0];
        for (int i = 1; i < N; i++) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), total[h][i]);
        set_middle(h, group, sum_lanes(sum));
      }
    }
  }

  // The sum of the four 128-bit lanes.
  static __m128i sum_lanes(__m512i x) {
    const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  }

  // Minus the sums of four groups' weights times the middle of the codes' range, (2^bits - 1) / 2: what the sums of the first
  // and the last piece start with. The half is left to `values`.
  void set_middle(int h, const int group[4], __m128i total) {
    const __m128i times = _mm_set1_epi32(1 - (1 << value_bits_));
    alignas(16) int32_t first[4], last[4];
    if constexpr (N == 3) {
      _mm_store_si128(reinterpret_cast<__m128i*>(first), _mm_mullo_epi32(times, _mm_srai_epi32(total, 17)));  // 2^16 / 2 a unit
      total = _mm_and_si128(total, _mm_set1_epi32(0x1ffff));
    }
    _mm_store_si128(reinterpret_cast<__m128i*>(last), _mm_mullo_epi32(times, total));
    for (int j = 0; j < 4; j++) {
      if constexpr (N == 3) middle_first_[h][group[j]] = first[j];
      middle_last_[h][group[j]] = last[j];
    }
  }

  // x[j]: 16 tokens' integers of group j, in the low bits. piece: most significant first, byte 4j + k of a 128-bit lane =
  // group j, token k of the lane's four.
  static void split_bytes(const __m512i x[4], __m512i piece[N]) {
    const __m512i flip = _mm512_set1_epi8(-128);
    if constexpr (N == 2) {
      const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
      __m512i a = _mm512_mask_mov_epi16(x[0], 0xaaaaaaaa, _mm512_slli_epi32(x[1], 16));
      __m512i b = _mm512_mask_mov_epi16(x[2], 0xaaaaaaaa, _mm512_slli_epi32(x[3], 16));
      a = _mm512_shuffle_epi8(a, order);
      b = _mm512_shuffle_epi8(b, order);
      piece[0] = _mm512_unpackhi_epi64(a, b);
      piece[1] = _mm512_xor_si512(_mm512_unpacklo_epi64(a, b), flip);
    } else {
      const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
      __m512i y[4], z[4];
      for (int j = 0; j < 4; j++) y[j] = _mm512_shuffle_epi8(x[j], order);
      transpose(y, z);
      piece[2] = _mm512_xor_si512(z[0], flip);
      piece[1] = _mm512_xor_si512(z[1], flip);
      piece[0] = _mm512_sub_epi8(z[2], _mm512_set1_epi8(64));  // the mantissa's own 2^22
    }
  }

  template <int H, int kBits, bool kMany>
  void values(int r, const float* factors) {
    for (int c = 0; c < n_chunks_; c++) {
      for (int slot = 0; slot < n_slots_; slot += 2) {
        if (straddle_) {
          values<H, kBits, kMany, kPermute>(r, factors, c, slot);
        } else if (pattern(c, slot) == pattern(c, slot + 1)) {
          values<H, kBits, kMany, kShared>(r, factors, c, slot);
        } else {
          values<H, kBits, kMany, kSeparate>(r, factors, c, slot);
        }
      }
    }
  }

  // Which run of four groups the four bytes of chunk c belong to at this slot.
  int pattern(int c, int slot) const { return value_dim_ < 128 ? 0 : (value_words_ * slot + 4 * c) / kGroup; }

  enum Weights { kShared, kSeparate, kPermute };

  // Sum over the block of weight * code for slots `slot` and `slot` + 1 of chunk c. A code is not shifted down: it counts
  // 2^(kBits * slot)-fold, which the last multiplication takes back.
  // Not inlined: with the caller's state gcc keeps the sums in memory.
  template <int H, int kBits, bool kMany, Weights kWeights>
  __attribute__((noinline)) void values(int r, const float* factors, int c, int slot) {
    const int element = (c * n_slots_ + slot) * 16;
    const __m512i group0 = _mm512_load_si512(group_of_ + element), group1 = _mm512_load_si512(group_of_ + element + 16);
    __m512i acc[2][H][N];
    // Unrolled early, or gcc keeps the sums in memory.
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
        for (int p = 1; p < N - 1; p++) acc[i][h][p] = _mm512_setzero_si512();
        const __m512i group = i ? group1 : group0;
        const __m512i last = _mm512_permutexvar_epi32(group, _mm512_load_si512(middle_last_[h]));
        acc[i][h][N - 1] = _mm512_srai_epi32(_mm512_slli_epi32(last, kBits * (slot + i)), 1);
        acc[i][h][0] = N == 2 ? _mm512_setzero_si512()
                              : _mm512_slli_epi32(_mm512_permutexvar_epi32(group, _mm512_load_si512(middle_first_[h])),
                                                  kBits * (slot + i));
      }
    }
    const int code = (1 << kBits) - 1;
    const __m512i mask0 = _mm512_set1_epi8(char(code << (kBits * slot))),
                  mask1 = _mm512_set1_epi8(char(code << (kBits * (slot + 1))));
    const uint8_t* codes =
        kMany ? value_levels_ + size_t(c * n_slots_ + slot) * kQuads * 64 : values_ + size_t(c) * kQuads * 64;
    const int8_t* weights0 = weights_ + (kWeights == kPermute ? 0 : pattern(c, slot) * H * N * kQuads * 16);
    const int8_t* weights1 = weights_ + (kWeights == kPermute ? 0 : pattern(c, slot + 1) * H * N * kQuads * 16);
    [[maybe_unused]] const Stream ahead = keys_ahead(ptrdiff_t(c * n_slots_ + slot) / 2 * kQuads * 64);
    for (int quad = 0; quad < n_padded_ / 4; quad++) {
      if constexpr (!kMany) _mm_prefetch(ahead.next + quad * ahead.step, _MM_HINT_T0);
      const __m512i y = _mm512_load_si512(codes + quad * 64);
      const __m512i c0 = kMany ? y : _mm512_and_si512(y, mask0);
      const __m512i c1 = kMany ? _mm512_load_si512(codes + (kQuads + quad) * 64) : _mm512_and_si512(y, mask1);
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
        for (int p = 0; p < N; p++) {
          if constexpr (kWeights == kPermute) {
            const __m512i w = _mm512_load_si512(weights0 + ((h * N + p) * kQuads + quad) * 64);
            dot(acc[0][h][p], c0, _mm512_permutexvar_epi32(group0, w));
            dot(acc[1][h][p], c1, _mm512_permutexvar_epi32(group1, w));
          } else {
            const __m512i w = _mm512_broadcast_i32x4(
                _mm_load_si128(reinterpret_cast<const __m128i*>(weights0 + ((h * N + p) * kQuads + quad) * 16)));
            dot(acc[0][h][p], c0, w);
            if constexpr (kWeights == kShared) {
              dot(acc[1][h][p], c1, w);
            } else {
              dot(acc[1][h][p], c1,
                  _mm512_broadcast_i32x4(
                      _mm_load_si128(reinterpret_cast<const __m128i*>(weights1 + ((h * N + p) * kQuads + quad) * 16))));
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const float unit = 1.0f / float(1 << (kBits * (slot + i)));
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        float* to = out_ + size_t(r + h) * out_size_ + element + 16 * i;
        const __m512 old = _mm512_mul_ps(_mm512_load_ps(to), _mm512_set1_ps(factors[h]));
        const __m512 factor = _mm512_set1_ps(weight_step_[h] * unit * factors[8 + h]);
        _mm512_store_ps(to, _mm512_fmadd_ps(join<N>(acc[i][h], 1), factor, old));
      }
    }
  }

  // Weight times norm as integers relative to the row's largest such product in this block, in bytes: [row][piece][token], or
  // as a chunk of several quads' words needs them.
  template <int H>
  void split_lloyd_weights(const float* largest_product) {
    const __m512 magic = _mm512_set1_ps(Pieces<N>::kMagic);
    const __m512i flip = _mm512_set1_epi8(-128);
    const __m512i spread = fold_ == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                      : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i by_token = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int h = 0; h < H; h++) {
      const __m512 inverse = _mm512_set1_ps(weight_factor<N>(largest_product[h], weight_step_[h]));
      __m512i total = _mm512_setzero_si512();
      int8_t* to = weights_ + h * N * row_weights();
      if (fold_ == 1) {
        for (int t = 0; t < n_padded_; t += 64) {
          __m512i x[4], piece[N];
          for (int j = 0; j < 4; j++) {
            x[j] = _mm512_setzero_si512();
            if (t + 16 * j >= n_padded_) continue;
            const __m512 p = _mm512_mul_ps(_mm512_load_ps(scores_ + h * kBlock + t + 16 * j), inverse);
            x[j] = _mm512_castps_si512(_mm512_fmadd_ps(p, _mm512_load_ps(scales_ + t + 16 * j), magic));
            total = _mm512_add_epi32(total, x[j]);
          }
          split_bytes(x, piece);
          for (int i = 0; i < N; i++) {
            _mm512_store_si512(to + i * row_weights() + t, _mm512_permutexvar_epi32(by_token, piece[i]));
          }
        }
      }
      for (int t = 0; t < n_padded_ && fold_ > 1; t += 16) {
        const __m512 p = _mm512_mul_ps(_mm512_load_ps(scores_ + h * kBlock + t), inverse);
        const __m512i x = _mm512_castps_si512(_mm512_fmadd_ps(p, _mm512_load_ps(scales_ + t), magic));
        total = _mm512_add_epi32(total, x);
        for (int i = 0; i < N; i++) {
          __m128i piece = _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8 * (N - 1 - i)));
          if (i > 0) piece = _mm_xor_si128(piece, _mm512_castsi512_si128(flip));
          if (N == 3 && i == 0) piece = _mm_sub_epi8(piece, _mm_set1_epi8(64));  // the mantissa's own 2^22
          int8_t* const at = to + i * row_weights();
          const __m512i quads = _mm512_castsi128_si512(piece);
          _mm512_store_si512(at + t / 4 / fold_ * 64, _mm512_permutexvar_epi32(spread, quads));
          if (fold_ == 2) {
            const __m512i next = _mm512_add_epi32(spread, _mm512_set1_epi32(2));
            _mm512_store_si512(at + (t / 8 + 1) * 64, _mm512_permutexvar_epi32(next, quads));
          }
        }
      }
      set_table_offset(h,
                       _mm512_sub_epi32(total, _mm512_set1_epi32(int32_t(uint32_t(n_padded_ / 16) * Pieces<N>::kMagicBits))));
    }
  }

  // The table holds level + 128: minus 128 times the sums of the weights of a lane's tokens, what the sums of the first and the
  // last piece start with. total: lane t % 16.
  void set_table_offset(int h, __m512i total) {
    total = _mm512_add_epi32(total, _mm512_shuffle_epi32(total, _MM_PERM_BADC));
    total = _mm512_add_epi32(total, _mm512_shuffle_epi32(total, _MM_PERM_CDAB));  // sums of quads: t / 4 % 4
    if (fold_ <= 2) total = _mm512_add_epi32(total, _mm512_shuffle_i32x4(total, total, _MM_PERM_BADC));
    if (fold_ == 1) total = _mm512_add_epi32(total, _mm512_shuffle_i32x4(total, total, _MM_PERM_CDAB));
    if (fold_ == 2) total = _mm512_shuffle_i32x4(total, total, _MM_PERM_BBAA);
    if constexpr (N == 3) {
      const __m512i first = _mm512_slli_epi32(_mm512_srai_epi32(total, 16), 7);
      _mm512_store_si512(middle_first_[h], _mm512_sub_epi32(_mm512_setzero_si512(), first));
      total = _mm512_and_si512(total, _mm512_set1_epi32(0xffff));
    }
    _mm512_store_si512(middle_last_[h], _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(total, 7)));
  }

  template <int H, bool kFolded, bool kMany>
  void lloyd_values(int r, const float* factors) {
    constexpr int kAtOnce = H * N <= 2 ? 4 : H * N <= 4 ? 2 : 1;  // chunks, for 12 to 24 sums: an instruction takes 5 cycles
    for (int half = 0; half < n_slots_ / 2; half++) {
      int c = 0;
      if (value_bits_ == 3) {
        for (; c + kAtOnce <= n_chunks_; c += kAtOnce) lloyd_values<H, kAtOnce, kFolded, false, kMany>(r, factors, c, half);
      } else {
        for (; c + kAtOnce <= n_chunks_; c += kAtOnce) lloyd_values<H, kAtOnce, false, true, kMany>(r, factors, c, half);
        for (; kAtOnce > 1 && c < n_chunks_; c++) lloyd_values<H, 1, false, true, kMany>(r, factors, c, half);
      }
    }
  }

  // Sum over the block of weight * level for the even and the odd nibbles of chunks c .. c + V - 1. kMasked: the nibbles hold
  // other bits. half: of 2 bits, the lower or the upper half of a nibble.
  template <int H, int V, bool kFolded, bool kMasked, bool kMany>
  __attribute__((noinline)) void lloyd_values(int r, const float* factors, int c, int half) {
    __m512i acc[V][2][H][N];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
          for (int p = 0; p < N; p++) {
            acc[v][i][h][p] = p == N - 1 ? _mm512_load_si512(middle_last_[h])
                              : p == 0   ? _mm512_load_si512(middle_first_[h])
                                         : _mm512_setzero_si512();
          }
        }
      }
    }
    const __m512i table = value_tables_[half], nibble = _mm512_set1_epi8(15);
    const ptrdiff_t chunk_size = kMany ? n_slots_ * kQuads * 64 : kQuads * 64;
    const uint8_t* codes = kMany ? value_levels_ + c * chunk_size + 2 * half * kQuads * 64 : values_ + c * chunk_size;
    const ptrdiff_t row_step = row_weights();
    const int8_t* weights = weights_;
    const int n_steps = kFolded ? n_padded_ / 4 / fold_ : n_padded_ / 4;
    [[maybe_unused]] const Stream ahead = keys_ahead(ptrdiff_t(c * n_slots_ / 2 + half) * kQuads * 64);
    for (int step = 0; step < n_steps; step++, codes += 64, weights += kFolded ? 64 : 4) {
      if constexpr (!kMany) _mm_prefetch(ahead.next + step * ahead.step, _MM_HINT_T0);
      __m512i x[V][2];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const __m512i y = _mm512_load_si512(codes + v * chunk_size), z = _mm512_srli_epi32(y, 4);
        if constexpr (kMany) {
          x[v][0] = y;
          x[v][1] = _mm512_load_si512(codes + v * chunk_size + kQuads * 64);
          continue;
        }
        x[v][0] = _mm512_shuffle_epi8(table, kMasked ? _mm512_and_si512(y, nibble) : y);
        x[v][1] = _mm512_shuffle_epi8(table, kMasked ? _mm512_and_si512(z, nibble) : z);
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
        for (int p = 0; p < N; p++) {
          const int8_t* from = weights + (h * N + p) * row_step;
          int32_t four;
          __builtin_memcpy(&four, from, 4);
          const __m512i w = kFolded ? _mm512_load_si512(from) : _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) {
            dot(acc[v][0][h][p], x[v][0], w);
            dot(acc[v][1][h][p], x[v][1], w);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
      const __m512 old = _mm512_set1_ps(factors[h]);
      const __m512 factor = _mm512_set1_ps(weight_step_[h] * factors[8 + h] * (1.0f / float(kCodebookTop)));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        float* to = out_ + size_t(r + h) * out_size_ + ((c + v) * n_slots_ + 2 * half) * 16;
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const __m512 kept = _mm512_mul_ps(_mm512_load_ps(to + 16 * i), old);
          _mm512_store_ps(to + 16 * i, _mm512_fmadd_ps(join<N>(acc[v][i][h], 1), factor, kept));
        }
      }
    }
  }

  static constexpr int kMaxBad = kBlock * (kMaxDim / kGroup);

  const CodedHead& head_;
  const QueryRows& rows_;
  const int key_dim_, value_dim_, key_bits_, value_bits_, key_words_, value_words_;
  const int n_units_;  // lloyd: that share a chunk
  const int fold_;     // lloyd: quads that share a chunk
  const int n_chunks_, n_slots_, n_groups_, n_params_;
  const bool straddle_;  // a run of words crosses the groups' borders, which then differ from word to word
  const int n_patterns_, out_size_;
  const bool many_;  // rows: levels of a block are kept as bytes
  int n_ = 0, n_padded_ = 0, n_bad_ = 0;
  int block_ = 0;               // its first token
  const bool natural_;          // tokens follow each other without a gap
  bool ahead_ = false;          // ask for lines ahead
  bool values_loaded_ = false;  // of this block
  float weight_step_[kSet] = {};
  alignas(64) int32_t middle_first_[kSet][16] = {}, middle_last_[kSet][16] = {};
  int n_bad_keys_ = 0, bad_keys_[kBlock];  // tokens of the block with a norm that is not finite, replaced by zero
  int bad_[kMaxBad];                       // the same of scales and biases
  __m512i table_;
  __m512i value_tables_[2];  // lloyd: of 2 bits, for the lower and the upper half of a nibble
  alignas(64) int32_t word_index_[3][16];
  bool whole_runs_ = false;
  uint32_t *planes_, *key_levels_, *tail_keys_, *tail_values_, *tail_params_;
  float *scales_, *biases_, *largest_scales_;  // [group][token of the block]; per token, of all groups
  float *norms_, *scores_, *out_, *bias_sums_, *sums_, *query_step_, *max_;
  uint8_t *values_, *value_levels_;
  int8_t* weights_;
  int32_t *group_of_, *query_, *query_offset_;
  bool* nan_;
};

}  // namespace

void attend_coded_avx512(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                         Partial* partials) {
  if (head.key_signs || (shape.value_coding == kValueGroups && head.param_stride % 2)) {
    Fp32Attention<Avx512>::attend_coded(head, shape, rows, begin, end, partials);
  } else {
    attend_in_integers<IntegerAttention>(head, shape, rows, begin, end, partials);
  }
}

void attend_exact_avx512(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials) {
  Fp32Attention<Avx512>::attend_exact(head, rows, begin, end, partials);
}

void score_means_avx512(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset) {
  MeanScores<Avx512>::score(q, n_rows, means, first, n, offset);
}

}  // namespace tqext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
