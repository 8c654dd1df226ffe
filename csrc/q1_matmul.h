// q1_matmul: x @ W^T with 1-bit weights (format.h).
//
// y[n, r] = sum over groups g of scale[r, g] * (2 * sum of x[n, c] over the columns c of g whose bit is 1 - sum of x[n, c] over
// g) Sums in fp32 or better: compared with float64 over the same bits, the error, relative to the largest output, is at most
// 1e-5 for fp32 x; fp16 and bf16 x are exact in fp32, so only the output is rounded. NaN in x reaches every output of its row;
// infinity gives an infinity or NaN.
//
// For the GPU backends: inputs x, weight, scales as below, out contiguous; n = product of x's leading axes. 1 ... 8 rows of x
// are decoding and speculative verification (bound by the weights: read them once for all rows), more are prefill. x has any
// strides (mx::contiguous it where that is awkward); weight and scales come with a contiguous last axis except for odd views.
// The host struct for kernels is Q1MatmulParams in q1_params.h.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

// x [..., cols] float32/float16/bfloat16, weight uint32 [rows, cols / 32], scales float16 [rows, cols / 128]
// -> [..., rows] in x's dtype.
mx::array q1_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::StreamOrDevice s);

// Inputs: x, weight, scales.
class Q1Matmul : public mx::UnaryPrimitive {
 public:
  explicit Q1Matmul(mx::Stream stream) : UnaryPrimitive(stream) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(Q1Matmul)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive&) const override { return true; }
};

// Whether a GPU's kernels take this x; else the weights are dequantised for the call.
bool gpu_multiplies_bits(const mx::array& x, mx::Stream stream);

}  // namespace tqext
