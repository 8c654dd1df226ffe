#include "q1_quantize.h"

#include "check_arrays.h"
#include "cpu/environment.h"
#include "format.h"

namespace tqext {

namespace {

mx::Shape with_last(mx::Shape shape, int last) {
  shape.back() = last;
  return shape;
}

void check_weights(const mx::array& w) {
  check_activation(w, "q1_quantize", "w");
  check(w.ndim() >= 1 && w.shape(-1) % kQ1Group == 0, "[q1_quantize] w: expected a last axis that is a multiple of ",
        int(kQ1Group), ", got shape ", w.shape());
}

}  // namespace

void check_q1(const mx::array& weight, const mx::array& scales, const char* op) {
  check_dtype(weight, mx::uint32, op, "weight");
  check_dtype(scales, mx::float16, op, "scales");
  check(weight.ndim() >= 1 && weight.shape(-1) % kQ1Words == 0, "[", op,
        "] weight: expected a last axis that is a multiple of ", int(kQ1Words), " words (", int(kQ1Group),
        " weights), got shape ", weight.shape());
  check_shape(scales, with_last(weight.shape(), weight.shape(-1) / kQ1Words), op, "scales");
}

std::pair<mx::array, mx::array> q1_quantize(const mx::array& w, mx::StreamOrDevice s) {
  check_weights(w);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  auto primitive = std::make_shared<Q1Quantize>(stream);
  auto outputs = mx::array::make_arrays(primitive->output_shapes({w}), {mx::uint32, mx::float16}, primitive, {w});
  return {outputs[0], outputs[1]};
}

mx::array q1_dequantize(const mx::array& weight, const mx::array& scales, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_q1(weight, scales, "q1_dequantize");
  check(is_activation(dtype), "[q1_dequantize] dtype: expected float32, float16 or bfloat16, got ", dtype);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  return mx::array(with_last(weight.shape(), weight.shape(-1) * 32), dtype, std::make_shared<Q1Dequantize>(stream, dtype),
                   {weight, scales});
}

std::vector<mx::Shape> Q1Quantize::output_shapes(const std::vector<mx::array>& inputs) {
  check_weights(inputs[0]);
  const mx::Shape& shape = inputs[0].shape();
  return {with_last(shape, shape.back() / 32), with_last(shape, shape.back() / kQ1Group)};
}

std::vector<mx::Shape> Q1Dequantize::output_shapes(const std::vector<mx::array>& inputs) {
  check_q1(inputs[0], inputs[1], "q1_dequantize");
  return {with_last(inputs[0].shape(), inputs[0].shape(-1) * 32)};
}

}  // namespace tqext
