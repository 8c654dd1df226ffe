#include "ternary_matmul.h"

#include <optional>

#include "coded_weights.h"
#include "cpu/environment.h"
#include "format.h"
#include "mlx/ops.h"

namespace tqext {

namespace {

// MLX's product: a weight is scale * code + bias with a bias of -scale, which is the same number.
mx::array affine_product(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::Stream stream) {
  // bf16 could not hold the scales: fp32 holds them and bf16 x exactly.
  const mx::Dtype type = x.dtype() == mx::bfloat16 ? mx::float32 : x.dtype();
  // Its CUDA kernels refuse rows that do not follow each other; what lies so already is not copied.
  const mx::array words = mx::contiguous(weight, false, stream);
  const mx::array factors = mx::contiguous(mx::astype(scales, type, stream), false, stream);
  const mx::array biases = mx::negative(factors, stream);
  const mx::array rows = mx::astype(x.ndim() == 1 ? mx::expand_dims(x, 0, stream) : x, type, stream);
#ifdef __APPLE__
  constexpr bool decoded = false;
#else
  // A tile of MLX's CUDA product of fp32 has 64 KB from 33 rows on, more than its launch asks for.
  const bool decoded = type == mx::float32;
#endif
  auto product = [&] {
    if (!decoded) return mx::quantized_matmul(rows, words, factors, biases, true, kTernaryGroup, 2, "affine", stream);
    const mx::array dense = mx::dequantize(words, factors, biases, kTernaryGroup, 2, "affine", std::nullopt, type, stream);
    return mx::matmul(rows, mx::transpose(dense, stream), stream);
  };
  const mx::array y = product();
  return mx::astype(x.ndim() == 1 ? mx::squeeze(y, 0, stream) : y, x.dtype(), stream);
}

// Rows of x up to which a GPU's own kernel computes; of more, MLX's product.
int64_t gpu_rows([[maybe_unused]] mx::Dtype type) {
#ifdef __APPLE__
  return kTernaryMetalRows;
#else
  return type == mx::float16 ? kTernaryCudaRows : kTernaryCudaWideRows;
#endif
}

}  // namespace

mx::array ternary_matmul(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::StreamOrDevice s) {
  const mx::Shape shape = product_shape({x, weight, scales}, 2, "ternary_matmul");
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  if (stream.device == mx::Device::gpu && int64_t(x.size()) > gpu_rows(x.dtype()) * x.shape(-1) && weight.size() > 0) {
    return affine_product(x, weight, scales, stream);
  }
  return mx::array(shape, x.dtype(), std::make_shared<TernaryMatmul>(stream), {x, weight, scales});
}

std::vector<mx::Shape> TernaryMatmul::output_shapes(const std::vector<mx::array>& inputs) {
  return {product_shape(inputs, 2, "ternary_matmul")};
}

}  // namespace tqext
