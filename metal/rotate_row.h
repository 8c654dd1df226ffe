// rotate() of format.h on one simdgroup; lane holds x[i] = value 32 i + lane of a vector of D values. scale is 1 / sqrt(D) as
// the host rounds it.
#pragma once

#include <metal_simdgroup>
#include <metal_stdlib>

#include "format.h"
#include "hadamard.h"

using namespace metal;

// A fused multiply-add where the CPU has none would change bytes; where the kernels want one they say fma.
#pragma clang fp contract(off)

template <int D>
struct HadamardShape {
  // 1 or the factor of format.h's hadamard_factor(), for dimensions that have one.
  static constant constexpr int kFactor = (D & (D - 1)) == 0 ? 1 : D % 7 == 0 ? 28 : D % 5 == 0 ? 20 : 12;
  static constant constexpr int kSylvester = D / kFactor;
};

// The butterflies run from the nearest partner to the farthest, as on the CPU: the same roundings, the same bytes.
template <int D>
inline void sylvester(thread float* x, uint lane) {
  constexpr int n = HadamardShape<D>::kSylvester;
#pragma clang loop unroll(full)
  for (ushort h = 1; h < 32 && h < n; h *= 2) {
    for (int i = 0; i < D / 32; i++) {
      const float y = simd_shuffle_xor(x[i], h);
      x[i] = (lane & h) ? y - x[i] : x[i] + y;
    }
  }
#pragma clang loop unroll(full)
  for (int s = 1; 32 * s < n; s *= 2) {
    for (int i = 0; i < D / 32; i++) {
      if ((i & s) == 0) {
        const float a = x[i], b = x[i + s];
        x[i] = a + b;
        x[i + s] = a - b;
      }
    }
  }
}

// The small factor's matrix or its transpose; scratch: D floats of this simdgroup.
template <int D>
inline void small_hadamard(thread float* x, threadgroup float* scratch, uint lane, bool transposed) {
  constexpr int m = HadamardShape<D>::kFactor, n = HadamardShape<D>::kSylvester;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < D / 32; i++) scratch[32 * i + int(lane)] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane), row = d / n, column = d % n;
    float sum = 0.0f;
    for (int k = 0; k < m; k++) {
      const float y = scratch[k * n + column];
      const uint bits = hadamard_row(m, transposed ? k : row);
      sum += (bits >> uint(transposed ? row : k) & 1u) ? -y : y;
    }
    x[i] = sum;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

template <int D>
inline void apply_signs(thread float* x, uint seed, float scale, uint lane) {
  for (int i = 0; i < D / 32; i++) x[i] *= (sign_word(seed, i) >> lane & 1u) ? -scale : scale;
}

template <int D>
inline void rotate_row(thread float* x, uint seed, float scale, threadgroup float* scratch, uint lane) {
  apply_signs<D>(x, seed, scale, lane);
  sylvester<D>(x, lane);
  if (HadamardShape<D>::kFactor > 1) small_hadamard<D>(x, scratch, lane, false);
}

template <int D>
inline void rotate_row_back(thread float* x, uint seed, float scale, threadgroup float* scratch, uint lane) {
  if (HadamardShape<D>::kFactor > 1) small_hadamard<D>(x, scratch, lane, true);
  sylvester<D>(x, lane);
  apply_signs<D>(x, seed, scale, lane);
}
