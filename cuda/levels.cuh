// Codes to levels as pairs of halves (format.h), by permutations of bytes.
#pragma once

#include "device.cuh"
#include "warpgroup.cuh"

namespace tqext::cuda {

// A pair of halves.
TQ_DEVICE constexpr uint32_t both(uint32_t half) { return half * 0x10001u; }

// The codes of a unit's 32 dimensions, eight to a word: the low three bits of each nibble of select, the fourth bit in top.
template <int kBits>
TQ_DEVICE void split_codes(const uint32_t* w, uint32_t (&select)[4], uint32_t (&top)[4]) {
#pragma unroll
  for (int s = 0; s < 4; s++) top[s] = 0;
  if constexpr (kBits == 4) {
#pragma unroll
    for (int s = 0; s < 4; s++) select[s] = w[s] & 0x77777777u, top[s] = w[s] >> 3 & 0x11111111u;
  } else if constexpr (kBits == 3) {
    select[0] = w[0] & 0x77777777u;
    select[1] = w[1] & 0x77777777u;
    select[2] = w[2] & 0x77777777u;
    select[3] = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
  } else {
    select[0] = w[0] & 0x33333333u;
    select[1] = w[1] & 0x33333333u;
    select[2] = w[0] >> 2 & 0x33333333u;
    select[3] = w[1] >> 2 & 0x33333333u;
  }
}

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
