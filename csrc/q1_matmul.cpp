#include "q1_matmul.h"

#include "coded_weights.h"
#include "cpu/environment.h"
#include "mlx/ops.h"
#include "q1_quantize.h"

namespace tqext {

mx::array q1_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::StreamOrDevice s) {
  const mx::Shape shape = product_shape({x, weight, scales}, 1, "q1_matmul");
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  if (stream.device == mx::Device::gpu && x.size() > 0 && !gpu_multiplies_bits(x, stream)) {
    // bf16 could not hold the scales: fp32 (TF32, where MLX chooses that) holds them and bf16 x exactly.
    const mx::Dtype type = x.dtype() == mx::bfloat16 ? mx::float32 : x.dtype();
    const mx::array w = q1_dequantize(weight, scales, type, stream);
    return mx::astype(mx::matmul(mx::astype(x, type, stream), mx::transpose(w, stream), stream), x.dtype(), stream);
  }
  return mx::array(shape, x.dtype(), std::make_shared<Q1Matmul>(stream), {x, weight, scales});
}

std::vector<mx::Shape> Q1Matmul::output_shapes(const std::vector<mx::array>& inputs) {
  return {product_shape(inputs, 1, "q1_matmul")};
}

}  // namespace tqext
