#include "ternary_matmul.h"

#include <optional>

#include "check_arrays.h"
#include "cpu/environment.h"
#include "format.h"
#include "mlx/ops.h"

namespace tqext {

namespace {

void check_product(const mx::array& x, const mx::array& weight, const mx::array& scales) {
  check_activation(x, "ternary_matmul", "x");
  check_dtype(weight, mx::uint32, "ternary_matmul", "weight");
  check_dtype(scales, mx::float16, "ternary_matmul", "scales");
  check(weight.ndim() == 2 && weight.shape(1) % kTernaryWords == 0,
        "[ternary_matmul] weight: expected 2 axes, the last one a multiple of ", int(kTernaryWords), " words (",
        int(kTernaryGroup), " weights), got shape ", weight.shape());
  check_shape(scales, {weight.shape(0), weight.shape(1) / kTernaryWords}, "ternary_matmul", "scales");
  // As a 64-bit number: a weight of 2^28 words has more columns than an axis can have.
  const int64_t columns = int64_t(weight.shape(1)) * 16;
  check(x.ndim() >= 1 && x.shape(-1) == columns, "[ternary_matmul] x: expected a last axis of ", columns, ", got shape ",
        x.shape());
}

// MLX's product: a weight is scale * code + bias with a bias of -scale, which is the same number.
mx::array affine_product(const mx::array& x, const mx::array& weight, const mx::array& scales, mx::Stream stream) {
  // bf16 could not hold the scales: fp32 holds them and bf16 x exactly.
  const mx::Dtype type = x.dtype() == mx::bfloat16 ? mx::float32 : x.dtype();
  // Its CUDA kernels refuse rows that do not follow each other; what lies so already is not copied.
  const mx::array words = mx::contiguous(weight, false, stream);
  const mx::array factors = mx::contiguous(mx::astype(scales, type, stream), false, stream);
  const mx::array biases = mx::negative(factors, stream);
  const mx::array rows = mx::astype(x.ndim() == 1 ? mx::expand_dims(x, 0, stream) : x, type, stream);
  mx::array y = rows;
#ifdef __APPLE__
  constexpr bool decoded = false;
#else
  // A tile of MLX's CUDA product of fp32 has 64 KB from 33 rows on, more than its launch asks for.
  const bool decoded = type == mx::float32;
#endif
  if (decoded) {
    const mx::array dense = mx::dequantize(words, factors, biases, kTernaryGroup, 2, "affine", std::nullopt, type, stream);
    y = mx::matmul(rows, mx::transpose(dense, stream), stream);
  } else {
    y = mx::quantized_matmul(rows, words, factors, biases, true, kTernaryGroup, 2, "affine", stream);
  }
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
  check_product(x, weight, scales);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  if (stream.device == mx::Device::gpu && int64_t(x.size()) > gpu_rows(x.dtype()) * x.shape(-1) && weight.size() > 0) {
    return affine_product(x, weight, scales, stream);
  }
  auto primitive = std::make_shared<TernaryMatmul>(stream);
  const mx::Shape shape = primitive->output_shapes({x, weight, scales})[0];
  return mx::array(shape, x.dtype(), primitive, {x, weight, scales});
}

std::vector<mx::Shape> TernaryMatmul::output_shapes(const std::vector<mx::array>& inputs) {
  check_product(inputs[0], inputs[1], inputs[2]);
  mx::Shape shape = inputs[0].shape();
  shape.back() = inputs[1].shape(0);
  return {shape};
}

}  // namespace tqext
