// Codes to levels as pairs of halves (format.h), by permutations of bytes.
#pragma once

#include "device.cuh"
#include "warpgroup.cuh"

namespace tqext::cuda {

// A pair of halves.
TQ_DEVICE constexpr uint32_t both(uint32_t half) { return half * 0x10001u; }

// Four halves of levels times factor from the four lowest nibbles of select, each a code.
template <int kBits>
TQ_DEVICE uint2 find_levels(const uint32_t (&levels)[4], uint32_t select, uint32_t top, uint32_t factor) {
  uint32_t a, b;
  if constexpr (kBits <= 3) {
    const uint32_t high = permute(levels[0], levels[1], select), low = permute(levels[2], levels[3], select);
    a = permute(low, high, 0x5140);
    b = permute(low, high, 0x7362);
  } else {
    // 8 + (level + 128) / 128 as fp16.
    const uint32_t upper = permute(0x0000ff00u, 0u, top);  // 0xff where the code is 8 or more
    const uint32_t bytes = (permute(levels[0], levels[1], select) & ~upper) | (permute(levels[2], levels[3], select) & upper);
    a = add_halves(permute(bytes, 0x48484848u, 0x4140), 0xc880c880u);  // less 9
    b = add_halves(permute(bytes, 0x48484848u, 0x4342), 0xc880c880u);
  }
  return make_uint2(multiply_halves(a, factor), multiply_halves(b, factor));
}

}  // namespace tqext::cuda
