// Online softmax in base 2, for all backends: constants, and the factor of a running sum when its maximum moves.
#pragma once

#include "format.h"
#if !defined(__METAL_VERSION__) && !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <cmath>
#include <limits>
#endif

#if !defined(__METAL_VERSION__)
namespace tqext {
#endif

TQ_TABLE float kLog2e = 1.44269504088896341f;

// The maximum of a row that has attended to nothing, with a sum of 0: -inf on the CPU and in Metal, where rescale() keeps the
// difference of two of them from NaN; a finite number in CUDA, whose differences need no care.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
constexpr float kEmptyMax = -1e30f;
#elif !defined(__METAL_VERSION__)
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
#endif

// Factor for sums taken relative to old_max when new_max becomes the reference.
#if defined(__METAL_VERSION__)
inline float rescale(float old_max, float new_max) {
  return old_max == new_max ? 1.0f : metal::fast::exp2(old_max - new_max);  // -inf - -inf is NaN
}
#elif !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
inline float rescale(float old_max, float new_max) {
  return old_max == new_max ? 1.0f : std::exp2(old_max - new_max);  // -inf - -inf is NaN
}
#endif

#if !defined(__METAL_VERSION__)
}  // namespace tqext
#endif
