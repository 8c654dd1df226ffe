// What the integer kernels of coded tokens share: how numbers become integers of a few bytes, and when a block counts.
// Included inside the target pragma of each: internal linkage only.
#pragma once

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

}  // namespace
}  // namespace tqext::cpu
