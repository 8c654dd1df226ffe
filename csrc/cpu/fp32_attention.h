// Attention in fp32 over tiles of decoded tokens, written once for every vector width.
//
// A tile is kTile tokens, decoded once for all query rows: keys with the token as the lane (panels of two vectors of
// tokens, [dim][2 * width]), values with the dimension as the lane (panels of two vectors of dimensions, [token][2 * width]).
// Scores and output are then register-blocked matrix products of V::kRows rows with one panel, softmax in between, so a
// chunk of many rows runs as a matrix product and one row as a dot product without a horizontal sum.
//
// A key and 4 rows at dim 128 need 1024 multiply-adds, 128 of them in an 8-wide register; decoding adds about 3.4 operations
// per vector of key codes and 4 per vector of value codes, once for all rows, and 2 and 3 where an instruction picks lanes of a
// table by the low bits of another vector's (kPick lanes; 0: there is none).
//
// V: kWidth, kRows, kPanelsOne (panels that a single row works on at once), F, I and the operations used below.
// Included by one translation unit per instruction set, inside its target pragma: everything here must have internal
// linkage and use no function template of the standard library, or the linker may keep this copy for all.
#pragma once

#include "arrays.h"
#include "attention_kernels.h"
#include "softmax.h"

namespace tqext::cpu {
namespace {

constexpr int kTile = 64;  // tokens; 8 rows' scores and a panel of either side stay in a 32 KB cache

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

template <class V>
class Fp32Attention : OwnsArrays {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kWidth = V::kWidth, kPanel = 2 * kWidth;
  // Between panels of values: a multiple of 4096 bytes would have a token's panels displace each other from the cache.
  static constexpr ptrdiff_t kValuePanel = kPanel * (kTile + 1);
  static constexpr int kStagingRow = kMaxDim + kPanel;
  static_assert(kTile % kPanel == 0 && kGroup % kPanel == 0);
  static_assert(kTile == kBlockTokens, "a tile's tokens share a mean");

 public:
  static void attend_coded(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                           Partial* partials) {
    Fp32Attention self(rows, shape.key_dim, shape.value_dim, head.key_signs != nullptr);
    self.load_levels(shape);
    for (int t0 = begin; t0 < end; t0 += kTile) {
      const int n = smaller(kTile, end - t0);
      if (!self.anyone_attends(t0)) continue;
      self.decode_keys(head, shape, t0, n);
      self.attend_tile(t0, n, [&] { self.decode_values(head, shape, t0, n); });
    }
    self.finish(partials);
  }

  static void attend_exact(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials) {
    Fp32Attention self(rows, head.key_dim, head.value_dim, false);
    for (int t0 = begin; t0 < end; t0 += kTile) {
      const int n = smaller(kTile, end - t0);
      if (!self.anyone_attends(t0)) continue;
      self.load_exact(head, t0, n);
      self.attend_tile(t0, n, [] {});
    }
    self.finish(partials);
  }

 private:
  Fp32Attention(const QueryRows& rows, int key_dim, int value_dim, bool signs)
      : rows_(rows), key_dim_(key_dim), value_dim_(value_dim), out_dim_(round_up(value_dim, kPanel)), signs_(signs) {
    Arrays::place(*this);
    for (int r = 0; r < rows.n_rows; r++) {
      max_[r] = kNegInf;
      V::store(sum_ + r * kWidth, V::set1(0));
    }
    for (size_t i = 0; i < size_t(rows.n_rows) * out_dim_; i += kWidth) V::store(out_ + i, V::set1(0));
  }

  friend class Arrays;
  void place(Arrays& arrays) {
    const size_t tile_keys = size_t(key_dim_) * kTile, n_rows = rows_.n_rows;
    keys_ = arrays.take<float>(tile_keys);
    sign_keys_ = signs_ ? arrays.take<float>(tile_keys) : nullptr;
    values_ = arrays.take<float>(size_t(out_dim_ / kPanel) * kValuePanel);
    staging_ = arrays.take<float>(4 * kStagingRow);
    scores_ = arrays.take<float>(size_t(V::kRows) * kTile);
    sign_scores_ = signs_ ? arrays.take<float>(size_t(V::kRows) * kTile) : nullptr;
    norms_ = arrays.take<float>(kTile);
    residual_norms_ = arrays.take<float>(kTile);
    value_norms_ = arrays.take<float>(kTile);
    out_ = arrays.take<float>(n_rows * out_dim_);
    max_ = arrays.take<float>(n_rows);
    sum_ = arrays.take<float>(n_rows * kWidth);  // one partial sum a lane
  }

  bool anyone_attends(int t0) const {
    for (int r = 0; r < rows_.n_rows; r++) {
      if (rows_.end[r] > t0) return true;
    }
    return false;
  }

  // ---- decoding

  void load_levels(const CodecShape& shape) {
    table_ = V::load_table(shape.codebook);
    const int n_levels = 1 << shape.key_bits;
    if constexpr (V::kPick > 0) {
      pick_levels_ = n_levels <= V::kPick;
      alignas(64) float x[V::kPick];
      for (int i = 0; i < V::kPick; i++) x[i] = shape.codebook[i % n_levels];
      levels_ = V::load(x);
      for (int i = 0; i < V::kPick; i++) x[i] = float(i % 4);
      steps_ = V::load(x);
    }
    if (shape.value_coding == kValueLloyd) {
      const int n_value_levels = 1 << shape.value_bits;
      for (int i = 0; i < kMaxKeyLevels; i++) value_table_[i] = shape.value_codebook[i % n_value_levels];
      if constexpr (V::kPick > 0) {
        alignas(64) float x[V::kPick];
        for (int i = 0; i < V::kPick; i++) x[i] = value_table_[i];
        value_levels_ = V::load(x);
      }
    }
  }

  // Levels of dimensions d .. d + 7, whose codes are the low bits of the nibbles of `word`; nibbles hold no other bits.
  void store_levels(I word, float* to) const {
    if constexpr (V::kPick > 0) {
      if (pick_levels_) {
        V::store(to + 0 * kPanel, V::pick(levels_, word));
        V::store(to + 1 * kPanel, V::pick(levels_, V::template shift_right<4>(word)));
        V::store(to + 2 * kPanel, V::pick(levels_, V::template shift_right<8>(word)));
        V::store(to + 3 * kPanel, V::pick(levels_, V::template shift_right<12>(word)));
        V::store(to + 4 * kPanel, V::pick(levels_, V::template shift_right<16>(word)));
        V::store(to + 5 * kPanel, V::pick(levels_, V::template shift_right<20>(word)));
        V::store(to + 6 * kPanel, V::pick(levels_, V::template shift_right<24>(word)));
        V::store(to + 7 * kPanel, V::pick(levels_, V::template shift_right<28>(word)));
        return;
      }
    }
    const I low = V::look_up(table_, V::bit_and(word, V::set1_int(0x0f0f0f0f)));
    const I high = V::look_up(table_, V::bit_and(V::template shift_right<4>(word), V::set1_int(0x0f0f0f0f)));
    V::store(to + 0 * kPanel, V::template byte_to_float<0>(low));
    V::store(to + 1 * kPanel, V::template byte_to_float<0>(high));
    V::store(to + 2 * kPanel, V::template byte_to_float<1>(low));
    V::store(to + 3 * kPanel, V::template byte_to_float<1>(high));
    V::store(to + 4 * kPanel, V::template byte_to_float<2>(low));
    V::store(to + 5 * kPanel, V::template byte_to_float<2>(high));
    V::store(to + 6 * kPanel, V::template byte_to_float<3>(low));
    V::store(to + 7 * kPanel, V::template byte_to_float<3>(high));
  }

  void decode_keys(const CodedHead& head, const CodecShape& shape, int t0, int n) {
    const uint32_t* codes = head.key_codes + t0 * head.key_stride;
    const int bits = shape.key_bits;
    for (int t = 0; t < round_up(n, kWidth); t += kWidth) {
      float* to = keys_ + t / kPanel * kPanel * key_dim_ + t % kPanel;
      for (int unit = 0; unit < key_dim_ / kUnit; unit++, to += kUnit * kPanel) {
        I w[4] = {V::set1_int(0), V::set1_int(0), V::set1_int(0), V::set1_int(0)};
        V::load_words(codes + unit * bits, head.key_stride, t, n, bits, w);
        if (bits == 4) {
          for (int i = 0; i < 4; i++) store_levels(w[i], to + 8 * i * kPanel);
        } else if (bits == 3) {
          const I bit = V::set1_int(0x11111111), code = V::set1_int(0x77777777);
          const I last = V::bit_or(V::bit_or(V::bit_and(V::template shift_right<3>(w[0]), bit),
                                             V::bit_and(V::template shift_right<2>(w[1]), V::set1_int(0x22222222))),
                                   V::bit_and(V::template shift_right<1>(w[2]), V::set1_int(0x44444444)));
          for (int i = 0; i < 3; i++) store_levels(V::bit_and(w[i], code), to + 8 * i * kPanel);
          store_levels(last, to + 24 * kPanel);
        } else {
          const I code = V::set1_int(0x33333333);
          for (int i = 0; i < 2; i++) {
            store_levels(V::bit_and(w[i], code), to + 8 * i * kPanel);
            store_levels(V::bit_and(V::template shift_right<2>(w[i]), code), to + (16 + 8 * i) * kPanel);
          }
        }
      }
      alignas(64) uint16_t half[kWidth];
      for (int i = 0; i < kWidth; i++) half[i] = head.key_norms[(t0 + smaller(t + i, n - 1)) * head.norm_stride];
      V::store(norms_ + t, finite_or_nan(V::mul(V::load_half(half), V::set1(1.0f / float(kCodebookTop)))));
      if (signs_) {
        for (int i = 0; i < kWidth; i++) half[i] = head.residual_norms[(t0 + smaller(t + i, n - 1)) * head.residual_stride];
        V::store(residual_norms_ + t, finite_or_nan(V::load_half(half)));
        decode_signs(head, t0, t, n);
      }
    }
  }

  // An infinite norm must not make a score minus infinity, which is that of a token that is not attended.
  static F finite_or_nan(F x) { return V::fma(x, V::set1(0), x); }

  // +1 or -1 per dimension, in the layout of keys_.
  void decode_signs(const CodedHead& head, int t0, int t, int n) {
    float* to = sign_keys_ + t / kPanel * kPanel * key_dim_ + t % kPanel;
    for (int unit = 0; unit < key_dim_ / 32; unit++) {
      I w[4] = {V::set1_int(0), V::set1_int(0), V::set1_int(0), V::set1_int(0)};
      V::load_words(head.key_signs + t0 * head.sign_stride + unit, head.sign_stride, t, n, 1, w);
      for (int b = 31; b >= 0; b--) {
        V::store(to + (32 * unit + b) * kPanel, V::sign_of_top_bit(w[0]));
        w[0] = V::add_int(w[0], w[0]);
      }
    }
  }

  void decode_values(const CodedHead& head, const CodecShape& shape, int t0, int n) {
    if (shape.value_coding == kValueGroups) {
      decode_groups(head, shape, t0, n);
    } else {
      load_value_norms(head, t0, n);
      if (shape.value_bits == 2) {
        decode_lloyd<2>(head, t0, n);
      } else if (shape.value_bits == 3) {
        decode_lloyd<3>(head, t0, n);
      } else {
        decode_lloyd<4>(head, t0, n);
      }
    }
    if constexpr (kPanel > kUnit) {
      for (int t = 0; t < n && value_dim_ % kPanel; t++) clear_values(t, value_dim_);
    }
    clear_tokens(n);
  }

  void load_value_norms(const CodedHead& head, int t0, int n) {
    F poison = V::set1(0);
    for (int t = 0; t < round_up(n, kWidth); t += kWidth) {
      alignas(64) uint16_t half[kWidth];
      for (int i = 0; i < kWidth; i++) half[i] = head.value_params[(t0 + smaller(t + i, n - 1)) * head.param_stride];
      const F x = V::mul(V::load_half(half), V::set1(1.0f / float(kCodebookTop)));
      poison = V::fma(x, V::set1(0), poison);
      V::store(value_norms_ + t, x);
    }
    poisoned_ = !(V::sum(poison) == 0);
  }

  // 3 bits: the codes of a token's last eight dimensions of each unit, whose bits are the tops of its words' nibbles, to words
  // of their own: unit u's is last[last_at(u)].
  static constexpr int last_at(int unit) { return unit / 2 * 4 + unit % 2 * 3; }
  static void find_last(const uint32_t* w, int n_units, uint32_t* last) {
    int unit = 0;
    for (; unit + 2 <= n_units; unit += 2, w += 6) V::last_words(w, last + last_at(unit));
    if (unit < n_units) {
      last[last_at(unit)] = (w[0] >> 3 & 0x11111111) | (w[1] >> 2 & 0x22222222) | (w[2] >> 1 & 0x44444444);
    }
  }

  // Values coded as keys, the dimension as the lane. Where a vector holds all levels, it holds them times the token's norm.
  template <int kBits>
  void decode_lloyd(const CodedHead& head, int t0, int n) {
    const int n_units = value_dim_ / kUnit;
    alignas(64) uint32_t nibbles[kWidth], last[last_at(kMaxDim / kUnit)];
    for (int i = 0; i < kWidth; i++) nibbles[i] = 4 * (i % 8);
    const I shift = V::load_int(nibbles), upper_shift = V::add_int(shift, V::set1_int(2));
    for (int t = 0; t < n; t++) {
      const uint32_t* w = head.value_codes + (t0 + t) * head.value_stride;
      float* to = values_ + t * kPanel;
      const F norm = V::set1(value_norms_[t]), scaled_levels = V::mul(value_levels_, norm);
      if constexpr (kBits == 3) find_last(w, n_units, last);
      for (int unit = 0; unit < n_units; unit++, w += kBits, to += kUnit / kPanel * kValuePanel) {
        const uint32_t& fourth = kBits == 3 ? last[last_at(unit)] : w[kBits - 1];
        if constexpr (V::kPick >= 1 << kBits) {  // the nibbles' other bits do not matter: the table repeats
#pragma GCC unroll 4
          for (int j = 0; j < kUnit / kWidth; j++) {
            const int first = j * kWidth / 8;  // eight dimensions
            const uint32_t& a = kBits == 2 ? w[first % 2] : first < 3 ? w[first] : fourth;
            const uint32_t& b = kBits == 2 ? w[1] : first < 2 ? w[1] : fourth;
            const I code = V::shift_right_lanes(V::spread_words(a, b), kBits == 2 && first >= 2 ? upper_shift : shift);
            V::store(to + j / 2 * kValuePanel + j % 2 * kWidth, V::pick(scaled_levels, code));
          }
        } else {
          alignas(64) int8_t levels[kUnit];
          V::template look_up_unit<kBits>(value_table_, w, fourth, levels);
#pragma GCC unroll 8
          for (int j = 0; j < kUnit / kWidth; j++) {
            V::store(to + j / 2 * kValuePanel + j % 2 * kWidth, V::mul(V::load_bytes(levels + j * kWidth), norm));
          }
        }
      }
    }
  }

  void decode_groups(const CodedHead& head, const CodecShape& shape, int t0, int n) {
    const int bits = shape.value_bits, n_words = code_words(value_dim_, bits), n_params = 2 * (value_dim_ / kGroup);
    const I mask = V::set1_int((1 << bits) - 1);
    // A vector holds a part of one slot, or whole slots, or (dims that are not powers of two) goes through staging_.
    const bool part = n_words % kWidth == 0, whole = !part && kWidth % n_words == 0;
    const int step = whole ? bits * (kWidth / n_words) : bits;
    alignas(64) uint32_t words[kMaxDim / 8 + kWidth], first_shift[kWidth];
    alignas(64) uint16_t half[round_up(2 * kMaxDim / kGroup, kWidth)] = {};
    alignas(64) float param[round_up(2 * kMaxDim / kGroup, kWidth)];
    for (int i = 0; i < kWidth; i++) first_shift[i] = whole ? bits * (i / n_words) : 0;
    F poison = V::set1(0);
    for (int t = 0; t < n; t++) {
      const uint32_t* w = head.value_codes + (t0 + t) * head.value_stride;
      const uint16_t* params = head.value_params + (t0 + t) * head.param_stride;
      const int direct = n_params / kWidth * kWidth;
      for (int i = direct; i < n_params; i++) half[i] = params[i];
      for (int i = 0; i < n_params; i += kWidth) {
        const F x = V::load_half((i < direct ? params : half) + i);
        poison = V::fma(x, V::set1(0), poison);
        V::store(param + i, x);
      }
      if (!part) {  // never read beyond the token
        for (int i = 0; i < n_words; i++) words[i] = w[i];
        for (int i = n_words; whole && i < kWidth; i++) words[i] = words[i - n_words];
        w = words;
      }
      I shift = V::load_int(first_shift);
      if (part || whole) {
        const int vectors = part ? n_words / kWidth : 1;  // of a slot
        float* to = values_ + t * kPanel;
        I x = V::load_int(w);
        if (V::kPick > 0 && bits == 2 && vectors == 1) {
          const I next = V::set1_int(step);
          for (int g = 0; g < value_dim_ / kGroup; g++, to += kGroup / kPanel * kValuePanel) {
            const F four = V::fma(steps_, V::set1(param[2 * g]), V::set1(param[2 * g + 1]));
#pragma GCC unroll 4
            for (int j = 0; j < kGroup / kWidth; j++) {
              V::store(to + j / 2 * kValuePanel + j % 2 * kWidth, V::pick(four, V::shift_right_lanes(x, shift)));
              shift = V::add_int(shift, next);
            }
          }
          continue;
        }
        for (int g = 0, i = 0; g < value_dim_ / kGroup; g++, to += kGroup / kPanel * kValuePanel) {
          const F scale = V::set1(param[2 * g]), bias = V::set1(param[2 * g + 1]), four = V::fma(steps_, scale, bias);
          for (int j = 0; j < kGroup / kWidth; j++) {
            const I code = V::shift_right_lanes(x, shift);
            float* element = to + j / 2 * kValuePanel + j % 2 * kWidth;
            if (V::kPick > 0 && bits == 2) {
              V::store(element, V::pick(four, code));  // the next code's bit does not matter: the table repeats
            } else {
              V::store(element, V::fma(V::to_float(V::bit_and(code, mask)), scale, bias));
            }
            if (vectors == 1) {
              shift = V::add_int(shift, V::set1_int(step));
              continue;
            }
            if (++i == vectors) {
              i = 0;
              shift = V::add_int(shift, V::set1_int(step));
            }
            x = V::load_int(w + i * kWidth);
          }
        }
      } else {
        // A slot's last vector may spill into the next one's place, which is written later.
        for (int slot = 0; slot < 32 / bits; slot++, shift = V::add_int(shift, V::set1_int(bits))) {
          for (int i = 0; i < n_words; i += kWidth) {
            const I code = V::bit_and(V::shift_right_lanes(V::load_int(w + i), shift), mask);
            V::store(staging_ + slot * n_words + i, V::to_float(code));
          }
        }
        for (int d = 0; d < value_dim_; d += kWidth) {
          const float* scale = param + d / kGroup * 2;
          V::store(value_at(t, d), V::fma(V::load(staging_ + d), V::set1(scale[0]), V::set1(scale[1])));
        }
      }
    }
    poisoned_ = !(V::sum(poison) == 0);
  }

  float* value_at(int t, int d) const { return values_ + d / kPanel * kValuePanel + t * kPanel + d % kPanel; }
  void clear_values(int t, int from) const {
    for (int d = from; d < out_dim_; d++) *value_at(t, d) = 0;
  }
  // The tokens that complete the last panel of keys have weight zero, which must not meet a NaN.
  void clear_tokens(int n) const {
    for (int t = n; t < round_up(n, kPanel); t++) clear_values(t, 0);
  }

  // Not lambdas: those do not take over the target of the function around them.
  struct Load32 {
    F operator()(const float* x) const { return V::load(x); }
  };
  struct Load16 {
    F operator()(const uint16_t* x) const { return V::load_half(x); }
  };
  struct LoadBfloat {
    F operator()(const uint16_t* x) const { return V::load_bfloat(x); }
  };

  template <class T, class Load>
  void load_exact(const T* base, ptrdiff_t stride, int dim, int t0, int n, const Load& load, float* (&rows)[4], int t) {
    const int vectors = dim / kWidth * kWidth;
    for (int i = 0; i < 4; i++) {
      const T* x = base + (t0 + smaller(t + i, n - 1)) * stride;
      rows[i] = staging_ + i * kStagingRow;
      for (int d = 0; d < vectors; d += kWidth) V::store(rows[i] + d, load(x + d));
      if (vectors < dim) {
        T rest[kWidth] = {};
        for (int d = vectors; d < dim; d++) rest[d - vectors] = x[d];
        V::store(rows[i] + vectors, load(rest));
      }
    }
  }

  template <class T, class Load>
  void load_exact(const ExactHead& head, int t0, int n, const Load& load) {
    float* rows[4];
    for (int t = 0; t < round_up(n, kPanel); t += 4) {
      load_exact(static_cast<const T*>(head.keys), head.key_stride, key_dim_, t0, n, load, rows, t);
      float* to = keys_ + t / kPanel * kPanel * key_dim_ + t % kPanel;
      for (int d = 0; d < key_dim_; d += 4) V::transpose_4x4(rows, d, to + d * kPanel, kPanel);  // head dims: multiples of 8
    }
    F poison = V::set1(0);
    for (int t = 0; t < n; t += 4) {
      load_exact(static_cast<const T*>(head.values), head.value_stride, value_dim_, t0, n, load, rows, t);
      for (int i = 0; i < 4 && t + i < n; i++) {
        for (int d = value_dim_; d < out_dim_; d++) rows[i][d] = 0;
        for (int d = 0; d < out_dim_; d += kWidth) {
          const F x = V::load(rows[i] + d);
          poison = V::fma(x, V::set1(0), poison);
          V::store(value_at(t + i, d), x);
        }
      }
    }
    poisoned_ = !(V::sum(poison) == 0);
    clear_tokens(n);
  }

  void load_exact(const ExactHead& head, int t0, int n) {
    switch (head.type) {
      case ExactType::kFloat32:
        load_exact<float>(head, t0, n, Load32{});
        break;
      case ExactType::kFloat16:
        load_exact<uint16_t>(head, t0, n, Load16{});
        break;
      case ExactType::kBFloat16:
        load_exact<uint16_t>(head, t0, n, LoadBfloat{});
    }
    for (int t = 0; t < kTile; t += kWidth) V::store(norms_ + t, V::set1(1));
  }

  // ---- arithmetic

  // c[i][.] = sum over k of a[i][k] * b[k][.] for R rows and P panels, plus c[i][.] * keep[i] unless keep is null. Added last:
  // a sum of 64 terms and a sum of such sums lose fewer digits than one of all terms.
  template <int R, int P>
  static void multiply(const float* a, ptrdiff_t a_stride, const float* b, ptrdiff_t panel_stride, int n, float* c,
                       ptrdiff_t c_stride, const float* keep) {
    // Unrolled early, or gcc keeps the sums in memory.
    F acc[R][2 * P];
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 16
      for (int j = 0; j < 2 * P; j++) acc[i][j] = V::set1(0);
    }
    for (int k = 0; k < n; k++) {
      F x[2 * P];
#pragma GCC unroll 16
      for (int j = 0; j < 2 * P; j++) x[j] = V::load(b + j / 2 * panel_stride + k * kPanel + j % 2 * kWidth);
#pragma GCC unroll 12
      for (int i = 0; i < R; i++) {
        const F y = V::set1(a[i * a_stride + k]);
#pragma GCC unroll 16
        for (int j = 0; j < 2 * P; j++) acc[i][j] = V::fma(x[j], y, acc[i][j]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
      const F factor = V::set1(keep ? keep[i] : 0.0f);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * P; j++) {
        float* to = c + i * c_stride + j * kWidth;
        V::store(to, keep ? V::fma(V::load(to), factor, acc[i][j]) : acc[i][j]);
      }
    }
  }

  template <int R>
  static void multiply_panels(const float* a, ptrdiff_t a_stride, const float* b, ptrdiff_t panel_stride, int n, int n_panels,
                              float* c, ptrdiff_t c_stride, const float* keep) {
    // A few rows have too few sums under way to hide the latency of an addition.
    constexpr int kAtOnce = R <= 2 ? V::kPanelsOne / R : 1;
    int p = 0;
    if constexpr (kAtOnce > 1) {
      for (; p + kAtOnce <= n_panels; p += kAtOnce) {
        multiply<R, kAtOnce>(a, a_stride, b + p * panel_stride, panel_stride, n, c + p * kPanel, c_stride, keep);
      }
    }
    for (; p < n_panels; p++)
      multiply<R, 1>(a, a_stride, b + p * panel_stride, panel_stride, n, c + p * kPanel, c_stride, keep);
  }

  // decode_values is called once the first rows are scored: the keys then make room for the values in the first-level cache.
  template <class DecodeValues>
  void attend_tile(int t0, int n, const DecodeValues& decode_values) {
    values_ready_ = false;
    int r = 0;
    while (r < rows_.n_rows) r += attend_rows(r, t0, n, decode_values);
  }

  // The largest block of rows that fits; returns its size.
  template <class DecodeValues>
  int attend_rows(int r, int t0, int n, const DecodeValues& decode_values) {
    const int left = rows_.n_rows - r;
    if constexpr (V::kRows >= 12) {
      if (left >= 12) return attend_rows<12>(r, t0, n, decode_values);
    }
    if constexpr (V::kRows >= 8) {
      if (left >= 8) return attend_rows<8>(r, t0, n, decode_values);
    }
    if constexpr (V::kRows >= 6) {
      if (left >= 6) return attend_rows<6>(r, t0, n, decode_values);
    }
    if (left >= 4) return attend_rows<4>(r, t0, n, decode_values);
    if (left == 3) return attend_rows<3>(r, t0, n, decode_values);
    if (left == 2) return attend_rows<2>(r, t0, n, decode_values);
    return attend_rows<1>(r, t0, n, decode_values);
  }

  template <int R, class DecodeValues>
  int attend_rows(int r0, int t0, int n, const DecodeValues& decode_values) {
    bool any = false;
    for (int r = r0; r < r0 + R; r++) any |= rows_.end[r] > t0;
    if (!any) return R;
    const int n_panels = round_up(n, kPanel) / kPanel, n_padded = n_panels * kPanel;
    multiply_panels<R>(rows_.q + ptrdiff_t(r0) * key_dim_, key_dim_, keys_, ptrdiff_t(kPanel) * key_dim_, key_dim_, n_panels,
                       scores_, kTile, nullptr);
    scale_scores<R>(scores_, norms_, n_padded);
    if (signs_) {
      multiply_panels<R>(rows_.residual_q + ptrdiff_t(r0) * key_dim_, key_dim_, sign_keys_, ptrdiff_t(kPanel) * key_dim_,
                         key_dim_, n_panels, sign_scores_, kTile, nullptr);
      scale_scores<R>(sign_scores_, residual_norms_, n_padded);
      for (int i = 0; i < R; i++) {
        for (int t = 0; t < n_padded; t += kWidth) {
          float* s = scores_ + i * kTile + t;
          V::store(s, V::add(V::load(s), V::load(sign_scores_ + i * kTile + t)));
        }
      }
    }
    float keep[R];
    for (int i = 0; i < R; i++) keep[i] = softmax(r0 + i, scores_ + i * kTile, t0, n, n_padded);
    if (!values_ready_) decode_values();
    values_ready_ = true;
    if (poisoned_) {
      for (int i = 0; i < R; i++) add_values_carefully(r0 + i, scores_ + i * kTile, n, keep[i]);
    } else {
      multiply_panels<R>(scores_, kTile, values_, kValuePanel, n, out_dim_ / kPanel, out_ + ptrdiff_t(r0) * out_dim_, out_dim_,
                         keep);
    }
    return R;
  }

  template <int R>
  static void scale_scores(float* scores, const float* factors, int n) {
    for (int i = 0; i < R; i++) {
      for (int t = 0; t < n; t += kWidth) {
        V::store(scores + i * kTile + t, V::mul(V::load(scores + i * kTile + t), V::load(factors + t)));
      }
    }
  }

  // Scores of row r to weights relative to its new maximum; returns what the old sums are multiplied by.
  float softmax(int r, float* s, int t0, int n, int n_padded) {
    const int limit = smaller(n, rows_.end[r] - t0);
    if (rows_.offset) {
      const float x = rows_.offset[r * rows_.offset_stride + t0 / kBlockTokens - rows_.first_block];
      const F offset = finite_or_nan(V::set1(x));
      for (int t = 0; t < n_padded; t += kWidth) V::store(s + t, V::add(V::load(s + t), offset));
    }
    if (rows_.bias) {  // may end with the tile
      const float* bias = rows_.bias[r] + t0;
      for (int t = 0; t < limit; t++) s[t] = bias[t] == kNegInf ? kNegInf : s[t] + bias[t];
    }
    for (int t = limit < 0 ? 0 : limit; t < n_padded; t++) s[t] = kNegInf;
    F top = V::set1(max_[r]);
    for (int t = 0; t < n_padded; t += kWidth) top = V::max(top, V::load(s + t));
    const float new_max = V::max_lane(top);
    const float keep = max_[r] == new_max ? 1.0f : first_lane(V::exp2(V::set1(max_[r] - new_max)));
    max_[r] = new_max;
    const F reference = V::set1(new_max == kNegInf ? 0.0f : new_max);
    F sum = V::set1(0);  // of the tile: see multiply()
    for (int t = 0; t < n_padded; t += kWidth) {
      const F weight = V::exp2(V::sub(V::load(s + t), reference));
      V::store(s + t, weight);
      sum = V::add(sum, weight);
    }
    V::store(sum_ + r * kWidth, V::fma(V::load(sum_ + r * kWidth), V::set1(keep), sum));
    return keep;
  }

  // A token that a row does not attend may hold anything, NaN too.
  void add_values_carefully(int r, const float* weights, int n, float keep) {
    float* out = out_ + ptrdiff_t(r) * out_dim_;
    for (int d = 0; d < value_dim_; d++) {
      float sum = 0;
      for (int t = 0; t < n; t++) {
        if (weights[t] != 0) sum += weights[t] * *value_at(t, d);
      }
      out[d] = out[d] * keep + sum;
    }
  }

  static float first_lane(F x) {
    alignas(64) float lanes[kWidth];
    V::store(lanes, x);
    return lanes[0];
  }

  void finish(Partial* partials) {
    for (int r = 0; r < rows_.n_rows; r++) {
      Partial& p = partials[r];
      p.sum = V::sum(V::load(sum_ + r * kWidth));
      // Only NaN scores leave the maximum empty and a sum behind; the state must not look empty.
      p.max = max_[r] == kNegInf && p.sum != 0 ? 0.0f : max_[r];
      for (int d = 0; d < value_dim_; d++) p.out[d] = out_[ptrdiff_t(r) * out_dim_ + d];
    }
  }

  const QueryRows& rows_;
  const int key_dim_, value_dim_, out_dim_;
  const bool signs_;
  bool values_ready_ = false;
  bool poisoned_ = false;     // a value of this tile is not finite
  bool pick_levels_ = false;  // levels_ holds all levels
  I table_;
  F levels_ = V::set1(0), steps_ = V::set1(0);  // 0 1 2 3, again and again
  F value_levels_ = V::set1(0);                 // as often as they fit
  alignas(16) int8_t value_table_[kMaxKeyLevels] = {};
  float *keys_, *sign_keys_, *values_, *staging_, *scores_, *sign_scores_, *norms_, *residual_norms_, *value_norms_, *out_,
      *max_, *sum_;
};

}  // namespace
}  // namespace tqext::cpu
