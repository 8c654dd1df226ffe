// ternary_matmul: x @ W^T with ternary weights (format.h).
//
// y[n, r] = sum over groups g of scale[r, g] * (sum of (code - 1) * x[n, c] over the columns c of g). Accuracy, NaN and
// infinity as q1_matmul.h has them. GPUs have kernels for a few rows of x, which read 2.125 bits per weight once; products of
// more rows are MLX's own quantised ones, which take the same words with biases of -scale.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

// x [..., cols] float32/float16/bfloat16, weight uint32 [rows, cols / 16], scales float16 [rows, cols / 128]
// -> [..., rows] in x's dtype.
mx::array ternary_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::StreamOrDevice s);

// Inputs: x, weight, scales. Takes any number of rows of x, as a compiled graph without shapes asks for.
class TernaryMatmul : public mx::UnaryPrimitive {
 public:
  explicit TernaryMatmul(mx::Stream stream) : UnaryPrimitive(stream) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(TernaryMatmul)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive&) const override { return true; }
};

// Rows of x up to which a GPU's own kernels compute. On CUDA, beyond them: float16 rows by MLX's product of the codes, others
// by its product with weights decoded to fp32.
constexpr int kTernaryMetalRows = 8, kTernaryCudaRows = 7, kTernaryCudaWideRows = 24;

}  // namespace tqext
