// q1_quantize, q1_dequantize: weights to sign bits with one scale per group of 128 (format.h), and back.
//
// bit = w >= 0 (of both zeros: 1), scale = mean |w| of the group, in fp16, clipped to TQ_HALF_MAX; NaN stays NaN.
// Weights that are +-scale already come back unchanged.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

// w [..., cols] float32/float16/bfloat16, cols a multiple of 128 -> weight uint32 [..., cols / 32], scales float16 [..., cols /
// 128].
std::pair<mx::array, mx::array> q1_quantize(const mx::array& w, mx::StreamOrDevice s);

// -> [..., cols] in dtype.
mx::array q1_dequantize(const mx::array& weight, const mx::array& scales, mx::Dtype dtype, mx::StreamOrDevice s);

// Input: w. Outputs: weight, scales.
class Q1Quantize : public mx::Primitive {
 public:
  explicit Q1Quantize(mx::Stream stream) : Primitive(stream) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  DEFINE_NAME(Q1Quantize)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive&) const override { return true; }
};

// Inputs: weight, scales. Output: the weights.
class Q1Dequantize : public mx::UnaryPrimitive {
 public:
  explicit Q1Dequantize(mx::Stream stream, mx::Dtype dtype) : UnaryPrimitive(stream), dtype_(dtype) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(Q1Dequantize)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override { return dtype_ == static_cast<const Q1Dequantize&>(other).dtype_; }

 private:
  mx::Dtype dtype_;
};

}  // namespace tqext
