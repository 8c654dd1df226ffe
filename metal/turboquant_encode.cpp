#include "turboquant_encode.h"

#include <algorithm>

#include "launch.h"
#include "mlx/allocator.h"

namespace tqext {

namespace {

using metal::EncodeOp;
using metal::EncodeShape;

void allocate(std::vector<mx::array>& outputs) {
  for (auto& x : outputs) x.set_data(mx::allocator::malloc(x.nbytes()));
}

EncodeShape shape_of(const mx::array& x, mx::Dtype type, int head_dim, int bits, int flags) {
  EncodeShape shape{};
  shape.type = metal::type_of(type);
  shape.batch = x.shape(0);
  shape.n_heads = x.shape(1);
  shape.n_tokens = x.shape(2);
  shape.head_dim = head_dim;
  shape.bits = bits;
  shape.flags = flags;
  shape.in = metal::strides4(x);
  return shape;
}

// What the keys were centred and balanced by.
void add_centre(EncodeShape& shape, const mx::array* means, const mx::array* balance, std::vector<metal::Binding>& bindings) {
  if (means) {
    shape.flags |= kEncodeMeans | (means->dtype() == mx::float32 ? kEncodeFloatMeans : 0);
    shape.means = metal::strides4(*means);
    bindings.push_back({kEncodeMeanVectors, means, false});
  }
  if (balance) {
    shape.flags |= kEncodeBalance;
    shape.balance = metal::balance_strides(*balance);
    bindings.push_back({kEncodeBalanceVectors, balance, false});
  }
}

void run(mx::Stream stream, EncodeOp op, const EncodeShape& shape, std::vector<metal::Binding> bindings) {
  const metal::EncodePlan plan = metal::plan_encode(op, shape);
  // Absent arguments are never read, but every index must hold a buffer.
  for (int index = 0; index < kEncodeParams; index++) {
    const bool bound = std::any_of(bindings.begin(), bindings.end(), [&](const auto& b) { return b.index == index; });
    if (!bound) bindings.push_back({index, bindings[0].array, false});
  }
  metal::launch(stream, plan.dispatch, bindings, plan.params, kEncodeParams);
}

}  // namespace

bool gpu_codes_blocks() { return false; }

void QuantizeKeys::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(outputs);
  const mx::array& k = inputs[0];
  if (k.size() == 0) return;
  const int flags = (state_.hadamard ? kEncodeHadamard : 0) | (state_.qjl ? kEncodeResidual : 0);
  EncodeShape shape = shape_of(k, k.dtype(), k.shape(3), state_.bits, flags);
  std::vector<metal::Binding> bindings{
      {kEncodeIn, &k, false}, {kEncodeOut, &outputs[0], true}, {kEncodeOutParams, &outputs[1], true}};
  if (state_.qjl) {
    bindings.push_back({kEncodeSigns, &outputs[2], true});
    bindings.push_back({kEncodeResidualNorms, &outputs[3], true});
  }
  add_centre(shape, means(inputs), balance(inputs), bindings);
  run(stream(), EncodeOp::kQuantizeKeys, shape, bindings);
}

void QuantizeValues::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(outputs);
  const mx::array& v = inputs[0];
  if (v.size() == 0) return;
  const EncodeShape shape = shape_of(v, v.dtype(), v.shape(3), state_.bits, state_.hadamard ? kEncodeHadamard : 0);
  const bool lloyd = state_.coding == kValueLloyd;
  run(stream(), lloyd ? EncodeOp::kQuantizeValuesLloyd : EncodeOp::kQuantizeValuesGroups, shape,
      {{kEncodeIn, &v, false}, {kEncodeOut, &outputs[0], true}, {kEncodeOutParams, &outputs[1], true}});
}

void Dequantize::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  const mx::array codes = metal::packed_input(stream(), inputs[0]), params = metal::packed_input(stream(), inputs[1]);
  EncodeShape shape = shape_of(codes, out.dtype(), state_.head_dim, state_.bits, state_.hadamard ? kEncodeHadamard : 0);
  shape.in_params = metal::strides3(params, state_.groups ? 2 : 1);
  std::vector<metal::Binding> bindings{{kEncodeIn, &codes, false}, {kEncodeInParams, &params, false}, {kEncodeOut, &out, true}};
  add_centre(shape, means(inputs), balance(inputs), bindings);
  run(stream(), state_.groups ? EncodeOp::kDequantizeGroups : EncodeOp::kDequantizeLevels, shape, bindings);
}

void Rotate::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  // Rows of any number of axes, as [1, 1, n_rows, dim].
  const mx::array x = metal::contiguous(stream(), inputs[0]);
  const int dim = out.shape(-1);
  EncodeShape shape{};
  shape.type = metal::type_of(out.dtype());
  shape.batch = shape.n_heads = 1;
  shape.n_tokens = int(out.size() / dim);
  shape.head_dim = dim;
  shape.flags = inverse_ ? kEncodeInverse : 0;
  shape.in = {0, 0, dim, 1};
  run(stream(), EncodeOp::kRotate, shape, {{kEncodeIn, &x, false}, {kEncodeOut, &out, true}});
}

}  // namespace tqext
