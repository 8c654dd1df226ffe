// What the integer kernels of coded tokens share: how numbers become integers of a few bytes, when a block
// counts, how many bytes a query type needs, and which rows share a pass.
// Included inside the target pragma of each: internal linkage only.
#pragma once

#include "attention_kernels.h"
#include "fp32_attention.h"
#include "softmax.h"

namespace tqext::cpu {
namespace {

constexpr int kSet = 4;                 // rows that share a pass over a block's decoded codes
constexpr float kLeastWeight = 1e-30f;  // products below it, of weights relative to 1, add nothing in fp32
constexpr float kNegligible = 48;  // a block whose weights are all below 2^-48 of the largest so far changes nothing in fp32

// Pieces of a signed integer: the low ones hold a digit in [-128, 127] plus 128, so that a byte of x + bias is a digit.
template <int N>
struct Pieces {
  static constexpr int kBias = N == 2 ? 0x80 : 0x8080;
  // Rounding and the bias may not carry out of the top byte.
  static constexpr float kQueryTop = N == 2 ? 32600.0f : 8355000.0f;
  // Weights are integers in the mantissa of 1.5 * 2^23 + x: 23 bits.
  static constexpr float kWeightTop = N == 2 ? 32600.0f : 4160000.0f;
  static constexpr float kMagic = 12582912.0f + kBias;
  static constexpr uint32_t kMagicBits = 0x4b400000u + kBias;  // of the float
};

// What a query row, whose largest number is `largest`, is multiplied by to become integers; `step`: the value of a unit.
// Rows of nothing but numbers close to the subnormal ones score zero.
template <int N>
float query_factor(float largest, float& step) {
  step = largest > 0 ? largest / Pieces<N>::kQueryTop / float(kCodebookTop) : 0.0f;
  const float inverse = largest > 0 ? Pieces<N>::kQueryTop / largest : 0.0f;
  return inverse < 1e38f ? inverse : 0.0f;
}

// The same of a row's products of weight and scale in a block.
template <int N>
float weight_factor(float largest_product, float& step) {
  const bool counts = largest_product > kLeastWeight;
  step = counts ? largest_product / Pieces<N>::kWeightTop : 0.0f;
  return counts ? Pieces<N>::kWeightTop / largest_product : 0.0f;
}

// Raises a row's maximum to that of a block. The sums so far are to be multiplied by 2^old_exponent, the block's own, taken
// relative to its maximum, by 2^block_exponent. Returns whether the block changes nothing.
inline bool raise_max(float block_max, float& max, float& old_exponent, float& block_exponent) {
  const float old_max = max;
  max = block_max > old_max ? block_max : old_max;
  old_exponent = old_max == max ? 0.0f : old_max - max;
  block_exponent = block_max == max ? 0.0f : block_max - max;
  return block_max < old_max - kNegligible || block_max == kNegInf;
}

// A row that attended to a number which its integers have lost, or to NaN scores, is NaN.
inline void finish_row(Partial& p, bool lost, int value_dim) {
  const bool attended = p.max != kNegInf || p.sum != 0;
  if (!attended || !(lost || p.sum != p.sum)) return;
  p.max = 0;
  p.sum = __builtin_nanf("");
  for (int d = 0; d < value_dim; d++) p.out[d] = p.sum;
}

// What the means of a step's blocks add to a row's scores: `value[0]` to those of tokens [0, cut), `value[1]` to the rest. One
// that is not finite is taken as zero and marked.
struct StepOffset {
  float value[2] = {};
  bool bad[2] = {};
  int cut = kBlockTokens;

  StepOffset() = default;
  // The step: tokens [begin, begin + n), at most two blocks.
  StepOffset(const QueryRows& rows, int r, int begin, int n) : cut(kBlockTokens - begin % kBlockTokens) {
    if (!rows.offset) return;
    const float* x = rows.offset + r * rows.offset_stride + begin / kBlockTokens - rows.first_block;
    for (int i = 0; i < (n > cut ? 2 : 1); i++) {
      bad[i] = x[i] - x[i] != 0;
      value[i] = bad[i] ? 0.0f : x[i];
    }
  }
  // Whether a row with the scores s attends to a token whose offset was not finite.
  bool lost(const float* s, int n) const {
    if (!bad[0] && !bad[1]) return false;
    for (int t = 0; t < n; t++) {
      if (bad[t >= cut] && s[t] != kNegInf) return true;
    }
    return false;
  }
};

// One past the last token that any row attends to.
inline int last_attended(const QueryRows& rows) {
  int last = 0;
  for (int r = 0; r < rows.n_rows; r++) last = rows.end[r] > last ? rows.end[r] : last;
  return last;
}

// attend_set<H>(r) for all rows: rows r .. r + H - 1 on the block at hand.
template <class Attention>
void attend_sets(Attention& attention, int n_rows) {
  for (int r = 0; r < n_rows; r += kSet) {
    switch (smaller(kSet, n_rows - r)) {
      case 1:
        attention.template attend_set<1>(r);
        break;
      case 2:
        attention.template attend_set<2>(r);
        break;
      case 3:
        attention.template attend_set<3>(r);
        break;
      default:
        attention.template attend_set<4>(r);
    }
  }
}

template <class Attention>
void attend_with(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end, Partial* partials) {
  Attention attention(head, shape, rows);
  attention.attend(begin, end);
  attention.finish(partials);
}

// Attention<N, coding>: the kernel with N bytes for a query element and a weight.
template <template <int, ValueCoding> class Attention>
void attend_in_integers(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                        Partial* partials) {
  const bool lloyd = shape.value_coding == kValueLloyd;
  if (shape.half_query) {
    (lloyd ? attend_with<Attention<2, kValueLloyd>> : attend_with<Attention<2, kValueGroups>>)(head, shape, rows, begin, end,
                                                                                               partials);
  } else {
    (lloyd ? attend_with<Attention<3, kValueLloyd>> : attend_with<Attention<3, kValueGroups>>)(head, shape, rows, begin, end,
                                                                                               partials);
  }
}

}  // namespace
}  // namespace tqext::cpu
