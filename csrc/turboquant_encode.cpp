#include "turboquant_encode.h"

#include "check.h"
#include "cpu/environment.h"
#include "mlx/ops.h"

namespace tqext {

namespace {

// [B, H, n, D] -> [B, H, n, last]
mx::Shape with_last(const mx::array& x, int last) {
  mx::Shape shape = x.shape();
  shape.back() = last;
  return shape;
}

void check_vectors(const mx::array& x, const char* op, const char* name) {
  check_activation(x, op, name);
  check(x.ndim() == 4, "[", op, "] ", name, ": expected 4 axes [batch, n_kv_heads, n_tokens, head_dim], got shape ", x.shape());
  check_head_dim(x.shape(-1), op, name);
}

}  // namespace

void check_bits(int bits, bool keys, const char* op) {
  if (keys) {
    check(bits >= 2 && bits <= 4, "[", op, "] bits: expected 2, 3 or 4 for keys, got ", bits);
  } else {
    check(bits == 2 || bits == 4, "[", op, "] bits: expected 2 or 4 for values, got ", bits);
  }
}

void check_head_dim(int head_dim, const char* op, const char* name) {
  check(head_dim % kDimStep == 0 && head_dim >= kDimStep && head_dim <= kMaxDim, "[", op, "] ", name,
        ": expected a head dimension that is a multiple of ", int(kDimStep), " up to ", int(kMaxDim), ", got ", head_dim);
}

namespace {

void check_packed(const mx::array& codes, const mx::array& params, const char* params_name, int per_token, mx::Dtype type,
                  int bits, int head_dim, bool keys, const char* op) {
  const char* what = keys ? "packed_k" : "packed_v";
  check_bits(bits, keys, op);
  check_head_dim(head_dim, op, what);
  check(codes.dtype() == mx::uint32, "[", op, "] ", what, ".codes: expected uint32, got ", codes.dtype());
  const int words = code_words(padded_dim(head_dim), bits);
  check(codes.ndim() == 4 && codes.shape(-1) == words, "[", op, "] ", what,
        ".codes: expected shape [batch, n_kv_heads, n_tokens, ", words, "] for ", bits, " bits and head dimension ", head_dim,
        ", got shape ", codes.shape());
  check(params.dtype() == type, "[", op, "] ", what, ".", params_name, ": expected ", type, ", got ", params.dtype());
  const mx::Shape shape = with_last(codes, per_token);
  check(params.shape() == shape, "[", op, "] ", what, ".", params_name, ": expected shape ", shape, ", got shape ",
        params.shape());
}

}  // namespace

void check_packed_keys(const mx::array& codes, const mx::array& norms, int bits, int head_dim, const char* op) {
  check_packed(codes, norms, "norms", 1, mx::float16, bits, head_dim, true, op);
}

void check_packed_values(const mx::array& codes, const mx::array& params, int bits, int head_dim, const char* op) {
  check_packed(codes, params, "params", value_params(padded_dim(head_dim)), mx::float16, bits, head_dim, false, op);
}

mx::array check_mean(const mx::array& mean, int batch, int n_kv_heads, int head_dim, const char* op, mx::Stream stream) {
  check_activation(mean, op, "mean");
  check(mean.ndim() == 3 && (mean.shape(0) == batch || mean.shape(0) == 1) && mean.shape(1) == n_kv_heads &&
            mean.shape(2) == head_dim,
        "[", op, "] mean: expected shape ", mx::Shape{batch, n_kv_heads, head_dim}, " (or batch 1), got shape ", mean.shape());
  return mx::broadcast_to(mx::astype(mean, mx::float32, stream), {batch, n_kv_heads, head_dim}, stream);
}

std::vector<mx::array> quantize_keys(const mx::array& k, int bits, const std::optional<mx::array>& mean, bool qjl,
                                     const std::string& rotation_name, mx::StreamOrDevice s) {
  const char* op = "quantize_keys";
  check_vectors(k, op, "k");
  check_bits(bits, true, op);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(k.shape(-1));
  const Rotation rotation = resolve_rotation(rotation_name, dim, op);
  check(!qjl || hadamard_factor(dim), "[", op, "] qjl: expected a head dimension with a Hadamard matrix, got ", k.shape(-1));

  std::vector<mx::array> inputs{k};
  if (mean) inputs.push_back(check_mean(*mean, k.shape(0), k.shape(1), k.shape(3), op, stream));
  if (rotation == Rotation::kOrthogonal) {
    mx::array x = mx::astype(k, mx::float32, stream);
    if (mean) x = mx::subtract(x, mx::expand_dims(inputs[1], 2, stream), stream);
    inputs = {apply_orthogonal(pad_last(x, dim, stream), dim, false, stream)};
  }
  auto primitive = std::make_shared<QuantizeKeys>(stream, bits, qjl, rotation == Rotation::kHadamard);
  const std::vector<mx::Dtype> dtypes{mx::uint32, mx::float16, mx::uint32, mx::float16};
  return mx::array::make_arrays(primitive->output_shapes(inputs), {dtypes.begin(), dtypes.begin() + (qjl ? 4 : 2)}, primitive,
                                inputs);
}

std::vector<mx::array> quantize_values(const mx::array& v, int bits, const std::string& rotation_name, mx::StreamOrDevice s) {
  const char* op = "quantize_values";
  check_vectors(v, op, "v");
  check_bits(bits, false, op);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(v.shape(-1));
  const Rotation rotation = resolve_rotation(rotation_name, dim, op);
  mx::array x = v;
  if (rotation == Rotation::kOrthogonal) x = apply_orthogonal(pad_last(x, dim, stream), dim, false, stream);
  auto primitive = std::make_shared<QuantizeValues>(stream, bits, rotation == Rotation::kHadamard);
  return mx::array::make_arrays(primitive->output_shapes({x}), {mx::uint32, mx::float16}, primitive, {x});
}

namespace {

mx::array dequantize(bool keys, std::vector<mx::array> inputs, const std::optional<mx::array>& mean, int bits, int head_dim,
                     const std::string& rotation_name, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s) {
  const char* op = "dequantize";
  check(is_activation(dtype), "[dequantize] dtype: expected float32, float16 or bfloat16, got ", dtype);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(head_dim);
  const Rotation rotation = resolve_rotation(rotation_name, dim, op);
  const mx::array codes = inputs[0];
  std::optional<mx::array> offset;
  if (mean && !rotated) offset = check_mean(*mean, codes.shape(0), codes.shape(1), head_dim, op, stream);

  if (rotated || rotation != Rotation::kHadamard) {
    auto primitive = std::make_shared<Dequantize>(stream, keys, bits, dim, false, rotated ? dtype : mx::float32);
    mx::array x(with_last(codes, dim), rotated ? dtype : mx::float32, primitive, inputs);
    if (rotated) return x;
    if (rotation == Rotation::kOrthogonal) x = apply_orthogonal(x, dim, true, stream);
    if (dim != head_dim) x = mx::slice(x, {0, 0, 0, 0}, with_last(codes, head_dim), stream);
    if (offset) x = mx::add(x, mx::expand_dims(*offset, 2, stream), stream);
    return mx::astype(x, dtype, stream);
  }
  if (offset) inputs.push_back(*offset);
  auto primitive = std::make_shared<Dequantize>(stream, keys, bits, head_dim, true, dtype);
  return mx::array(with_last(codes, head_dim), dtype, primitive, inputs);
}

}  // namespace

mx::array dequantize_keys(const mx::array& codes, const mx::array& norms, const std::optional<mx::array>& mean, int bits,
                          int head_dim, const std::string& rotation, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_packed_keys(codes, norms, bits, head_dim, "dequantize");
  return dequantize(true, {codes, norms}, mean, bits, head_dim, rotation, rotated, dtype, s);
}

mx::array dequantize_values(const mx::array& codes, const mx::array& params, int bits, int head_dim,
                            const std::string& rotation, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_packed_values(codes, params, bits, head_dim, "dequantize");
  return dequantize(false, {codes, params}, std::nullopt, bits, head_dim, rotation, rotated, dtype, s);
}

std::vector<mx::Shape> QuantizeKeys::output_shapes(const std::vector<mx::array>& inputs) {
  const int dim = padded_dim(inputs[0].shape(-1));
  std::vector<mx::Shape> shapes{with_last(inputs[0], code_words(dim, bits_)), with_last(inputs[0], 1)};
  if (qjl_) {
    shapes.push_back(with_last(inputs[0], sign_words(dim)));
    shapes.push_back(with_last(inputs[0], 1));
  }
  return shapes;
}

bool QuantizeKeys::is_equivalent(const Primitive& other) const {
  const auto& o = static_cast<const QuantizeKeys&>(other);
  return bits_ == o.bits_ && qjl_ == o.qjl_ && hadamard_ == o.hadamard_;
}

std::vector<mx::Shape> QuantizeValues::output_shapes(const std::vector<mx::array>& inputs) {
  const int dim = padded_dim(inputs[0].shape(-1));
  return {with_last(inputs[0], code_words(dim, bits_)), with_last(inputs[0], value_params(dim))};
}

bool QuantizeValues::is_equivalent(const Primitive& other) const {
  const auto& o = static_cast<const QuantizeValues&>(other);
  return bits_ == o.bits_ && hadamard_ == o.hadamard_;
}

std::vector<mx::Shape> Dequantize::output_shapes(const std::vector<mx::array>& inputs) {
  return {with_last(inputs[0], head_dim_)};
}

bool Dequantize::is_equivalent(const Primitive& other) const {
  const auto& o = static_cast<const Dequantize&>(other);
  return keys_ == o.keys_ && bits_ == o.bits_ && head_dim_ == o.head_dim_ && hadamard_ == o.hadamard_ && dtype_ == o.dtype_;
}

}  // namespace tqext
