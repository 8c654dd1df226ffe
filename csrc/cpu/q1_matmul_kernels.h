// Kernels of q1_matmul and ternary_matmul on the CPU. All have one signature; the portable ones are the specification.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core_api.h"
#include "isa.h"

namespace tqext::cpu {

// Rows of packed weights with one fp16 scale per 128 columns; strides are in elements of the pointed-to type.
struct Q1Matrix {
  const uint32_t* weight;  // (n_rows, n_groups * 4): sign bits; (n_rows, n_groups * 8): codes of two bits
  const uint16_t* scales;  // (n_rows, n_groups), fp16
  ptrdiff_t weight_stride, scale_stride;
  int n_groups;
};

// A kernel takes at most this many rows of x in one pass over the weights.
constexpr int kQ1MaxInputs = 8;

// out[i * out_stride + r] = sum over columns c of scale(r, c / 128) * w(r, c) * x[i * x_stride + c]
// with w = +-1 (sign bits) or code - 1 (codes of two bits),
// for the rows r in [row_begin, row_end) and the inputs i in [0, n_inputs), 1 <= n_inputs <= kQ1MaxInputs.
// Accumulates in fp32. Everything is read and written with unaligned accesses.
using Q1MatmulKernel = void(const Q1Matrix& w, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                            float* out, ptrdiff_t out_stride);

Q1MatmulKernel q1_matmul_portable, q1_matmul_avx2, q1_matmul_avx512, q1_matmul_neon_dotprod;
Q1MatmulKernel ternary_matmul_portable, ternary_matmul_avx2, ternary_matmul_avx512, ternary_matmul_neon_dotprod;

// bits: 1, or 2 for ternary weights.
TQ_CORE Q1MatmulKernel* matmul_kernel_of(Isa isa, int bits);

// A weight is a sum over its bits. What bit b of a word adds, as a factor of the x of its column: a product, so that NaN in x
// reaches every row whatever its bits.
template <int kBits>  // of a weight
struct BitFactor {
  static constexpr int column(int b) { return b / kBits; }
  static constexpr float zero(int b) { return kBits == 1 || b % 2 == 0 ? -1.0f : 0.0f; }
  static constexpr float one(int b) { return kBits == 1 ? 1.0f : b % 2 == 0 ? 0.0f : 2.0f; }
};

// Calls run.operator()<n_inputs>(), 1 <= n_inputs <= most.
template <int most = kQ1MaxInputs, class Run>
void with_inputs(int n_inputs, const Run& run) {
  if constexpr (most > 1)
    if (n_inputs < most) return with_inputs<most - 1>(n_inputs, run);
  run.template operator()<most>();
}

}  // namespace tqext::cpu
