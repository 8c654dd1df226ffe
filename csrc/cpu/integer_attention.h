// What the integer kernels of coded tokens share: how numbers become integers of a few bytes, when a block
// counts, and how many bytes a query type needs.
// Included inside the target pragma of each: internal linkage only.
#pragma once

#include "attention_kernels.h"

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
};

template <class Attention>
void attend_with(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end, Partial* partials) {
  Attention attention(head, shape, rows);
  attention.attend(begin, end);
  attention.finish(partials);
}

// Attention<N>: the kernel with N bytes for a query element and a weight.
template <template <int> class Attention>
void attend_in_integers(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                        Partial* partials) {
  if (shape.half_query) {
    attend_with<Attention<2>>(head, shape, rows, begin, end, partials);
  } else {
    attend_with<Attention<3>>(head, shape, rows, begin, end, partials);
  }
}

}  // namespace
}  // namespace tqext::cpu
