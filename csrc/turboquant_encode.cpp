#include "turboquant_encode.h"

#include "check_arrays.h"
#include "cpu/environment.h"
#include "fixed_shapes.h"
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

void check_value_bits(int bits, ValueCoding coding, const char* op) {
  if (coding == kValueLloyd) {
    check(bits >= 2 && bits <= 4, "[", op, "] bits: expected 2, 3 or 4 for values coded as \"lloyd\", got ", bits);
  } else {
    check(bits == 2 || bits == 4, "[", op, "] bits: expected 2 or 4 for values coded as \"groups\", got ", bits);
  }
}

void check_packed(const mx::array& codes, const mx::array& params, const char* params_name, int per_token, int bits,
                  int head_dim, const char* what, const char* op) {
  check_head_dim(head_dim, op, what);
  check(codes.dtype() == mx::uint32, "[", op, "] ", what, ".codes: expected uint32, got ", codes.dtype());
  const int words = code_words(padded_dim(head_dim), bits);
  check(codes.ndim() == 4 && codes.shape(-1) == words, "[", op, "] ", what,
        ".codes: expected shape [batch, n_kv_heads, n_tokens, ", words, "] for ", bits, " bits and head dimension ", head_dim,
        ", got shape ", codes.shape());
  check(params.dtype() == mx::float16, "[", op, "] ", what, ".", params_name, ": expected ", mx::float16, ", got ",
        params.dtype());
  const mx::Shape shape = with_last(codes, per_token);
  check(params.shape() == shape, "[", op, "] ", what, ".", params_name, ": expected shape ", shape, ", got shape ",
        params.shape());
}

// [B, H, n_blocks, D] -> [B, H, n_tokens, D]: each token's row.
mx::array spread_blocks(const mx::array& means, int n_tokens, mx::Stream stream) {
  const mx::array rows = mx::repeat(means, kBlockTokens, 2, stream);
  return mx::slice(rows, {0, 0, 0, 0}, {means.shape(0), means.shape(1), n_tokens, means.shape(3)}, stream);
}

// [H, D] -> [H, 1, D]: one row for all tokens of a head.
mx::array for_all_tokens(const mx::array& balance, mx::Stream stream) { return mx::expand_dims(balance, 1, stream); }

}  // namespace

void check_key_bits(int bits, const char* op) {
  check(bits >= 2 && bits <= 4, "[", op, "] bits: expected 2, 3 or 4 for keys, got ", bits);
}

void check_head_dim(int head_dim, const char* op, const char* name) {
  check(head_dim % kDimStep == 0 && head_dim >= kDimStep && head_dim <= kMaxDim, "[", op, "] ", name,
        ": expected a head dimension that is a multiple of ", int(kDimStep), " up to ", int(kMaxDim), ", got ", head_dim);
}

ValueCoding value_coding(const std::string& name, const char* op) {
  check(name == "groups" || name == "lloyd", "[", op, "] coding: expected \"groups\" or \"lloyd\", got \"", name, "\"");
  return name == "lloyd" ? kValueLloyd : kValueGroups;
}

void check_packed_keys(const PackedKeys& keys, const char* op) {
  check_key_bits(keys.bits, op);
  check_packed(keys.codes, keys.norms, "norms", 1, keys.bits, keys.head_dim, "packed_k", op);
}

void check_packed_values(const PackedValues& values, const char* op) {
  check_value_bits(values.bits, values.coding, op);
  const int per_token = value_params(padded_dim(values.head_dim), values.coding);
  check_packed(values.codes, values.params, "params", per_token, values.bits, values.head_dim, "packed_v", op);
}

mx::array check_means(const mx::array& means, int batch, int n_kv_heads, int n_tokens, int head_dim, bool may_be_fp32,
                      const char* op, mx::Stream stream) {
  check(means.dtype() == mx::float16 || (may_be_fp32 && means.dtype() == mx::float32), "[", op, "] means: expected ",
        mx::float16, may_be_fp32 ? " or float32" : "", ", got ", means.dtype());
  const mx::Shape shape{batch, n_kv_heads, n_blocks(n_tokens), head_dim};
  mx::Shape shared = shape;
  shared[0] = 1;
  check(means.shape() == shape || means.shape() == shared, "[", op, "] means: expected shape ", shape,
        " (or batch 1), one row for each block of ", int(kBlockTokens), " tokens, got shape ", means.shape());
  return mx::broadcast_to(means, shape, stream);
}

void check_balance(const mx::array& balance, int n_kv_heads, int head_dim, const char* op) {
  check_dtype(balance, mx::float32, op, "balance");
  check_shape(balance, {n_kv_heads, head_dim}, op, "balance");
}

mx::array block_means(const mx::array& k, mx::StreamOrDevice s) {
  check_vectors(k, "block_means", "k");
  const mx::Stream stream = mx::to_stream(s);
  const int n = k.shape(2), blocks = n_blocks(n), missing = blocks * kBlockTokens - n;
  // The blocks are cut by a reshape, which would take another number of sequences for another number of blocks.
  const mx::array x = mx::astype(fixed_shapes(k, {{"k", k, {}}}, "block_means", stream), mx::float32, stream);
  // A token that is not finite is left out whole.
  const mx::array finite = mx::all(mx::isfinite(x, stream), -1, true, stream);
  auto by_block = [&](const mx::array& y) {
    const mx::array padded =
        missing ? mx::pad(y, std::vector<int>{2}, mx::Shape{0}, mx::Shape{missing}, mx::array(0.0f), "constant", stream) : y;
    return mx::sum(mx::reshape(padded, {k.shape(0), k.shape(1), blocks, kBlockTokens, y.shape(3)}, stream), 3, false, stream);
  };
  const mx::array count = mx::maximum(by_block(mx::astype(finite, mx::float32, stream)), mx::array(1.0f), stream);
  // Divided first: the sum of large numbers may overflow.
  const mx::array share =
      mx::multiply(mx::where(finite, x, mx::array(0.0f), stream), mx::array(1.0f / float(kBlockTokens)), stream);
  const mx::array mean = mx::multiply(by_block(share), mx::divide(mx::array(float(kBlockTokens)), count, stream), stream);
  const mx::array most(TQ_HALF_MAX), least(-TQ_HALF_MAX);
  return mx::astype(mx::clip(mean, least, most, stream), mx::float16, stream);
}

namespace {

// own_means: those of the blocks, last among the outputs; with the Hadamard rotation, where gpu_codes_blocks().
std::vector<mx::array> quantize_keys(const mx::array& k, int bits, const std::optional<mx::array>& means, bool own_means,
                                     const std::optional<mx::array>& balance, bool qjl, const std::string& rotation_name,
                                     mx::StreamOrDevice s) {
  const char* op = "quantize_keys";
  check_vectors(k, op, "k");
  check_key_bits(bits, op);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(k.shape(-1));
  const Rotation rotation = resolve_rotation(rotation_name, dim, op);
  check(!qjl || hadamard_factor(dim), "[", op, "] qjl: expected a head dimension with a Hadamard matrix, got ", k.shape(-1));

  std::vector<mx::array> inputs{k};
  if (means) {
    inputs.push_back(
        check_means(*means, k.shape(0), k.shape(1), k.shape(2), k.shape(3), rotation == Rotation::kNone, op, stream));
  }
  if (balance) {
    check_balance(*balance, k.shape(1), k.shape(3), op);
    inputs.push_back(*balance);
  }
  QuantizeKeys::State state{.bits = bits,
                            .qjl = qjl,
                            .hadamard = rotation == Rotation::kHadamard,
                            .has_means = means.has_value(),
                            .has_balance = balance.has_value(),
                            .own_means = own_means};
  if (rotation == Rotation::kOrthogonal) {
    // The means are spread over the tokens that there are now; a balance is one of heads.
    const std::vector<int> free_axes = means ? std::vector<int>{} : std::vector<int>{0, 2};
    std::vector<FixedArray> arrays{{"k", k, free_axes}};
    if (balance) arrays.push_back({"balance", *balance});
    mx::array x = mx::astype(fixed_shapes(k, arrays, op, stream), mx::float32, stream);
    if (means) {
      x = mx::subtract(x, mx::astype(spread_blocks(inputs[1], k.shape(2), stream), mx::float32, stream), stream);
    }
    if (balance) x = mx::multiply(x, for_all_tokens(*balance, stream), stream);
    inputs = {apply_orthogonal(x, dim, k.shape(3), false, stream)};
    state.has_means = state.has_balance = false;
  }
  auto primitive = std::make_shared<QuantizeKeys>(stream, state);
  std::vector<mx::Dtype> dtypes{mx::uint32, mx::float16};
  if (qjl) dtypes.insert(dtypes.end(), {mx::uint32, mx::float16});
  if (own_means) dtypes.push_back(mx::float16);
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

}  // namespace

std::vector<mx::array> quantize_keys(const mx::array& k, int bits, const std::optional<mx::array>& means,
                                     const std::optional<mx::array>& balance, bool qjl, const std::string& rotation,
                                     mx::StreamOrDevice s) {
  return quantize_keys(k, bits, means, false, balance, qjl, rotation, s);
}

std::vector<mx::array> quantize_blocks(const mx::array& k, int bits, const std::optional<mx::array>& balance, bool qjl,
                                       const std::string& rotation, mx::StreamOrDevice s) {
  check_vectors(k, "quantize_blocks", "k");
  const bool at_once = mx::to_stream(s).device == mx::Device::gpu && gpu_codes_blocks() &&
                       resolve_rotation(rotation, padded_dim(k.shape(-1)), "quantize_blocks") == Rotation::kHadamard;
  if (at_once) return quantize_keys(k, bits, std::nullopt, true, balance, qjl, rotation, s);
  const mx::array means = block_means(k, s);
  std::vector<mx::array> outputs = quantize_keys(k, bits, means, balance, qjl, rotation, s);
  outputs.push_back(means);
  return outputs;
}

std::vector<mx::array> quantize_values(const mx::array& v, int bits, ValueCoding coding, const std::string& rotation_name,
                                       mx::StreamOrDevice s) {
  const char* op = "quantize_values";
  check_vectors(v, op, "v");
  check_value_bits(bits, coding, op);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(v.shape(-1));
  const Rotation rotation = resolve_rotation(rotation_name, dim, op);
  mx::array x = v;
  if (rotation == Rotation::kOrthogonal) x = apply_orthogonal(x, dim, v.shape(-1), false, stream);
  auto primitive = std::make_shared<QuantizeValues>(
      stream, QuantizeValues::State{.bits = bits, .coding = coding, .hadamard = rotation == Rotation::kHadamard});
  return mx::array::make_arrays(primitive->output_shapes({x}), {mx::uint32, mx::float16}, primitive, {x});
}

namespace {

mx::array dequantize(const mx::array& codes, const mx::array& params, bool groups, const std::optional<mx::array>& means,
                     const std::optional<mx::array>& balance, int bits, int head_dim, const std::string& rotation_name,
                     bool rotated, mx::Dtype dtype, mx::StreamOrDevice s) {
  const char* op = "dequantize";
  check(is_activation(dtype), "[dequantize] dtype: expected float32, float16 or bfloat16, got ", dtype);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(head_dim);
  const Rotation rotation = resolve_rotation(rotation_name, dim, op);
  std::vector<mx::array> inputs{codes, params};
  if (!rotated && rotation != Rotation::kHadamard && (means || balance)) {
    // As in quantize_keys.
    const std::vector<int> free_axes = means ? std::vector<int>{} : std::vector<int>{0, 2};
    std::vector<FixedArray> arrays{{"packed_k.codes", codes, free_axes}};
    if (balance) arrays.push_back({"packed_k.balance", *balance});
    inputs[0] = fixed_shapes(codes, arrays, op, stream);
  }
  std::optional<mx::array> offsets;
  if (means) {
    offsets =
        check_means(*means, codes.shape(0), codes.shape(1), codes.shape(2), head_dim, rotation == Rotation::kNone, op, stream);
  }
  if (balance) check_balance(*balance, codes.shape(1), head_dim, op);

  Dequantize::State state{.groups = groups,
                          .bits = bits,
                          .head_dim = head_dim,
                          .hadamard = true,
                          .has_means = offsets.has_value(),
                          .has_balance = balance.has_value(),
                          .dtype = dtype};
  if (rotated || rotation != Rotation::kHadamard) {
    const mx::Dtype type = rotated ? dtype : mx::float32;
    state.head_dim = dim;
    state.hadamard = state.has_means = state.has_balance = false;
    state.dtype = type;
    mx::array x(with_last(codes, dim), type, std::make_shared<Dequantize>(stream, state), inputs);
    if (rotated) return x;
    if (rotation == Rotation::kOrthogonal) {
      x = apply_orthogonal(x, dim, head_dim, true, stream);
    } else if (dim != head_dim) {
      x = mx::slice(x, {0, 0, 0, 0}, with_last(codes, head_dim), stream);
    }
    if (balance) x = mx::divide(x, for_all_tokens(*balance, stream), stream);
    if (offsets) {
      x = mx::add(x, mx::astype(spread_blocks(*offsets, codes.shape(2), stream), mx::float32, stream), stream);
    }
    return mx::astype(x, dtype, stream);
  }
  if (offsets) inputs.push_back(*offsets);
  if (balance) inputs.push_back(*balance);
  return mx::array(with_last(codes, head_dim), dtype, std::make_shared<Dequantize>(stream, state), inputs);
}

}  // namespace

mx::array dequantize_keys(const PackedKeys& k, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_packed_keys(k, "dequantize");
  return dequantize(k.codes, k.norms, false, k.means, k.balance, k.bits, k.head_dim, k.rotation, rotated, dtype, s);
}

mx::array dequantize_values(const PackedValues& v, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s) {
  check_packed_values(v, "dequantize");
  return dequantize(v.codes, v.params, v.coding == kValueGroups, std::nullopt, std::nullopt, v.bits, v.head_dim, v.rotation,
                    rotated, dtype, s);
}

namespace {

// The checks of a traced call, again: shapeless compilation runs the primitive on arrays of other shapes.
void check_centre(const mx::array* means, const mx::array* balance, const mx::array& tokens, int head_dim, const char* op) {
  if (means) check_shape(*means, {tokens.shape(0), tokens.shape(1), n_blocks(tokens.shape(2)), head_dim}, op, "means");
  if (balance) check_balance(*balance, tokens.shape(1), head_dim, op);
}

void check_hadamard(bool hadamard, int dim, const char* op) {
  check(!hadamard || hadamard_factor(dim), "[", op,
        "] rotation: expected a head dimension with a Hadamard matrix, as compiled, got a padded one of ", dim);
}

}  // namespace

std::vector<mx::Shape> QuantizeKeys::output_shapes(const std::vector<mx::array>& inputs) {
  const char* op = "quantize_keys";
  check_vectors(inputs[0], op, "k");
  const int dim = padded_dim(inputs[0].shape(-1));
  check_hadamard(state_.hadamard || state_.qjl, dim, op);
  check_centre(means(inputs), balance(inputs), inputs[0], inputs[0].shape(-1), op);
  std::vector<mx::Shape> shapes{with_last(inputs[0], code_words(dim, state_.bits)), with_last(inputs[0], 1)};
  if (state_.qjl) {
    shapes.push_back(with_last(inputs[0], sign_words(dim)));
    shapes.push_back(with_last(inputs[0], 1));
  }
  if (state_.own_means) {
    shapes.push_back(inputs[0].shape());
    shapes.back()[2] = n_blocks(inputs[0].shape(2));
  }
  return shapes;
}

std::vector<mx::Shape> QuantizeValues::output_shapes(const std::vector<mx::array>& inputs) {
  const char* op = "quantize_values";
  check_vectors(inputs[0], op, "v");
  const int dim = padded_dim(inputs[0].shape(-1));
  check_hadamard(state_.hadamard, dim, op);
  return {with_last(inputs[0], code_words(dim, state_.bits)), with_last(inputs[0], value_params(dim, state_.coding))};
}

std::vector<mx::Shape> Dequantize::output_shapes(const std::vector<mx::array>& inputs) {
  const char* op = "dequantize";
  const int per_token = state_.groups ? value_params(padded_dim(state_.head_dim), kValueGroups) : 1;
  const char* what = state_.groups ? "packed_v" : "packed";
  check_packed(inputs[0], inputs[1], state_.groups ? "params" : "norms", per_token, state_.bits, state_.head_dim, what, op);
  check_centre(means(inputs), balance(inputs), inputs[0], state_.head_dim, op);
  return {with_last(inputs[0], state_.head_dim)};
}

}  // namespace tqext
