#include "turboquant_attention.h"

#include <algorithm>
#include <cmath>

#include "check_arrays.h"
#include "cpu/environment.h"
#include "fixed_shapes.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "turboquant_encode.h"

namespace tqext {

namespace {

constexpr const char* kOp = "turboquant_attention";

struct Shapes {
  int batch, n_q_heads, n_kv_heads, n_queries, head_dim, value_dim, n_first, n_coded, n_tail;
  int n_keys() const { return n_first + n_coded + n_tail; }
};

void check_exact(const ExactTokens& tokens, const Shapes& n, const char* name) {
  const auto& [k, v] = tokens;
  const std::string keys = std::string(name) + "[0]", values = std::string(name) + "[1]";
  check_activation(k, kOp, keys.c_str());
  check_activation(v, kOp, values.c_str());
  check(k.ndim() == 4, "[", kOp, "] ", keys, ": expected 4 axes [batch, n_kv_heads, n_tokens, head_dim], got shape ",
        k.shape());
  check_shape(k, {n.batch, n.n_kv_heads, k.shape(2), n.head_dim}, kOp, keys.c_str());
  check_shape(v, {n.batch, n.n_kv_heads, k.shape(2), n.value_dim}, kOp, values.c_str());
}

Shapes check_inputs(const mx::array& q, const PackedKeys& k, const PackedValues& v, const AttentionOptions& options) {
  check_activation(q, kOp, "q");
  check(q.ndim() == 4, "[", kOp, "] q: expected 4 axes [batch, n_q_heads, n_queries, head_dim], got shape ", q.shape());
  check_packed_keys(k, kOp);
  check_packed_values(v, kOp);
  Shapes n{q.shape(0), q.shape(1), k.codes.shape(1), q.shape(2), k.head_dim, v.head_dim, 0, k.codes.shape(2), 0};
  check(q.shape(3) == n.head_dim, "[", kOp, "] q: expected head dimension ", n.head_dim, ", got shape ", q.shape());
  check(k.codes.shape(0) == n.batch, "[", kOp, "] packed_k.codes: expected batch ", n.batch, ", got shape ", k.codes.shape());
  check(n.n_kv_heads > 0 && n.n_q_heads % n.n_kv_heads == 0, "[", kOp, "] q: expected a multiple of ", n.n_kv_heads,
        " heads, got ", n.n_q_heads);
  check_shape(v.codes, {n.batch, n.n_kv_heads, n.n_coded, v.codes.shape(-1)}, kOp, "packed_v.codes");
  check(k.rotation == v.rotation, "[", kOp, "] packed_v.rotation: expected \"", k.rotation, "\" as in packed_k, got \"",
        v.rotation, "\"");
  check(k.signs.has_value() == k.residual_norms.has_value(), "[", kOp,
        "] packed_k.residual_norms: expected signs and residual_norms together, got only one");
  if (k.balance) check_balance(*k.balance, n.n_kv_heads, n.head_dim, kOp);
  if (k.signs) {
    const int dim = padded_dim(n.head_dim);
    check_dtype(*k.signs, mx::uint32, kOp, "packed_k.signs");
    check_shape(*k.signs, {n.batch, n.n_kv_heads, n.n_coded, sign_words(dim)}, kOp, "packed_k.signs");
    check_dtype(*k.residual_norms, mx::float16, kOp, "packed_k.residual_norms");
    check_shape(*k.residual_norms, {n.batch, n.n_kv_heads, n.n_coded, 1}, kOp, "packed_k.residual_norms");
    check(hadamard_factor(dim), "[", kOp, "] packed_k.signs: expected a head dimension with a Hadamard matrix, got ",
          n.head_dim);
  }
  if (options.first) {
    check_exact(*options.first, n, "first");
    n.n_first = options.first->first.shape(2);
  }
  if (options.tail) {
    check_exact(*options.tail, n, "tail");
    n.n_tail = options.tail->first.shape(2);
  }
  check(options.mask_mode.empty() || options.mask_mode == "causal", "[", kOp,
        "] mask: expected None, \"causal\" or an array, got \"", options.mask_mode, "\"");
  if (options.scale) check(std::isfinite(*options.scale), "[", kOp, "] scale: expected a finite number, got ", *options.scale);
  if (options.sinks) {
    check_activation(*options.sinks, kOp, "sinks");
    check_shape(*options.sinks, {n.n_q_heads}, kOp, "sinks");
  }
  if (options.left_padding) {
    check_dtype(*options.left_padding, mx::int32, kOp, "left_padding");
    check_shape(*options.left_padding, {n.batch}, kOp, "left_padding");
  }
  if (options.lengths) {
    check_dtype(*options.lengths, mx::int32, kOp, "lengths");
    check_shape(*options.lengths, {n.batch, 3}, kOp, "lengths");
    check(options.mask_mode.empty() || n.n_queries <= n.n_tail, "[", kOp,
          "] lengths: expected the queries' own keys in the tail when the mask is \"causal\" (", n.n_queries,
          " tokens), got a tail of ", n.n_tail);
  }
  return n;
}

mx::Shape check_mask_shape(const mx::array& mask, const Shapes& n) {
  const mx::Shape full{n.batch, n.n_q_heads, n.n_queries, n.n_keys()};
  bool fits = mask.ndim() <= 4;
  for (int i = 1; fits && i <= int(mask.ndim()); i++) fits = mask.shape(-i) == 1 || mask.shape(-i) == full[4 - i];
  check(fits, "[", kOp, "] mask: expected a shape that broadcasts to ", full,
        " [batch, n_q_heads, n_queries, n_keys], got shape ", mask.shape());
  return full;
}

// bool or fp32, four axes, each of size 1 or the full one.
mx::array check_mask(const mx::array& mask, const Shapes& n, mx::Stream stream) {
  check(mask.dtype() == mx::bool_ || is_activation(mask.dtype()), "[", kOp,
        "] mask: expected bool, float32, float16 or bfloat16, got ", mask.dtype());
  const mx::Shape full = check_mask_shape(mask, n);
  mx::array x = mask.dtype() == mx::bool_ ? mask : mx::astype(mask, mx::float32, stream);
  while (x.ndim() < 4) x = mx::expand_dims(x, 0, stream);
  // Shapeless compilation keeps the shape of broadcast_to, which depends on the tokens: the CPU and CUDA broadcast when they
  // read.
  return mx::metal::is_available() ? mx::broadcast_to(x, full, stream) : x;
}

// Which columns the rows begin ... begin + n_rows - 1 may attend to, as bool [B or 1, 1, n_rows or 1, n_keys]; nothing when
// every one.
std::optional<mx::array> column_mask(const AttentionOptions& options, const Shapes& n, int begin, int n_rows, mx::Stream s) {
  const bool causal = options.mask_mode == "causal";
  std::optional<mx::array> valid;
  auto restrict = [&](const mx::array& condition) { valid = valid ? mx::logical_and(*valid, condition, s) : condition; };
  const mx::array columns = mx::reshape(mx::arange(n.n_keys(), mx::int32, s), {1, 1, 1, n.n_keys()}, s);
  const mx::array rows = mx::reshape(mx::arange(begin, begin + n_rows, mx::int32, s), {1, 1, n_rows, 1}, s);
  if (causal) restrict(mx::less_equal(columns, mx::add(rows, mx::array(n.n_keys() - n.n_queries), s), s));
  if (options.left_padding) {
    restrict(mx::greater_equal(columns, mx::reshape(*options.left_padding, {n.batch, 1, 1, 1}, s), s));
  }
  if (options.lengths) {
    const int begins[3] = {0, n.n_first, n.n_first + n.n_coded};
    const int ends[3] = {n.n_first, n.n_first + n.n_coded, n.n_keys() - (causal ? n.n_queries : 0)};
    for (int part = 0; part < 3; part++) {
      const mx::array length =
          mx::reshape(mx::slice(*options.lengths, {0, part}, {n.batch, part + 1}, s), {n.batch, 1, 1, 1}, s);
      const mx::array stored = mx::less(columns, mx::add(length, mx::array(begins[part]), s), s);
      const mx::array elsewhere = mx::logical_or(mx::less(columns, mx::array(begins[part]), s),
                                                 mx::greater_equal(columns, mx::array(ends[part]), s), s);
      restrict(mx::logical_or(stored, elsewhere, s));
    }
  }
  return valid;
}

// The same result from MLX's own operations: this call's tokens are dequantised, in the rotated space.
mx::array composed_attention(const mx::array& queries, const PackedKeys& k, const PackedValues& v,
                             const AttentionOptions& options, const Shapes& n, float scale, mx::Stream s) {
  check(!k.signs, "[", kOp,
        "] packed_k.signs: expected none where the GPU has no kernel for the shapes (CUDA: head dimensions above 256), got "
        "residual signs");
  std::vector<FixedArray> arrays{{"q", queries}, {"packed_k.codes", k.codes}, {"packed_v.codes", v.codes}};
  if (options.first) arrays.push_back({"first[0]", options.first->first});
  if (options.tail) arrays.push_back({"tail[0]", options.tail->first});
  if (options.mask) arrays.push_back({"mask", *options.mask});
  const mx::array q = fixed_shapes(queries, arrays, kOp, s);  // the column mask below holds the numbers of tokens
  std::vector<mx::array> keys, values;
  auto add = [&](const std::optional<ExactTokens>& tokens) {
    if (!tokens) return;
    keys.push_back(mx::astype(tokens->first, q.dtype(), s));
    values.push_back(mx::astype(tokens->second, q.dtype(), s));
  };
  add(options.first);
  keys.push_back(dequantize_keys(k, false, q.dtype(), s));
  values.push_back(dequantize_values(v, false, q.dtype(), s));
  add(options.tail);

  const mx::array joined_keys = mx::concatenate(keys, 2, s), joined_values = mx::concatenate(values, 2, s);
  std::optional<mx::array> sinks, given;
  if (options.sinks) sinks = mx::astype(*options.sinks, q.dtype(), s);
  if (options.mask) given = check_mask(*options.mask, n, s);

  // The rows begin ... begin + n_rows - 1.
  auto attend = [&](int begin, int n_rows) {
    auto rows_of = [&](const mx::array& x) {
      if (n_rows == n.n_queries || x.shape(2) == 1) return x;
      mx::Shape first(x.ndim(), 0), last = x.shape();
      first[2] = begin;
      last[2] = begin + n_rows;
      return mx::slice(x, first, last, s);
    };
    const mx::array rows = rows_of(q);
    // "causal" as such where it says all: MLX's fused attention takes no array on CUDA and makes none of its own.
    if (options.mask_mode == "causal" && !options.left_padding && !options.lengths && n.n_queries <= n.n_keys()) {
      const int n_seen = n.n_keys() - n.n_queries + begin + n_rows;
      auto seen = [&](const mx::array& x) {
        if (n_seen == n.n_keys()) return x;
        return mx::slice(x, {0, 0, 0, 0}, {x.shape(0), x.shape(1), n_seen, x.shape(3)}, s);
      };
      return mx::fast::scaled_dot_product_attention(rows, seen(joined_keys), seen(joined_values), scale, "causal", {}, sinks,
                                                    false, s);
    }
    std::optional<mx::array> mask = column_mask(options, n, begin, n_rows, s);
    if (given) {
      const mx::array part = rows_of(*given);
      if (part.dtype() == mx::bool_) {
        mask = mask ? mx::logical_and(*mask, part, s) : part;
      } else {
        mask = mask ? mx::where(*mask, part, mx::array(-INFINITY), s) : part;
        mask = mx::astype(*mask, q.dtype(), s);
      }
    }
    const mx::array out =
        mx::fast::scaled_dot_product_attention(rows, joined_keys, joined_values, scale, "", mask, sinks, false, s);
    if (!mask) return out;
    // MLX's softmax over nothing is NaN.
    const mx::array attends = mask->dtype() == mx::bool_ ? mx::any(*mask, -1, true, s)
                                                         : mx::any(mx::greater(*mask, mx::array(-INFINITY), s), -1, true, s);
    return mx::where(attends, out, mx::zeros_like(out, s), s);
  };

  // Where MLX's attention holds every score and its weight: as many rows at a time as keep them below kScoreBytes.
  constexpr int64_t kScoreBytes = int64_t(1) << 28;
  const bool fused = n.head_dim == n.value_dim && (n.head_dim == 64 || n.head_dim == 80 || n.head_dim == 128);
  const int64_t row_bytes = int64_t(n.batch) * n.n_q_heads * std::max(n.n_keys(), 1) * 8;
  const int64_t together = std::max<int64_t>(kScoreBytes / row_bytes, 1);
  if (fused || together >= n.n_queries) return attend(0, n.n_queries);
  std::vector<mx::array> parts;
  for (int begin = 0; begin < n.n_queries; begin += int(together)) {
    parts.push_back(attend(begin, std::min(int(together), n.n_queries - begin)));
  }
  return mx::concatenate(parts, 2, s);
}

}  // namespace

mx::array turboquant_attention(const mx::array& q, const PackedKeys& k, const PackedValues& v, const AttentionOptions& options,
                               mx::StreamOrDevice s) {
  const Shapes n = check_inputs(q, k, v, options);
  const mx::Stream stream = mx::to_stream(s);
  cpu::check_environment(stream);
  const int dim = padded_dim(n.head_dim), value_dim = padded_dim(n.value_dim);
  const float scale = options.scale.value_or(1.0f / std::sqrt(float(n.head_dim)));
  const Rotation key_rotation = resolve_rotation(k.rotation, dim, kOp);
  const Rotation value_rotation = resolve_rotation(v.rotation, value_dim, kOp);

  std::optional<mx::array> means;
  if (k.means) {
    means = check_means(*k.means, n.batch, n.n_kv_heads, n.n_coded, n.head_dim, key_rotation == Rotation::kNone, kOp, stream);
  }

  // The kernels know only "Walsh-Hadamard inside" or "all in the rotated space"; the latter serves dense rotations. Products of
  // exact keys and queries are the same in that space, and with the balance on both sides.
  if (key_rotation == Rotation::kOrthogonal || value_rotation != key_rotation) {
    auto turn = [&](const mx::array& x, int padded, Rotation how) {
      if (how == Rotation::kOrthogonal) return apply_orthogonal(x, padded, x.shape(-1), false, stream);
      const mx::array full = pad_last(x, padded, stream);
      if (how == Rotation::kHadamard) return rotate(mx::astype(full, mx::float32, stream), false, "hadamard", stream);
      return full;
    };
    // The balance is one of heads: their number stays what it is now.
    auto fixed_heads = [&](const mx::array& x, const char* name) {
      return fixed_shapes(x, {{name, x, {0, 2}}, {"balance", *k.balance}}, kOp, stream);
    };
    auto turn_keys = [&](const mx::array& keys) {
      if (!k.balance) return turn(keys, dim, key_rotation);
      const mx::array x = fixed_heads(keys, "keys");
      const mx::array balance = mx::expand_dims(*k.balance, 1, stream);
      return turn(mx::multiply(mx::astype(x, mx::float32, stream), balance, stream), dim, key_rotation);
    };
    auto turn_queries = [&](const mx::array& queries) {
      if (!k.balance) return turn(queries, dim, key_rotation);
      const mx::array x = fixed_heads(queries, "q");
      const mx::array balance = mx::repeat(mx::expand_dims(*k.balance, 1, stream), n.n_q_heads / n.n_kv_heads, 0, stream);
      return turn(mx::divide(mx::astype(x, mx::float32, stream), balance, stream), dim, key_rotation);
    };
    auto turn_tokens = [&](const std::optional<ExactTokens>& tokens) -> std::optional<ExactTokens> {
      if (!tokens) return std::nullopt;
      return ExactTokens{turn_keys(tokens->first), turn(tokens->second, value_dim, value_rotation)};
    };
    PackedKeys inner_k = k;
    PackedValues inner_v = v;
    AttentionOptions inner = options;
    inner_k.rotation = inner_v.rotation = "none";
    inner_k.head_dim = dim;
    inner_v.head_dim = value_dim;
    inner_k.balance = std::nullopt;
    if (means) inner_k.means = turn_keys(mx::astype(*means, mx::float32, stream));
    inner.first = turn_tokens(options.first);
    inner.tail = turn_tokens(options.tail);
    inner.scale = scale;
    mx::array out = turboquant_attention(turn_queries(q), inner_k, inner_v, inner, stream);
    if (value_rotation == Rotation::kOrthogonal) {
      out = apply_orthogonal(out, value_dim, n.value_dim, true, stream);
    } else if (value_rotation == Rotation::kHadamard) {
      out = rotate(out, true, "hadamard", stream);
    }
    if (out.shape(3) != n.value_dim) {
      out = mx::slice(out, {0, 0, 0, 0}, {n.batch, n.n_q_heads, n.n_queries, n.value_dim}, stream);
    }
    return mx::astype(out, q.dtype(), stream);
  }

  TurboQuantAttention::State state{.scale = scale,
                                   .causal = options.mask_mode == "causal",
                                   .hadamard = key_rotation == Rotation::kHadamard,
                                   .key_bits = k.bits,
                                   .value_bits = v.bits,
                                   .value_coding = v.coding,
                                   .head_dim = n.head_dim,
                                   .value_dim = n.value_dim,
                                   .present = k.signs ? 1u << kSigns : 0u};
  if (stream.device == mx::Device::gpu && !gpu_has_kernel(state, q)) {
    return composed_attention(q, k, v, options, n, scale, stream);
  }

  // What is empty is left out; a compiled function must not go on to leave it out when it is not.
  std::vector<FixedArray> empty;
  if (means && n.n_coded == 0) empty.push_back({"packed_k.codes", k.codes});
  if (options.first && n.n_first == 0) empty.push_back({"first[0]", options.first->first});
  if (options.tail && n.n_tail == 0) empty.push_back({"tail[0]", options.tail->first});
  std::vector<mx::array> inputs{fixed_shapes(q, empty, kOp, stream), k.codes, k.norms, v.codes, v.params};
  auto add = [&](OptionalInput which, const mx::array& x) {
    state.present |= 1u << which;
    inputs.push_back(x);
  };
  if (means && n.n_coded > 0) add(kMeans, *means);
  if (k.balance) add(kBalance, *k.balance);
  if (k.signs) {
    add(kSigns, *k.signs);
    add(kResidualNorms, *k.residual_norms);
  }
  auto add_tokens = [&](const std::optional<ExactTokens>& tokens, OptionalInput keys, OptionalInput values) {
    if (!tokens || tokens->first.shape(2) == 0) return;
    add(keys, mx::astype(tokens->first, q.dtype(), stream));
    add(values, mx::astype(tokens->second, q.dtype(), stream));
  };
  add_tokens(options.first, kFirstKeys, kFirstValues);
  add_tokens(options.tail, kTailKeys, kTailValues);
  if (options.mask) add(kMask, check_mask(*options.mask, n, stream));
  if (options.sinks) add(kSinks, mx::astype(*options.sinks, mx::float32, stream));
  if (options.left_padding) add(kLeftPadding, *options.left_padding);
  if (options.lengths) add(kLengths, *options.lengths);
  auto primitive = std::make_shared<TurboQuantAttention>(stream, state);
  return mx::array({n.batch, n.n_q_heads, n.n_queries, n.value_dim}, q.dtype(), primitive, inputs);
}

std::vector<mx::Shape> TurboQuantAttention::output_shapes(const std::vector<mx::array>& inputs) {
  // The checks of a traced call, again: shapeless compilation runs the primitive on arrays of other shapes.
  const AttentionInputs x = named(inputs);
  auto optional = [](const mx::array* array) { return array ? std::optional(*array) : std::nullopt; };
  auto tokens = [](const mx::array* keys, const mx::array* values) {
    return keys ? std::optional(ExactTokens{*keys, *values}) : std::nullopt;
  };
  const std::string rotation = state_.hadamard ? "hadamard" : "none";
  const PackedKeys k{x.key_codes,         x.key_norms,       optional(x.means),
                     optional(x.balance), optional(x.signs), optional(x.residual_norms),
                     state_.key_bits,     state_.head_dim,   rotation};
  const PackedValues v{x.value_codes, x.value_params, state_.value_bits, state_.value_dim, ValueCoding(state_.value_coding),
                       rotation};
  const AttentionOptions options{.scale = state_.scale,
                                 .mask_mode = state_.causal ? "causal" : "",
                                 .mask = std::nullopt,
                                 .sinks = optional(x.sinks),
                                 .left_padding = optional(x.left_padding),
                                 .lengths = optional(x.lengths),
                                 .first = tokens(x.first_keys, x.first_values),
                                 .tail = tokens(x.tail_keys, x.tail_values)};
  const Shapes n = check_inputs(x.q, k, v, options);
  if (x.means) {
    check_shape(*x.means, {n.batch, n.n_kv_heads, n_blocks(n.n_coded), n.head_dim}, kOp, "means");
  }
  if (x.mask) {
    const mx::Shape full = check_mask_shape(*x.mask, n);
    // Metal's kernel does not broadcast, and shapeless compilation has dropped the operation that did.
    if (mx::metal::is_available()) check_shape(*x.mask, full, kOp, "mask");
  }
  check(stream().device == mx::Device::cpu || gpu_has_kernel(state_, x.q), "[", kOp,
        "] q: expected a shape that this GPU's kernels take, as the function was compiled for, got shape ", x.q.shape(),
        "; compile it without shapeless");
  mx::Shape shape = inputs[0].shape();
  shape.back() = state_.value_dim;
  return {shape};
}

}  // namespace tqext
