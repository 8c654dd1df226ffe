// Arguments of the q1_matmul kernels on GPUs: one struct for host, Metal and CUDA.
#pragma once

#if !defined(__METAL_VERSION__)
#include <stdint.h>
#endif

#if !defined(__METAL_VERSION__)
namespace tqext {
#endif

struct Q1MatmulParams {
  int32_t n_inputs;       // rows of x
  int32_t n_rows;         // rows of the weight = columns of the output
  int32_t n_groups;       // of 128 columns
  int32_t x_stride;       // elements between rows of x
  int32_t weight_stride;  // words between rows of the weight
  int32_t scale_stride;   // fp16 numbers between rows of the scales
};

// Buffer indices.
enum : int { kQ1X, kQ1Weight, kQ1Scales, kQ1Out, kQ1Params };

#if !defined(__METAL_VERSION__)
static_assert(sizeof(Q1MatmulParams) == 24, "same layout on every backend");
}  // namespace tqext
#endif
