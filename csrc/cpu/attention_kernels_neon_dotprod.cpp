// NEON with the dot-product instructions (FEAT_DotProd, Armv8.2): coded tokens in integers, in four steps a block:
//   1. keys: words of up to four units, de-interleaved, so that a lane is a unit; nibble -> level by tbl, whose table repeats
//      where a nibble has bits to spare; the levels of a token are a run of bytes in the order of its codes
//   2. scores: sdot of four tokens and two rows with the query's bytes in that order; a lane sums a part of the dimensions, and
//      pairwise additions turn four tokens into the lanes
//   3. softmax relative to the block's maximum; weight times scale as an integer in bytes, relative to the row's largest such
//      product in the block; the biases, moved to the middle of the codes' range, are one multiply-add per group
//   4. values: words of four tokens, zipped, so that a lane is one byte of four tokens; sdot with the weights of the lanes'
//      groups; a code is masked where it stands, not shifted down, and counts from the middle of the range
// Values coded as keys differ in the last two steps: one norm a token instead of scales and biases, so all lanes share a
// weight, and nibble -> level by tbl as in step 1. A query element and a weight are 2 bytes for fp16 and bf16 queries, 3 for
// fp32: errors to 2.2e-4 and 2.7e-6 of the largest output (tests/native/attention_kernels_check.cpp). Instructions a token,
// executed under qemu (gcc 12, dims 128, 3-bit keys, 2-bit values; with them the cycles of their basic blocks by llvm-mca 19):
//                             sdot  other vector  load, store  scalar  neoverse-n1  apple-m1
//   4 rows, 2 bytes            128           117          124     120          176       134
//   4 rows, 3 bytes            192           136          152     122          220       164
//   4 rows, fp32 tile kernel     0           604          324     399          540       397
//   1 row,  2 bytes             32            65           49      87           91        77
//   1 row,  3 bytes             48            70           54      88          101        82
//   1 row,  fp32 tile kernel     0           394          231     270          398       255
// Half of the 128 are the values', which decoded to fp32 would be 128 multiply-adds and 128 operations of decoding. Of the
// other vector operations 21 decode keys, about 20 each are softmax and weights, 8 mask codes. Run under an emulator only,
// never timed on hardware. Up to 4 rows share a pass over a block; residual signs (rare) go through the fp32 kernel.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cmath>
#include <cstdint>

#include "attention_kernels.h"
#include "softmax.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "fp32_attention.h"
#include "integer_attention.h"
#include "neon_exp2.h"

namespace tqext::cpu {
namespace {

constexpr int kBlock = 128;         // tokens per update of the softmax state: 4 KB of codes, 4 of weights and 4 of scales
constexpr int kQuads = kBlock / 4;  // an sdot of the value pass sums over four tokens
constexpr int kMaxPatterns = kMaxDim / kGroup;

// Sum of pieces, most significant first.
template <int N>
inline float32x4_t join(const int32x4_t (&piece)[N]) {
  const int32x4_t low = vaddq_s32(vshlq_n_s32(piece[N - 2], 8), piece[N - 1]);
  if constexpr (N == 2) return vcvtq_f32_s32(low);
  if constexpr (N == 3) return vfmaq_n_f32(vcvtq_f32_s32(low), vcvtq_f32_s32(piece[0]), 65536.0f);
}

// Rows r to words of their lane: r[i] lane c = out[c] lane i.
inline void transpose(const uint32x4_t r[4], uint32x4_t out[4]) {
  const uint32x4_t a = vzip1q_u32(r[0], r[2]), b = vzip1q_u32(r[1], r[3]);
  const uint32x4_t c = vzip2q_u32(r[0], r[2]), d = vzip2q_u32(r[1], r[3]);
  out[0] = vzip1q_u32(a, b);
  out[1] = vzip2q_u32(a, b);
  out[2] = vzip1q_u32(c, d);
  out[3] = vzip2q_u32(c, d);
}

inline float32x4_t half_to_float(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }

inline int greatest_common_divisor(int a, int b) { return b ? greatest_common_divisor(b, a % b) : a; }

// One call's state. N: bytes of a query element and of a weight.
template <int N, ValueCoding kCoding>
class DotAttention : OwnsArrays {
  static constexpr bool kLloyd = kCoding == kValueLloyd;

 public:
  DotAttention(const CodedHead& head, const CodecShape& shape, const QueryRows& rows)
      : head_(head),
        rows_(rows),
        key_dim_(shape.key_dim),
        value_dim_(shape.value_dim),
        key_bits_(shape.key_bits),
        value_bits_(shape.value_bits),
        value_words_(code_words(shape.value_dim, shape.value_bits)),
        n_slots_(8 / shape.value_bits),
        n_groups_(kLloyd ? 1 : shape.value_dim / kGroup),
        n_stored_(kLloyd && value_bits_ == 3 ? value_dim_ / 8 : value_words_),
        lane_dims_(shape.value_dim / 4),
        pattern_dims_(greatest_common_divisor(kGroup, shape.value_dim / 4)),
        n_patterns_(lane_dims_ / pattern_dims_),
        spread_(!kLloyd && (shape.value_dim & (shape.value_dim - 1)) != 0),
        n_sets_(spread_ ? (n_groups_ + 3) / 4 : n_patterns_),
        fused_(rows.n_rows <= kSet) {
    Arrays::place(*this);
    for (int i = 0; i < 16; i++) {
      const int code = key_bits_ == 4 ? i : key_bits_ == 3 ? i & 7 : i & 3;
      table_[i] = shape.codebook[code];
      high_table_[i] = shape.codebook[i >> 2];  // 2 bits: the code is in the upper half of the nibble
      value_tables_[0][i] = shape.value_codebook[i & ((1 << value_bits_) - 1)];
      value_tables_[1][i] = shape.value_codebook[i >> 2];
    }
    for (int p = 0; p < n_patterns_ && !kLloyd; p++) {
      for (int b = 0; b < 4; b++) group_of_[p][b] = uint8_t((lane_dims_ * b + pattern_dims_ * p) / kGroup);
    }
    for (int r = 0; r < rows.n_rows; r++) max_[r] = kNegInf;
    clear(out_, size_t(rows.n_rows) * value_dim_);
    clear(sums_, size_t(rows.n_rows) * 4);
    if (!kLloyd) clear(bias_sums_, size_t(rows.n_rows) * n_groups_ * 4);
    set_key_order();
    for (int r = 0; r < rows.n_rows; r++) split_query(r);
  }

  void attend(int begin, int end) {
    const int last = last_attended(rows_);
    for (int t0 = begin; t0 < end && t0 < last; t0 += kBlock) {
      block_ = t0;
      n_ = smaller(kBlock, end - t0);
      n_padded_ = round_up(n_, 4);
      values_loaded_ = false;
      load_norms();
      for (int t = 0; t < n_padded_ && !fused_; t += 4) decode_keys(t, levels_ + size_t(t) * key_dim_);
      attend_sets(*this, rows_.n_rows);
    }
  }

  void finish(Partial* partials) const {
    for (int r = 0; r < rows_.n_rows; r++) {
      Partial& p = partials[r];
      p.max = max_[r];
      p.sum = vaddvq_f32(vld1q_f32(sums_ + 4 * r));
      const float* from = out_ + size_t(r) * value_dim_;
      for (int i = 0; i < value_dim_ && kLloyd; i++) p.out[lloyd_dimension(i)] = from[i];
      for (int w = 0; w < value_words_ && !kLloyd; w++) {
        for (int slot = 0; slot < n_slots_; slot++) {
          for (int b = 0; b < 4; b++) p.out[lane_dims_ * b + value_words_ * slot + w] = *from++;
        }
      }
      for (int g = 0; g < n_groups_ && !kLloyd; g++) {
        const float bias = vaddvq_f32(vld1q_f32(bias_sums_ + (size_t(r) * n_groups_ + g) * 4));
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
    const size_t n_rows = rows_.n_rows, set_bytes = size_t(kSet) * N * kBlock;
    levels_ = arrays.take<int8_t>(size_t(fused_ ? 4 : kBlock) * key_dim_);
    values_ = arrays.take<uint8_t>(size_t(kBlock) * n_stored_ * 4);
    weights_ = arrays.take<int8_t>(kLloyd ? set_bytes : 4 * set_bytes * n_patterns_);
    set_weights_ = spread_ ? arrays.take<int8_t>(4 * set_bytes * n_sets_) : weights_;
    query_ = arrays.take<int8_t>(n_rows * key_dim_ * N);
    norms_ = arrays.take<float>(kBlock);
    scales_ = arrays.take<float>(size_t(n_groups_) * kBlock);
    biases_ = kLloyd ? nullptr : arrays.take<float>(size_t(n_groups_) * kBlock);
    largest_scales_ = arrays.take<float>(kBlock);
    scores_ = arrays.take<float>(kSet * kBlock);
    out_ = arrays.take<float>(n_rows * value_dim_);
    sums_ = arrays.take<float>(n_rows * 4);  // softmax weights, in lanes
    bias_sums_ = kLloyd ? nullptr : arrays.take<float>(n_rows * n_groups_ * 4);
    query_step_ = arrays.take<float>(n_rows);
    max_ = arrays.take<float>(n_rows);
    nan_ = arrays.take<bool>(n_rows);
  }

  static void clear(float* x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = 0;
  }

  // ---- query

  // Lanes of four levels in the order in which decode_key writes them; a lane's bytes are every second dimension.
  void set_key_order() {
    int at = 0;
    const int n_units = key_dim_ / kUnit;
    auto lane = [&](int unit, int eight, int odd) { lane_dim_[at++] = int16_t(kUnit * unit + 8 * eight + odd); };
    int unit = 0;
    if (key_bits_ == 3) {
      for (; unit + 4 <= n_units; unit += 4) {
        for (int i = 0; i < 8; i++) {
          for (int u = 0; u < 4; u++) lane(unit + u, i / 2, i % 2);
        }
      }
      for (; unit + 2 <= n_units; unit += 2) {
        for (int i = 0; i < 8; i++) {
          for (int u = 0; u < 2; u++) lane(unit + u, i / 2, i % 2);
        }
      }
    } else if (key_bits_ == 2) {
      for (; unit + 2 <= n_units; unit += 2) {
        for (int i = 0; i < 4; i++) {
          for (int u = 0; u < 4; u++) lane(unit + u / 2, u % 2 + i % 2 * 2, i / 2);
        }
      }
      for (; unit < n_units; unit++) {
        for (int i = 0; i < 2; i++) {
          for (int u = 0; u < 4; u++) lane(unit, u % 2 + i * 2, u / 2);
        }
      }
    }
    for (; unit < n_units; unit++) {
      for (int i = 0; i < 8; i++) lane(unit, i % 4, i / 4);
    }
  }

  // The row as integers in N bytes relative to its largest element: [16 levels][row of the set][piece][16]. A row that is not
  // finite is marked: integers would lose it.
  void split_query(int r) {
    const int n_set = smaller(kSet, rows_.n_rows - r / kSet * kSet);
    int8_t* to = query_ + size_t(r / kSet) * kSet * key_dim_ * N + r % kSet * N * 16;
    const float* q = rows_.q + size_t(r) * key_dim_;
    float32x4_t top = vdupq_n_f32(0), check = top;
    for (int d = 0; d < key_dim_; d += 4) {
      const float32x4_t x = vld1q_f32(q + d);
      top = vmaxq_f32(top, vabsq_f32(x));
      check = vfmaq_n_f32(check, x, 0.0f);
    }
    nan_[r] = !(vaddvq_f32(check) == 0);
    const float largest = nan_[r] ? 0.0f : vmaxvq_f32(top);
    const float factor = query_factor<N>(largest, query_step_[r]);
    alignas(16) int32_t integers[kMaxDim];
    for (int d = 0; d < key_dim_; d += 4) {
      const float32x4_t x = nan_[r] ? vdupq_n_f32(0) : vld1q_f32(q + d);
      vst1q_s32(integers + d, vcvtnq_s32_f32(vmulq_n_f32(x, factor)));
    }
    for (int i = 0; i < key_dim_; i += 16, to += n_set * N * 16) {
      for (int j = 0; j < 16; j++) {
        int32_t rest = integers[lane_dim_[(i + j) / 4] + j % 4 * 2];
        for (int p = N - 1; p >= 0; p--) {
          const int8_t digit = int8_t(rest);
          to[p * 16 + j] = digit;
          rest = (rest - digit) / 256;
        }
      }
    }
  }

  // Tokens t .. t + 3 of the block; beyond its end, the last one.
  template <class T>
  void find_tokens(const T* base, ptrdiff_t stride, int t, const T* (&x)[4]) const {
    x[0] = base + (block_ + t) * stride;
    for (int i = 1; i < 4; i++) x[i] = x[i - 1] + (t + i < n_ ? stride : 0);
  }

  // ---- keys

  static int8_t* put(int8_t* to, int8x16_t table, uint8x16_t nibbles) {
    vst1q_s8(to, vqtbl1q_s8(table, nibbles));
    return to + 16;
  }
  static int8_t* put_both(int8_t* to, int8x16_t table, uint32x4_t words) {
    const uint8x16_t x = vreinterpretq_u8_u32(words);
    to = put(to, table, vandq_u8(x, vdupq_n_u8(15)));
    return put(to, table, vshrq_n_u8(x, 4));
  }
  // Low nibbles of two words, then their high ones.
  static uint8x16_t nibbles(uint32x2_t words) {
    const uint8x8_t x = vreinterpret_u8_u32(words);
    return vcombine_u8(vand_u8(x, vdup_n_u8(15)), vshr_n_u8(x, 4));
  }

  // A token's words to levels; set_key_order has the order. Bit 3 of a 3-bit code's nibble may be anything. high_table: for
  // codes in the upper halves of nibbles.
  template <int kBits>
  static void decode_key(const uint32_t* w, int n_units, int8x16_t table, int8x16_t high_table, int8_t* to) {
    if constexpr (kBits == 4) {
      for (int i = n_units; i > 0; i--, w += 4) to = put_both(to, table, vld1q_u32(w));
    } else if constexpr (kBits == 3) {
      for (int i = n_units / 4; i > 0; i--, w += 12) {
        const uint32x4x3_t x = vld3q_u32(w);
        uint32x4_t last = vbslq_u32(vdupq_n_u32(0x11111111), vshrq_n_u32(x.val[0], 3), vshrq_n_u32(x.val[1], 2));
        last = vbslq_u32(vdupq_n_u32(0x44444444), vshrq_n_u32(x.val[2], 1), last);
        for (int c = 0; c < 3; c++) to = put_both(to, table, x.val[c]);
        to = put_both(to, table, last);
      }
      if (n_units & 2) {
        const uint32x2x3_t x = vld3_u32(w);
        uint32x2_t last = vbsl_u32(vdup_n_u32(0x11111111), vshr_n_u32(x.val[0], 3), vshr_n_u32(x.val[1], 2));
        last = vbsl_u32(vdup_n_u32(0x44444444), vshr_n_u32(x.val[2], 1), last);
        for (int c = 0; c < 3; c++) to = put(to, table, nibbles(x.val[c]));
        to = put(to, table, nibbles(last));
        w += 6;
      }
      if (n_units & 1) {
        const uint32_t last = (w[0] >> 3 & 0x11111111) | (w[1] >> 2 & 0x22222222) | (w[2] >> 1 & 0x44444444);
        put_both(to, table, vcombine_u32(vld1_u32(w), vset_lane_u32(last, vdup_n_u32(w[2]), 1)));
      }
    } else {
      for (int i = n_units / 2; i > 0; i--, w += 4) {
        const uint8x16_t x = vreinterpretq_u8_u32(vld1q_u32(w));
        const uint8x16_t even = vandq_u8(x, vdupq_n_u8(15)), odd = vshrq_n_u8(x, 4);
        to = put(put(to, table, even), high_table, even);
        to = put(put(to, table, odd), high_table, odd);
      }
      if (n_units & 1) {
        const uint8x16_t x = nibbles(vld1_u32(w));
        put(put(to, table, x), high_table, x);
      }
    }
  }

  // Tokens t .. t + 3.
  template <int kBits>
  void decode_keys(int t, int8_t* to) const {
    const uint32_t* x[4];
    find_tokens(head_.key_codes, head_.key_stride, t, x);
    const int dim = key_dim_;
    const int8x16_t table = vld1q_s8(table_), high_table = vld1q_s8(high_table_);
    for (int i = 0; i < 4; i++) decode_key<kBits>(x[i], dim / kUnit, table, high_table, to + i * dim);
  }

  void decode_keys(int t, int8_t* to) const {
    if (key_bits_ == 3) {
      decode_keys<3>(t, to);
    } else if (key_bits_ == 4) {
      decode_keys<4>(t, to);
    } else {
      decode_keys<2>(t, to);
    }
  }

  void load_norms() { n_bad_keys_ = load_halves(head_.key_norms, head_.norm_stride, norms_, bad_keys_); }

  // The block's numbers as fp32; those that are not finite become zero, and their tokens' places are returned.
  int load_halves(const uint16_t* from, ptrdiff_t stride, float* to, int* places) const {
    float32x4_t check = vdupq_n_f32(0);
    for (int t = 0; t < n_padded_; t += 4) {
      const uint16_t* numbers[4];
      find_tokens(from, stride, t, numbers);
      uint16_t half[4];
      for (int i = 0; i < 4; i++) half[i] = *numbers[i];
      const float32x4_t x = half_to_float(vld1_u16(half));
      check = vfmaq_n_f32(check, x, 0.0f);
      vst1q_f32(to + t, x);
    }
    int n_places = 0;
    if (vaddvq_f32(check) == 0) return n_places;
    for (int t = 0; t < n_padded_; t++) {
      if (to[t] - to[t] == 0) continue;
      to[t] = 0;
      if (t < n_) places[n_places++] = t;
    }
    return n_places;
  }

  // ---- values

  // Values and their parameters wait until the scores are there, to be in the cache once only.
  void load_values() {
    if (values_loaded_) return;
    values_loaded_ = true;
    if constexpr (kLloyd) {
      load_value_norms();
    } else {
      load_params();
    }
    const int n_words = value_words_, n_padded = n_padded_;  // stores of bytes might change the members
    for (int t = 0; t < n_padded; t += 4) {
      const uint32_t* x[4];
      find_tokens(head_.value_codes, head_.value_stride, t, x);
      uint8_t* to = values_ + size_t(t / 4) * 32;
      int w = 0;
      for (; w + 4 <= n_words; w += 4, to += 2 * kQuads * 32) {
        uint8x16_t r[4];
        for (int i = 0; i < 4; i++) r[i] = vreinterpretq_u8_u32(vld1q_u32(x[i] + w));
        const uint8x16_t a = vzip1q_u8(r[0], r[2]), b = vzip1q_u8(r[1], r[3]);
        const uint8x16_t c = vzip2q_u8(r[0], r[2]), d = vzip2q_u8(r[1], r[3]);
        vst1q_u8(to, vzip1q_u8(a, b));
        vst1q_u8(to + 16, vzip2q_u8(a, b));
        vst1q_u8(to + kQuads * 32, vzip1q_u8(c, d));
        vst1q_u8(to + kQuads * 32 + 16, vzip2q_u8(c, d));
      }
      if (w + 2 <= n_words) {
        uint8x16_t r[4];
        for (int i = 0; i < 4; i++) {
          const uint8x8_t y = vreinterpret_u8_u32(vld1_u32(x[i] + w));
          r[i] = vcombine_u8(y, y);
        }
        const uint8x16_t a = vzip1q_u8(r[0], r[2]), b = vzip1q_u8(r[1], r[3]);
        vst1q_u8(to, vzip1q_u8(a, b));
        vst1q_u8(to + 16, vzip2q_u8(a, b));
        w += 2;
        to += kQuads * 32;
      }
      if (w < n_words) {  // three-bit codes of an odd number of units
        uint8x16_t r[4];
        for (int i = 0; i < 4; i++) r[i] = vreinterpretq_u8_u32(vdupq_n_u32(x[i][w]));
        vst1q_u8(to, vzip1q_u8(vzip1q_u8(r[0], r[2]), vzip1q_u8(r[1], r[3])));
      }
      if (kLloyd && value_bits_ == 3) {
        for (int unit = 0; unit < value_dim_ / kUnit; unit++) store_last_eight(unit, t / 4);
      }
    }
  }

  uint8_t* stored(int w, int quad) const { return values_ + size_t(w / 2) * kQuads * 32 + quad * 32 + w % 2 * 16; }

  // 3 bits: the codes of a unit's last eight dimensions, whose bits are the tops of its words' nibbles, as words of their own
  // behind all others; the tops of their nibbles may be anything.
  void store_last_eight(int unit, int quad) const {
    uint32x4_t x[3];
    for (int i = 0; i < 3; i++) x[i] = vreinterpretq_u32_u8(vld1q_u8(stored(3 * unit + i, quad)));
    uint32x4_t last = vbslq_u32(vdupq_n_u32(0x11111111), vshrq_n_u32(x[0], 3), vshrq_n_u32(x[1], 2));
    last = vbslq_u32(vdupq_n_u32(0x44444444), vshrq_n_u32(x[2], 1), last);
    vst1q_u8(stored(value_words_ + unit, quad), vreinterpretq_u8_u32(last));
  }

  void load_value_norms() {
    n_bad_ = load_halves(head_.value_params, head_.param_stride, scales_, bad_);
    for (int t = 0; t < n_padded_; t += 4) vst1q_f32(largest_scales_ + t, vabsq_f32(vld1q_f32(scales_ + t)));
  }

  // Scales, and biases moved to the middle of the codes' range, from which `values` counts: a group's values lie around zero,
  // and their two sums would otherwise cancel each other to the last digits.
  void load_params() {
    const float middle = 0.5f * float((1 << value_bits_) - 1);
    float32x4_t check = vdupq_n_f32(0);
    for (int t = 0; t < n_padded_; t += 4) {
      const uint16_t* x[4];
      find_tokens(head_.value_params, head_.param_stride, t, x);
      float32x4_t largest = vdupq_n_f32(0);
      for (int g = 0; g < n_groups_; g += 4) {
        const int n_here = smaller(4, n_groups_ - g);
        uint32x4_t r[4], y[4];
        for (int i = 0; i < 4; i++) {
          if (n_here == 4) {
            r[i] = vreinterpretq_u32_u16(vld1q_u16(x[i] + 2 * g));
          } else {
            uint16_t some[8] = {};
            for (int j = 0; j < 2 * n_here; j++) some[j] = x[i][2 * g + j];
            r[i] = vreinterpretq_u32_u16(vld1q_u16(some));
          }
        }
        transpose(r, y);
        for (int j = 0; j < n_here; j++) {
          const uint16x8_t pair = vreinterpretq_u16_u32(y[j]);
          const float32x4_t scale = half_to_float(vget_low_u16(vuzp1q_u16(pair, pair)));
          const float32x4_t bias = vfmaq_n_f32(half_to_float(vget_low_u16(vuzp2q_u16(pair, pair))), scale, middle);
          check = vfmaq_n_f32(check, bias, 0.0f);  // infinite or NaN parameters leave infinity or NaN in the bias
          largest = vmaxq_f32(largest, vabsq_f32(scale));
          vst1q_f32(scales_ + (g + j) * kBlock + t, scale);
          vst1q_f32(biases_ + (g + j) * kBlock + t, bias);
        }
      }
      vst1q_f32(largest_scales_ + t, largest);
    }
    n_bad_ = 0;
    if (!(vaddvq_f32(check) == 0)) drop_bad_params();
  }

  void drop_bad_params() {
    for (int t = 0; t < n_padded_; t++) {
      bool bad = false;
      for (int g = 0; g < n_groups_; g++) {
        float &scale = scales_[g * kBlock + t], &bias = biases_[g * kBlock + t];
        if (bias - bias == 0) continue;
        scale = bias = 0;
        bad = true;
      }
      if (!bad) continue;
      largest_scales_[t] = 0;
      for (int g = 0; g < n_groups_; g++)
        largest_scales_[t] = std::fmax(largest_scales_[t], std::fabs(scales_[g * kBlock + t]));
      if (t < n_) bad_[n_bad_++] = t;
    }
  }

  // ---- rows r .. r + H - 1 on the block

  // Not inlined, and `score` is: fewer instructions than with the caller's state.
  template <int H>
  __attribute__((noinline)) void attend_set(int r) {
    StepOffset offsets[H];
    for (int h = 0; h < H; h++) offsets[h] = StepOffset(rows_, r + h, block_, n_);
    scores<H>(r, offsets);
    float factors[8] = {};  // of the old state (0 ..) and of this block (4 ..)
    float reference[H];
    bool negligible = true;
    for (int h = 0; h < H; h++) {
      const float block_max = finish_scores(r + h, scores_ + h * kBlock, offsets[h]);
      negligible &= raise_max(block_max, max_[r + h], factors[h], factors[4 + h]);
      reference[h] = block_max == kNegInf ? 0.0f : block_max;
    }
    if (negligible) return;
    for (int i = 0; i < 8; i += 4) vst1q_f32(factors + i, exp2_neon(vld1q_f32(factors + i)));
    load_values();
    for (int h = 0; h < H; h++) {
      float* s = scores_ + h * kBlock;
      const float* scales = largest_scales_;
      const int n_padded = n_padded_;
      const float32x4_t top = vdupq_n_f32(reference[h]);
      float32x4_t sum = vdupq_n_f32(0), largest = sum;
      for (int t = 0; t < n_padded; t += 4) {
        const float32x4_t p = exp2_neon(vsubq_f32(vld1q_f32(s + t), top));
        vst1q_f32(s + t, p);
        sum = vaddq_f32(sum, p);
        largest = vmaxq_f32(largest, vmulq_f32(p, vld1q_f32(scales + t)));
      }
      float* to = sums_ + 4 * (r + h);
      vst1q_f32(to, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(to), factors[h]), sum, factors[4 + h]));
      for (int i = 0; i < n_bad_; i++) nan_[r + h] |= s[bad_[i]] != 0;
      if constexpr (kLloyd) {
        split_lloyd_weights<H>(h, vmaxvq_f32(largest));
      } else {
        split_weights<H>(h, vmaxvq_f32(largest));
      }
    }
    if constexpr (kLloyd) {
      constexpr int kWords = H <= 2 ? 2 : 1;
      for (int half = 0; half < (value_bits_ == 2 ? 2 : 1); half++) {
        for (int w = 0; w < n_stored_; w += kWords) lloyd_values<H, kWords>(r, factors, w, half);
      }
    } else {
      add_biases<H>(r, factors);
      if (spread_) spread_weights<H>();
      if (value_bits_ == 2) {
        values<H, 2, 0>(r, factors);
        values<H, 2, 2>(r, factors);
      } else {
        values<H, 4, 0>(r, factors);
      }
    }
  }

  template <int H>
  void scores(int r, const StepOffset* offsets) {
    const int8_t* query = query_ + size_t(r) * key_dim_ * N;
    for (int t = 0; t < n_padded_; t += 4) {
      if (fused_) decode_keys(t, levels_);
      const int8_t* levels = levels_ + (fused_ ? 0 : size_t(t) * key_dim_);
      if constexpr (H >= 2) score<H, 2>(levels, query, r, 0, t, offsets);
      if constexpr (H == 4) score<H, 2>(levels, query, r, 2, t, offsets);
      if constexpr (H % 2 == 1) score<H, 1>(levels, query, r, H - 1, t, offsets);
    }
  }

  // Integer dot products of four tokens with rows h0 .. h0 + R - 1 of the set, times norm.
  template <int H, int R>
  __attribute__((always_inline)) void score(const int8_t* levels, const int8_t* query, int r, int h0, int t,
                                            const StepOffset* offsets) {
    int32x4_t acc[R][N][4];
#pragma GCC unroll 2
    for (int h = 0; h < R; h++) {
#pragma GCC unroll 3
      for (int p = 0; p < N; p++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[h][p][i] = vdupq_n_s32(0);
      }
    }
    query += h0 * N * 16;
    for (int d = 0; d < key_dim_; d += 16, levels += 16, query += H * N * 16) {
      int8x16_t x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) x[i] = vld1q_s8(levels + i * key_dim_);
#pragma GCC unroll 2
      for (int h = 0; h < R; h++) {
#pragma GCC unroll 3
        for (int p = 0; p < N; p++) {
          const int8x16_t q = vld1q_s8(query + (h * N + p) * 16);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) acc[h][p][i] = vdotq_s32(acc[h][p][i], x[i], q);
        }
      }
    }
    const float32x4_t norms = vld1q_f32(norms_ + t);
#pragma GCC unroll 2
    for (int h = 0; h < R; h++) {
      int32x4_t sum[N];
#pragma GCC unroll 3
      for (int p = 0; p < N; p++) {
        sum[p] = vpaddq_s32(vpaddq_s32(acc[h][p][0], acc[h][p][1]), vpaddq_s32(acc[h][p][2], acc[h][p][3]));
      }
      const int row = r + h0 + h;
      const float32x4_t offset = vdupq_n_f32(offsets[h0 + h].value[t >= offsets[h0 + h].cut]);
      const float32x4_t factor = vmulq_n_f32(norms, query_step_[row]);
      vst1q_f32(scores_ + (h0 + h) * kBlock + t, vfmaq_f32(offset, join<N>(sum), factor));
    }
  }

  // Applies what is particular to a row; returns the largest score, NaN if there is one.
  float finish_scores(int r, float* s, const StepOffset& offset) {
    const int limit = smaller(n_, rows_.end[r] - block_);
    if (rows_.bias) {  // may end with the block
      const float* bias = rows_.bias[r] + block_;
      int t = 0;
      for (; t + 4 <= limit; t += 4) vst1q_f32(s + t, vaddq_f32(vld1q_f32(s + t), vld1q_f32(bias + t)));
      for (; t < limit; t++) s[t] += bias[t];
    }
    for (int t = limit < 0 ? 0 : limit; t < n_padded_; t++) s[t] = kNegInf;
    for (int i = 0; i < n_bad_keys_; i++) nan_[r] |= s[bad_keys_[i]] != kNegInf;
    nan_[r] |= offset.lost(s, n_);
    float32x4_t top = vdupq_n_f32(kNegInf);
    for (int t = 0; t < n_padded_; t += 4) top = vmaxq_f32(top, vld1q_f32(s + t));
    return vmaxvq_f32(top);
  }

  template <int H>
  void add_biases(int r, const float* factors) {
    for (int g = 0; g < n_groups_; g++) {
      float32x4_t acc[H];
      for (int h = 0; h < H; h++) acc[h] = vdupq_n_f32(0);
      for (int t = 0; t < n_padded_; t += 4) {
        const float32x4_t b = vld1q_f32(biases_ + g * kBlock + t);
        for (int h = 0; h < H; h++) acc[h] = vfmaq_f32(acc[h], b, vld1q_f32(scores_ + h * kBlock + t));
      }
      for (int h = 0; h < H; h++) {
        float* to = bias_sums_ + (size_t(r + h) * n_groups_ + g) * 4;
        vst1q_f32(to, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(to), factors[h]), acc[h], factors[4 + h]));
      }
    }
  }

  // Weight times scale as integers relative to the row's largest such product in this block (the largest scale alone may belong
  // to a token that is hardly attended, and leave no bits to the others), in bytes, four groups at a time:
  // [set of groups][quad][row][piece][group][token of the quad].
  template <int H>
  void split_weights(int h, float largest_product) {
    const float factor = weight_factor<N>(largest_product, weight_step_[h]);
    const float32x4_t magic = vdupq_n_f32(Pieces<N>::kMagic);
    const uint32_t magics = uint32_t(n_padded_) * Pieces<N>::kMagicBits;  // once a token
    const float* weights = scores_ + h * kBlock;
    const int n_padded = n_padded_;
    int32_t totals[kMaxDim / kGroup];
    for (int set = 0; set < n_sets_; set++) {
      int group[4];
      const float* scales[4];
      for (int b = 0; b < 4; b++) {
        group[b] = spread_ ? smaller(4 * set + b, n_groups_ - 1) : group_of_[set][b];
        scales[b] = scales_ + group[b] * kBlock;
      }
      uint32x4_t total[4];
      for (int b = 0; b < 4; b++) total[b] = vdupq_n_u32(0);
      int8_t* to = set_weights_ + (size_t(set) * kQuads * H + h) * N * 16;
      for (int t = 0; t < n_padded; t += 4, to += H * N * 16) {
        const float32x4_t p = vmulq_n_f32(vld1q_f32(weights + t), factor);
        uint32x4_t x[4];
        for (int b = 0; b < 4; b++) {
          x[b] = vreinterpretq_u32_f32(vfmaq_f32(magic, p, vld1q_f32(scales[b] + t)));
          total[b] = vaddq_u32(total[b], x[b]);
        }
        store_bytes(x, to);
      }
      for (int b = 0; b < 4; b++) totals[group[b]] = int32_t(vaddvq_u32(total[b]) - magics);
    }
    set_middle(h, totals);
  }

  // x[b]: four tokens' integers of group b, in the low bits.
  static void store_bytes(const uint32x4_t x[4], int8_t* to) {
    uint16x8_t y[4];
    for (int b = 0; b < 4; b++) y[b] = vreinterpretq_u16_u32(x[b]);
    const uint8x16_t a = vreinterpretq_u8_u16(vuzp1q_u16(y[0], y[1])), b = vreinterpretq_u8_u16(vuzp1q_u16(y[2], y[3]));
    const uint8x16_t flip = vdupq_n_u8(0x80);
    vst1q_s8(to + (N - 1) * 16, vreinterpretq_s8_u8(veorq_u8(vuzp1q_u8(a, b), flip)));
    if constexpr (N == 2) {
      vst1q_s8(to, vreinterpretq_s8_u8(vuzp2q_u8(a, b)));
    } else {
      const uint8x16_t c = vreinterpretq_u8_u16(vuzp2q_u16(y[0], y[1])), d = vreinterpretq_u8_u16(vuzp2q_u16(y[2], y[3]));
      vst1q_s8(to + 16, vreinterpretq_s8_u8(veorq_u8(vuzp2q_u8(a, b), flip)));
      vst1q_s8(to, vreinterpretq_s8_u8(vsubq_u8(vuzp1q_u8(c, d), vdupq_n_u8(64))));  // the mantissa's own 2^22
    }
  }

  // Minus the sums of the groups' weights times the middle of the codes' range, (2^bits - 1) / 2: what the sums of the first
  // and the last piece start with, by the lanes' groups. The half is left to `values`.
  void set_middle(int h, const int32_t* totals) {
    const int times = 1 - (1 << value_bits_);
    for (int p = 0; p < n_patterns_; p++) {
      for (int b = 0; b < 4; b++) {
        const int32_t total = totals[group_of_[p][b]];
        middle_first_[h][p][b] = N == 3 ? times * (total >> 17) : 0;  // 2^16 / 2 a unit
        middle_last_[h][p][b] = times * (N == 3 ? total & 0x1ffff : total);
      }
    }
  }

  // Where the groups' borders cut the runs of words, a pattern's lanes may belong to any groups.
  template <int H>
  void spread_weights() {
    uint8x16_t index[kMaxPatterns];
    for (int p = 0; p < n_patterns_; p++) {
      uint8_t bytes[16];
      for (int i = 0; i < 16; i++) bytes[i] = uint8_t(4 * group_of_[p][i / 4] + i % 4);
      index[p] = vld1q_u8(bytes);
    }
    const int n = n_padded_ / 4 * H * N;
    const ptrdiff_t step = ptrdiff_t(kQuads) * H * N * 16;
    for (int i = 0; i < n; i++) {
      const int8_t* from = set_weights_ + i * 16;
      int8x16x4_t sets;
      for (int set = 0; set < 4; set++) sets.val[set] = vld1q_s8(from + smaller(set, n_sets_ - 1) * step);
      int8_t* to = weights_ + i * 16;
      for (int p = 0; p < n_patterns_; p++, to += step) {
        vst1q_s8(to, n_sets_ == 1 ? vqtbl1q_s8(sets.val[0], index[p]) : vqtbl4q_s8(sets, index[p]));
      }
    }
  }

  // Which groups the four bytes of word w belong to at this slot.
  int pattern(int w, int slot) const { return (value_words_ * slot + w) / pattern_dims_; }

  template <int H, int kBits, int kSlot>
  void values(int r, const float* factors) {
    constexpr int kWords = H <= 2 ? 2 : 1;
    for (int w = 0; w < value_words_; w += kWords) {
      if (pattern(w, kSlot) == pattern(w, kSlot + 1)) {
        values<H, kBits, kSlot, kWords, true>(r, factors, w);
      } else {
        values<H, kBits, kSlot, kWords, false>(r, factors, w);
      }
    }
  }

  template <int kBits, int kSlot>
  static int8x16_t code(uint8x16_t x) {
    if constexpr (kBits * (kSlot + 1) == 8) return vreinterpretq_s8_u8(vshrq_n_u8(x, 8 - kBits));
    if constexpr (kBits * (kSlot + 1) < 8) {
      return vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(uint8_t(((1 << kBits) - 1) << (kBits * kSlot)))));
    }
  }

  // Sum over the block of weight * code for slots kSlot and kSlot + 1 of kWords words from w on. A code is not shifted down: it
  // counts 2^(kBits * slot)-fold, which the last multiplication takes back; only in the top bits it would be negative.
  // Not inlined: with the caller's state the compiler keeps the sums in memory.
  template <int H, int kBits, int kSlot, int kWords, bool kShared>
  __attribute__((noinline)) void values(int r, const float* factors, int w) {
    const int patterns[2] = {pattern(w, kSlot), pattern(w, kSlot + 1)};
    const int folds[2] = {kBits * kSlot, kBits * (kSlot + 2) == 8 ? 0 : kBits * (kSlot + 1)};
    int32x4_t acc[kWords][2][H][N];
    // Unrolled early, or gcc keeps the sums in memory.
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const int32x4_t fold = vdupq_n_s32(folds[i]);
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        const int32x4_t first = vshlq_s32(vld1q_s32(middle_first_[h][patterns[i]]), fold);
        const int32x4_t last = vshrq_n_s32(vshlq_s32(vld1q_s32(middle_last_[h][patterns[i]]), fold), 1);
#pragma GCC unroll 2
        for (int word = 0; word < kWords; word++) {
#pragma GCC unroll 3
          for (int p = 0; p < N; p++) acc[word][i][h][p] = p == N - 1 ? last : p == 0 ? first : vdupq_n_s32(0);
        }
      }
    }
    const uint8_t* codes = values_ + size_t(w / 2) * kQuads * 32 + w % 2 * 16;
    const int8_t* weights0 = weights_ + size_t(patterns[0]) * kQuads * H * N * 16;
    const int8_t* weights1 = weights_ + size_t(patterns[1]) * kQuads * H * N * 16;
    for (int quad = n_padded_ / 4; quad > 0; quad--, codes += 32) {
      int8x16_t c0[kWords], c1[kWords];
#pragma GCC unroll 2
      for (int word = 0; word < kWords; word++) {
        const uint8x16_t x = vld1q_u8(codes + 16 * word);
        c0[word] = code<kBits, kSlot>(x);
        c1[word] = code<kBits, kSlot + 1>(x);
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
        for (int p = 0; p < N; p++) {
          const int8x16_t x = vld1q_s8(weights0 + (h * N + p) * 16);
          const int8x16_t y = kShared ? x : vld1q_s8(weights1 + (h * N + p) * 16);
#pragma GCC unroll 2
          for (int word = 0; word < kWords; word++) {
            acc[word][0][h][p] = vdotq_s32(acc[word][0][h][p], c0[word], x);
            acc[word][1][h][p] = vdotq_s32(acc[word][1][h][p], c1[word], y);
          }
        }
      }
      weights0 += H * N * 16;
      if (!kShared) weights1 += H * N * 16;
    }
    float* row = out_ + size_t(r) * value_dim_ + (w * n_slots_ + kSlot) * 4;
    const ptrdiff_t row_step = value_dim_, word_step = n_slots_ * 4;
#pragma GCC unroll 4
    for (int h = 0; h < H; h++, row += row_step) {
      const float old = factors[h], now = weight_step_[h] * factors[4 + h];
#pragma GCC unroll 2
      for (int word = 0; word < kWords; word++) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          float* to = row + word * word_step + 4 * i;
          const float factor = now * (1.0f / float(1 << folds[i]));
          vst1q_f32(to, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(to), old), join<N>(acc[word][i][h]), factor));
        }
      }
    }
  }

  // ---- values coded as keys

  // Weight times norm as integers relative to the row's largest such product in this block, in bytes:
  // [quad][row][piece][token of the quad].
  template <int H>
  void split_lloyd_weights(int h, float largest_product) {
    const float factor = weight_factor<N>(largest_product, weight_step_[h]);
    const float32x4_t magic = vdupq_n_f32(Pieces<N>::kMagic);
    const uint8_t order2[16] = {1, 5, 9, 13, 0, 4, 8, 12, 255, 255, 255, 255, 255, 255, 255, 255};
    const uint8_t order3[16] = {2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 255, 255, 255, 255};
    const uint8x16_t order = vld1q_u8(N == 2 ? order2 : order3);
    // Low pieces are digits plus 128; the top one of three holds the mantissa's own 2^22.
    const uint32_t less2[4] = {0, 0x80808080, 0, 0}, less3[4] = {0x40404040, 0x80808080, 0x80808080, 0};
    const uint8x16_t less = vreinterpretq_u8_u32(vld1q_u32(N == 2 ? less2 : less3));
    const float *weights = scores_ + h * kBlock, *norms = scales_;
    const int n_padded = n_padded_;
    int8_t* to = weights_ + h * N * 4;
    for (int t = 0; t < n_padded; t += 4, to += H * N * 4) {
      const float32x4_t p = vmulq_n_f32(vld1q_f32(weights + t), factor);
      const uint8x16_t x = vreinterpretq_u8_f32(vfmaq_f32(magic, p, vld1q_f32(norms + t)));
      const uint32x4_t pieces = vreinterpretq_u32_u8(vsubq_u8(vqtbl1q_u8(x, order), less));
      vst1_s8(to, vreinterpret_s8_u32(vget_low_u32(pieces)));
      if constexpr (N == 3) {
        const uint32_t last = vgetq_lane_u32(pieces, 2);
        __builtin_memcpy(to + 8, &last, 4);
      }
    }
  }

  // Dimension of element i of out_: [stored word][half][even, odd nibbles][byte of the word].
  int lloyd_dimension(int i) const {
    const int byte = i % 4, odd = i / 4 % 2;
    int w = i / 8, eight, unit;  // eight dimensions of the unit
    if (value_bits_ == 2) {
      w = i / 16;
      unit = w / 2;
      eight = w % 2 + i / 8 % 2 * 2;
    } else if (value_bits_ == 3 && w >= value_words_) {
      unit = w - value_words_;
      eight = 3;
    } else {
      unit = w / value_bits_;
      eight = w % value_bits_;
    }
    return kUnit * unit + 8 * eight + 2 * byte + odd;
  }

  // Sum over the block of weight * level for both nibbles of kWords stored words from w on. half: of 2 bits, the lower or the
  // upper half of a nibble.
  template <int H, int kWords>
  __attribute__((noinline)) void lloyd_values(int r, const float* factors, int w, int half) {
    int32x4_t acc[kWords][2][H][N];
#pragma GCC unroll 2
    for (int word = 0; word < kWords; word++) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
          for (int p = 0; p < N; p++) acc[word][i][h][p] = vdupq_n_s32(0);
        }
      }
    }
    const int8x16_t table = vld1q_s8(value_tables_[half]);
    const uint8_t* codes = stored(w, 0);
    const int8_t* weights = weights_;
    for (int quad = n_padded_ / 4; quad > 0; quad--, codes += 32, weights += H * N * 4) {
      int8x16_t even[kWords], odd[kWords];
#pragma GCC unroll 2
      for (int word = 0; word < kWords; word++) {
        const uint8x16_t x = vld1q_u8(codes + 16 * word);
        even[word] = vqtbl1q_s8(table, vandq_u8(x, vdupq_n_u8(15)));
        odd[word] = vqtbl1q_s8(table, vshrq_n_u8(x, 4));
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
#pragma GCC unroll 3
        for (int p = 0; p < N; p++) {
          int32_t four;
          __builtin_memcpy(&four, weights + (h * N + p) * 4, 4);
          const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 2
          for (int word = 0; word < kWords; word++) {
            acc[word][0][h][p] = vdotq_s32(acc[word][0][h][p], even[word], x);
            acc[word][1][h][p] = vdotq_s32(acc[word][1][h][p], odd[word], x);
          }
        }
      }
    }
    const ptrdiff_t word_step = value_bits_ == 2 ? 16 : 8;
    float* row = out_ + size_t(r) * value_dim_ + w * word_step + 8 * half;
#pragma GCC unroll 4
    for (int h = 0; h < H; h++, row += value_dim_) {
      const float old = factors[h], now = weight_step_[h] * factors[4 + h] * (1.0f / float(kCodebookTop));
#pragma GCC unroll 2
      for (int word = 0; word < kWords; word++) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          float* to = row + word * word_step + 4 * i;
          vst1q_f32(to, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(to), old), join<N>(acc[word][i][h]), now));
        }
      }
    }
  }

  const CodedHead& head_;
  const QueryRows& rows_;
  const int key_dim_, value_dim_, key_bits_, value_bits_, value_words_, n_slots_, n_groups_;
  const int n_stored_;  // words of a token's values in values_
  // Byte b of a value word holds dimensions lane_dims_ * b on; the lanes' groups change every pattern_dims_ of them.
  const int lane_dims_, pattern_dims_, n_patterns_;
  const bool spread_;  // patterns are not disjoint sets of four groups
  const int n_sets_;
  const bool fused_;  // one set of rows decodes keys where it needs them, so that they stay in the first-level cache
  int block_ = 0, n_ = 0, n_padded_ = 0;  // first token; tokens; to the next multiple of four
  bool values_loaded_ = false;            // of this block
  float weight_step_[kSet] = {};
  alignas(16) int8_t table_[16], high_table_[16], value_tables_[2][16];
  alignas(16) int32_t middle_first_[kSet][kMaxPatterns][4], middle_last_[kSet][kMaxPatterns][4];
  uint8_t group_of_[kMaxPatterns][4];  // of a pattern's lanes
  int16_t lane_dim_[kMaxDim / 4];
  int n_bad_keys_ = 0, bad_keys_[kBlock];  // tokens of the block with a norm that is not finite, replaced by zero
  int n_bad_ = 0, bad_[kBlock];            // the same of scales and biases
  int8_t *levels_, *weights_, *set_weights_, *query_;
  uint8_t* values_;
  float *norms_, *scales_, *biases_, *largest_scales_;  // scales and biases: [group][token of the block]
  float *scores_, *out_, *bias_sums_, *sums_, *query_step_, *max_;
  bool* nan_;
};

}  // namespace

void attend_coded_neon_dotprod(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                               Partial* partials) {
  if (head.key_signs) {
    attend_coded_neon(head, shape, rows, begin, end, partials);
  } else {
    attend_in_integers<DotAttention>(head, shape, rows, begin, end, partials);
  }
}

}  // namespace tqext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __aarch64__
