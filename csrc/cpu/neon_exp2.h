// Exponentials for the NEON kernels. Included inside the target pragma of each: internal linkage only.
#pragma once

#include <arm_neon.h>

namespace tqext::cpu {
namespace {

// 2^x for x <= 0, relative error 1e-7; 0 below -100, NaN stays.
inline float32x4_t exp2_neon(float32x4_t x) {
  const float32x4_t n = vrndnq_f32(x), f = vsubq_f32(x, n);
  float32x4_t y = vdupq_n_f32(1.3276471781512866e-3f);
  y = vfmaq_f32(vdupq_n_f32(9.67554133276717e-3f), y, f);
  y = vfmaq_f32(vdupq_n_f32(5.55071327415071e-2f), y, f);
  y = vfmaq_f32(vdupq_n_f32(2.40221197238820e-1f), y, f);
  y = vfmaq_f32(vdupq_n_f32(6.93146967064360e-1f), y, f);
  y = vfmaq_f32(vdupq_n_f32(1.0000000716546738f), y, f);
  const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(y), vreinterpretq_u32_s32(vshlq_n_s32(vcvtq_s32_f32(n), 23)));
  return vreinterpretq_f32_u32(vbicq_u32(bits, vcltq_f32(x, vdupq_n_f32(-100.0f))));
}

}  // namespace
}  // namespace tqext::cpu
