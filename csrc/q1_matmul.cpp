#include "q1_matmul.h"

#include "check_arrays.h"
#include "cpu/environment.h"
#include "format.h"
#include "mlx/ops.h"
#include "q1_quantize.h"

namespace tqext {

namespace {

void check_product(const mx::array& x, const mx::array& weight, const mx::array& scales) {
  check_activation(x, "q1_matmul", "x");
  check(weight.ndim() == 2, "[q1_matmul] weight: expected 2 axes, got shape ", weight.shape());
  check_q1(weight, scales, "q1_matmul");
  check(x.ndim() >= 1 && x.shape(-1) == weight.shape(1) * 32, "[q1_matmul] x: expected a last axis of ", weight.shape(1) * 32,
        ", got shape ", x.shape());
}

}  // namespace

mx::array q1_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::StreamOrDevice s) {
  check_product(x, weight, scales);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  if (stream.device == mx::Device::gpu && x.size() > 0 && !gpu_multiplies_bits(x, stream)) {
    // bf16 could not hold the scales: fp32 (TF32, where MLX chooses that) holds them and bf16 x exactly.
    const mx::Dtype type = x.dtype() == mx::bfloat16 ? mx::float32 : x.dtype();
    const mx::array w = q1_dequantize(weight, scales, type, stream);
    return mx::astype(mx::matmul(mx::astype(x, type, stream), mx::transpose(w, stream), stream), x.dtype(), stream);
  }
  auto primitive = std::make_shared<Q1Matmul>(stream);
  const mx::Shape shape = primitive->output_shapes({x, weight, scales})[0];
  return mx::array(shape, x.dtype(), primitive, {x, weight, scales});
}

std::vector<mx::Shape> Q1Matmul::output_shapes(const std::vector<mx::array>& inputs) {
  check_product(inputs[0], inputs[1], inputs[2]);
  mx::Shape shape = inputs[0].shape();
  shape.back() = inputs[1].shape(0);
  return {shape};
}

}  // namespace tqext
