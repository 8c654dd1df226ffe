// Online softmax in base 2: scaling of a running sum when its maximum moves.
#pragma once

#include <cmath>
#include <limits>

namespace tqext {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;

// Factor for sums taken relative to old_max when new_max becomes the reference.
inline float rescale(float old_max, float new_max) {
  return old_max == new_max ? 1.0f : std::exp2(old_max - new_max);  // -inf - -inf is NaN
}

}  // namespace tqext
