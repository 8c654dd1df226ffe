// Exponentials for the NEON kernels. Included inside the target pragma of each: internal linkage only.
#pragma once

#include <arm_neon.h>

#include "exp2_polynomial.h"

namespace tqext::cpu {
namespace {

struct NeonFloats {
  using F = float32x4_t;
  static F set1(float x) { return vdupq_n_f32(x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
};

// 2^x for x <= 0, relative error 1e-7; 0 below -100, NaN stays.
inline float32x4_t exp2_neon(float32x4_t x) {
  const float32x4_t n = vrndnq_f32(x), f = vsubq_f32(x, n);
  const float32x4_t y = exp2_polynomial<NeonFloats>(f);
  const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(y), vreinterpretq_u32_s32(vshlq_n_s32(vcvtq_s32_f32(n), 23)));
  return vreinterpretq_f32_u32(vbicq_u32(bits, vcltq_f32(x, vdupq_n_f32(-100.0f))));
}

}  // namespace
}  // namespace tqext::cpu
