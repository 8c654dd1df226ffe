#include "q1_quantize.h"

#include "check_arrays.h"
#include "coded_weights.h"
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

std::pair<mx::array, mx::array> q1_quantize(const mx::array& w, mx::StreamOrDevice s) {
  check_weights(w);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  auto primitive = std::make_shared<Q1Quantize>(stream);
  auto outputs = mx::array::make_arrays(primitive->output_shapes({w}), {mx::uint32, mx::float16}, primitive, {w});
  return {outputs[0], outputs[1]};
}

mx::array q1_dequantize(const mx::array& weight, const mx::array& scales, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_coded(weight, scales, 1, "q1_dequantize");
  check(is_activation(dtype), "[q1_dequantize] dtype: expected float32, float16 or bfloat16, got ", dtype);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  return mx::array(with_last(weight.shape(), coded_columns(weight, 1)), dtype, std::make_shared<Q1Dequantize>(stream, dtype),
                   {weight, scales});
}

std::vector<mx::Shape> Q1Quantize::output_shapes(const std::vector<mx::array>& inputs) {
  check_weights(inputs[0]);
  const mx::Shape& shape = inputs[0].shape();
  return {with_last(shape, shape.back() / 32), with_last(shape, shape.back() / kQ1Group)};
}

std::vector<mx::Shape> Q1Dequantize::output_shapes(const std::vector<mx::array>& inputs) {
  check_coded(inputs[0], inputs[1], 1, "q1_dequantize");
  return {with_last(inputs[0].shape(), coded_columns(inputs[0], 1))};
}

}  // namespace tqext
