#include "q1_matmul.h"

#include "launch.h"
#include "mlx/allocator.h"
#include "q1_quantize.h"
#include "ternary_matmul.h"

namespace tqext {

namespace {

using metal::Q1Op;

// x as rows: [n, last] for any leading axes.
struct Rows {
  mx::array data;
  int n, stride;
};

Rows rows_of(mx::Stream stream, const mx::array& x) {
  const int last = x.shape(-1), n = last ? int(x.size() / last) : 0;
  if (x.ndim() == 2 && (last == 1 || x.strides(1) == 1)) return {x, n, int(x.strides(0))};
  return {metal::contiguous(stream, x), n, last};
}

void run(mx::Stream stream, Q1Op op, mx::Dtype type, const Q1MatmulParams& params,
         const std::vector<metal::Binding>& bindings) {
  metal::launch(stream, metal::plan_q1(op, metal::type_of(type), params), bindings, params, kQ1Params);
}

void multiply(mx::Stream stream, Q1Op op, const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  // Without columns the sums are empty; any array stands in for the inputs that are never read.
  const bool empty = inputs[0].size() == 0;
  const Rows x = empty ? Rows{out, int(out.size() / out.shape(-1)), 0} : rows_of(stream, inputs[0]);
  const Rows weight = empty ? Rows{out, out.shape(-1), 0} : rows_of(stream, inputs[1]);
  const Rows scales = empty ? Rows{out, out.shape(-1), 0} : rows_of(stream, inputs[2]);
  const Q1MatmulParams params{x.n, weight.n, empty ? 0 : inputs[2].shape(-1), x.stride, weight.stride, scales.stride};
  run(stream, op, out.dtype(), params,
      {{kQ1X, &x.data, false}, {kQ1Weight, &weight.data, false}, {kQ1Scales, &scales.data, false}, {kQ1Out, &out, true}});
}

}  // namespace

bool gpu_multiplies_bits(const mx::array&, mx::Stream) { return true; }

void Q1Matmul::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  multiply(stream(), Q1Op::kMatmul, inputs, out);
}

void TernaryMatmul::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  multiply(stream(), Q1Op::kTernary, inputs, out);
}

void Q1Quantize::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& x : outputs) x.set_data(mx::allocator::malloc(x.nbytes()));
  if (inputs[0].size() == 0) return;
  const Rows w = rows_of(stream(), inputs[0]);
  const Q1MatmulParams params{0, w.n, outputs[1].shape(-1), w.stride, 0, 0};
  run(stream(), Q1Op::kQuantize, inputs[0].dtype(), params,
      {{kQ1X, &w.data, false}, {kQ1Weight, &outputs[0], true}, {kQ1Scales, &outputs[1], true}});
}

void Q1Dequantize::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  const Rows weight = rows_of(stream(), inputs[0]), scales = rows_of(stream(), inputs[1]);
  const Q1MatmulParams params{0, weight.n, inputs[1].shape(-1), 0, weight.stride, scales.stride};
  run(stream(), Q1Op::kDequantize, out.dtype(), params,
      {{kQ1Weight, &weight.data, false}, {kQ1Scales, &scales.data, false}, {kQ1Out, &out, true}});
}

}  // namespace tqext
