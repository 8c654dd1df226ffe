#include "turboquant_attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "check_arrays.h"
#include "cpu/environment.h"
#include "fixed_shapes.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/ops.h"
#include "turboquant_encode.h"

namespace tqext {

namespace {

constexpr const char* kOp = "turboquant_attention";
constexpr int64_t kComposedBytes = int64_t(1) << 28;

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

void check_indices(const mx::array& x, const Shapes& n) {
  check(x.dtype() == mx::int32 || x.dtype() == mx::uint32, "[", kOp, "] indices: expected int32 or uint32, got ", x.dtype());
  const bool fits = x.ndim() == 4 && x.shape(0) == n.batch && (x.shape(1) == 1 || x.shape(1) == n.n_kv_heads) &&
                    (x.shape(2) == 1 || x.shape(2) == n.n_queries);
  check(fits, "[", kOp, "] indices: expected [", n.batch, ", ", n.n_kv_heads, " or 1, ", n.n_queries,
        " or 1, n_listed], got shape ", x.shape());
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
  if (options.indices) check_indices(*options.indices, n);
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

// Part of the scores: rows and columns of them.
struct Piece {
  int row, n_rows, column, n_columns;
};

mx::array rows_of(const mx::array& x, const Piece& at, mx::Stream s) {
  mx::Shape first(x.ndim(), 0), last = x.shape();
  if (x.shape(2) != 1) {
    first[2] = at.row;
    last[2] = at.row + at.n_rows;
  }
  return mx::slice(x, first, last, s);
}

// Which of its scores count, as bool [B or 1, 1, n_rows or 1, n_columns]; nothing when all.
std::optional<mx::array> column_mask(const AttentionOptions& options, const Shapes& n, const Piece& at, mx::Stream s) {
  const bool causal = options.mask_mode == "causal";
  std::optional<mx::array> valid;
  auto restrict = [&](const mx::array& condition) { valid = valid ? mx::logical_and(*valid, condition, s) : condition; };
  const int seen = n.n_keys() - n.n_queries;  // the last column that query 0 sees
  const mx::array columns =
      mx::reshape(mx::arange(at.column, at.column + at.n_columns, mx::int32, s), {1, 1, 1, at.n_columns}, s);
  if (causal && at.column + at.n_columns - 1 > seen + at.row) {
    const mx::array rows = mx::reshape(mx::arange(at.row, at.row + at.n_rows, mx::int32, s), {1, 1, at.n_rows, 1}, s);
    restrict(mx::less_equal(columns, mx::add(rows, mx::array(seen), s), s));
  }
  if (options.left_padding) {
    restrict(mx::greater_equal(columns, mx::reshape(*options.left_padding, {n.batch, 1, 1, 1}, s), s));
  }
  if (options.lengths) {
    const int begins[3] = {0, n.n_first, n.n_first + n.n_coded};
    const int ends[3] = {n.n_first, n.n_first + n.n_coded, n.n_keys() - (causal ? n.n_queries : 0)};
    for (int part = 0; part < 3; part++) {
      if (at.column + at.n_columns <= begins[part] || at.column >= ends[part]) continue;
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

// Softmax of some rows so far, fp32: the largest score, the sum of weights, the weighted sum of values.
struct Softmax {
  mx::array max, sum, out;
};

// The same result from MLX's own operations: tokens are dequantised and scores made for so many rows and columns at a time as
// stay below `bytes`, and merged by an online softmax.
mx::array composed_attention(const mx::array& queries, const PackedKeys& k, const PackedValues& v,
                             const AttentionOptions& options, const Shapes& n, float scale, int64_t bytes, mx::Stream s) {
  check(!k.signs, "[", kOp,
        "] packed_k.signs: expected none where the GPU has no kernel for the shapes (head dimensions above 256), got residual "
        "signs");
  std::vector<FixedArray> arrays{{"q", queries}, {"packed_k.codes", k.codes}, {"packed_v.codes", v.codes}};
  if (options.first) arrays.push_back({"first[0]", options.first->first});
  if (options.tail) arrays.push_back({"tail[0]", options.tail->first});
  if (options.mask) arrays.push_back({"mask", *options.mask});
  const mx::array q = fixed_shapes(queries, arrays, kOp, s);  // the pieces depend on the numbers of tokens
  std::optional<mx::array> given;
  if (options.mask) given = check_mask(*options.mask, n, s);
  if (q.size() == 0) {
    return mx::zeros({n.batch, n.n_q_heads, n.n_queries, n.value_dim + options.lse}, options.lse ? mx::float32 : q.dtype(), s);
  }

  // bf16 has so few digits that a score rounded to it moves a weight by percents.
  const mx::Dtype score_type = q.dtype() == mx::bfloat16 ? mx::float32 : q.dtype();
  // Half of the bytes for tokens, half for scores (as products, in fp32, and as weights).
  const int64_t token_bytes =
      int64_t(n.batch) * n.n_kv_heads * (n.head_dim * mx::size_of(score_type) + n.value_dim * q.itemsize());
  const int64_t score_bytes = int64_t(n.batch) * n.n_q_heads * 12;
  const int64_t few_rows = std::min(n.n_queries, 256);
  const int64_t most = std::min(bytes / 2 / token_bytes, bytes / 2 / (score_bytes * few_rows));
  const int n_columns = int(std::clamp<int64_t>(most / kBlockTokens, 1, 1 << 20)) * kBlockTokens;
  const int n_rows = int(std::clamp<int64_t>(bytes / 2 / (score_bytes * n_columns), 1, n.n_queries));

  std::vector<Softmax> rows;
  for (int row = 0; row < n.n_queries; row += n_rows) {
    const mx::Shape one{n.batch, n.n_q_heads, std::min(n_rows, n.n_queries - row), 1};
    mx::Shape all = one;
    all[3] = n.value_dim;
    mx::array max = mx::full(one, -INFINITY, mx::float32, s), sum = mx::zeros(one, mx::float32, s);
    if (options.sinks) {
      // As a token with this score and no value; -inf is none.
      const mx::array sinks = mx::reshape(mx::astype(*options.sinks, mx::float32, s), {1, n.n_q_heads, 1, 1}, s);
      max = mx::broadcast_to(sinks, one, s);
      sum = mx::astype(mx::greater(max, mx::array(-INFINITY), s), mx::float32, s);
    }
    rows.push_back({max, sum, mx::zeros(all, mx::float32, s)});
  }

  // MLX runs what does not depend on another piece as it likes: each one depends on the one before, so that few are in memory.
  std::optional<mx::array> before;
  auto after = [&](const mx::array& x) { return before ? mx::depends({x}, {*before})[0] : x; };
  // Tokens of columns column ... column + n - 1: keys as scores are made, values in q's type.
  auto attend = [&](int column, int n_tokens, const mx::array& keys, const mx::array& values) {
    const mx::array transposed = mx::swapaxes(keys, 2, 3, s);
    for (size_t i = 0; i < rows.size(); i++) {
      Softmax& row = rows[i];
      const Piece at{int(i) * n_rows, row.max.shape(2), column, n_tokens};
      if (options.mask_mode == "causal" && column > n.n_keys() - n.n_queries + at.row + at.n_rows - 1) continue;
      const int repeats = n.n_q_heads / n.n_kv_heads;
      const mx::array given_rows = mx::astype(rows_of(after(q), at, s), score_type, s);
      const mx::array x = mx::reshape(mx::multiply(given_rows, mx::array(scale, score_type), s),
                                      {n.batch, n.n_kv_heads, repeats * at.n_rows, n.head_dim}, s);
      mx::array scores =
          mx::reshape(mx::astype(mx::matmul(x, transposed, s), mx::float32, s), {n.batch, n.n_q_heads, at.n_rows, n_tokens}, s);
      std::optional<mx::array> mask = column_mask(options, n, at, s);
      if (given) {
        mx::array part = rows_of(*given, at, s);
        if (part.shape(3) != 1) {
          mx::Shape first(4, 0), last = part.shape();
          first[3] = column;
          last[3] = column + n_tokens;
          part = mx::slice(part, first, last, s);
        }
        if (part.dtype() == mx::bool_) {
          mask = mask ? mx::logical_and(*mask, part, s) : part;
        } else {
          scores = mx::add(scores, part, s);
        }
      }
      if (mask) scores = mx::where(*mask, scores, mx::array(-INFINITY), s);
      const mx::array max = mx::maximum(row.max, mx::max(scores, -1, true, s), s);
      const mx::array finite = mx::where(mx::equal(max, mx::array(-INFINITY), s), mx::array(0.0f), max, s);
      const mx::array weights = mx::exp(mx::subtract(scores, finite, s), s);
      const mx::array factor = mx::exp(mx::subtract(row.max, finite, s), s);
      const mx::array packed =
          mx::reshape(mx::astype(weights, q.dtype(), s), {n.batch, n.n_kv_heads, repeats * at.n_rows, n_tokens}, s);
      const mx::array out = mx::reshape(mx::astype(mx::matmul(packed, values, s), mx::float32, s),
                                        {n.batch, n.n_q_heads, at.n_rows, n.value_dim}, s);
      row.max = max;
      row.sum = mx::add(mx::multiply(row.sum, factor, s), mx::sum(weights, -1, true, s), s);
      row.out = mx::add(mx::multiply(row.out, factor, s), out, s);
      before = row.out;
    }
  };
  auto tokens_of = [&](const mx::array& x, int begin, int end) {
    return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)}, s);
  };
  // The caller's tokens may lie anywhere. MLX's products on CUDA read past the end of what lies at an odd address, or refuse
  // it.
  auto aligned = [&](const mx::array& x) {
#ifdef __APPLE__
    return x;
#else
    return s.device == mx::Device::gpu ? mx::multiply(x, mx::array(1, x.dtype()), s) : x;
#endif
  };
  auto attend_exact = [&](const std::optional<ExactTokens>& tokens, int column, int n_tokens) {
    for (int begin = 0; begin < n_tokens; begin += n_columns) {
      const int end = std::min(begin + n_columns, n_tokens);
      // In the query's type, as everywhere.
      const mx::array keys = mx::astype(tokens_of(after(tokens->first), begin, end), q.dtype(), s);
      attend(column + begin, end - begin, aligned(mx::astype(keys, score_type, s)),
             aligned(mx::astype(tokens_of(after(tokens->second), begin, end), q.dtype(), s)));
    }
  };
  attend_exact(options.first, 0, n.n_first);
  for (int begin = 0; begin < n.n_coded; begin += n_columns) {
    const int end = std::min(begin + n_columns, n.n_coded);
    PackedKeys keys = k;
    PackedValues values = v;
    keys.codes = tokens_of(after(k.codes), begin, end);
    keys.norms = tokens_of(k.norms, begin, end);
    if (k.means) keys.means = tokens_of(*k.means, begin / kBlockTokens, n_blocks(end));
    values.codes = tokens_of(after(v.codes), begin, end);
    values.params = tokens_of(v.params, begin, end);
    const mx::array tokens = dequantize_keys(keys, false, score_type, s);
    attend(n.n_first + begin, end - begin, tokens,
           options.latent ? mx::astype(tokens, q.dtype(), s) : dequantize_values(values, false, q.dtype(), s));
  }
  attend_exact(options.tail, n.n_first + n.n_coded, n.n_tail);

  std::vector<mx::array> outs;
  for (const Softmax& row : rows) {
    const mx::array none = mx::equal(row.sum, mx::array(0.0f), s);
    const mx::array out = mx::divide(row.out, mx::where(none, mx::array(1.0f), row.sum, s), s);
    const mx::array result = mx::where(none, mx::array(0.0f), out, s);
    if (options.lse) {
      outs.push_back(mx::concatenate({result, mx::add(row.max, mx::log(row.sum, s), s)}, 3, s));
    } else {
      outs.push_back(mx::astype(result, q.dtype(), s));
    }
  }
  return outs.size() == 1 ? outs[0] : mx::concatenate(outs, 2, s);
}

// Listed tokens where no kernel reads lists: MLX's operations gather them, then they are attended to as any others, with what
// their blocks' means add to the scores in a mask. A query with a list of its own becomes a sequence of its own.
mx::array gathered_attention(const mx::array& queries, const PackedKeys& k, const PackedValues& v,
                             const AttentionOptions& options, const Shapes& n, float scale, mx::Stream s) {
  const mx::array& list = *options.indices;
  std::vector<FixedArray> arrays{{"q", queries}, {"packed_k.codes", k.codes}, {"indices", list}};
  if (options.first) arrays.push_back({"first[0]", options.first->first});
  if (options.tail) arrays.push_back({"tail[0]", options.tail->first});
  if (options.mask) arrays.push_back({"mask", *options.mask});
  const mx::array q = fixed_shapes(queries, arrays, kOp, s);
  const int n_repeats = n.n_q_heads / n.n_kv_heads, n_listed = list.shape(3), n_lists = list.shape(2);
  const mx::Shape rows{n.batch, n.n_kv_heads, n_repeats, n.n_queries, n_listed};
  const mx::Shape full{n.batch, n.n_q_heads, n.n_queries, n_listed};
  // [B, n_kv_heads or 1, L or 1, n_listed] to `full`.
  auto to_rows = [&](const mx::array& x) { return mx::reshape(mx::broadcast_to(mx::expand_dims(x, 2, s), rows, s), full, s); };
  // [B, n_q_heads, L, ...]: one sequence for each list.
  auto by_list = [&](const mx::array& x) {
    if (n_lists == 1) return x;
    return mx::reshape(mx::transpose(x, {0, 2, 1, 3}, s), {n.batch * n_lists, n.n_q_heads, 1, x.shape(3)}, s);
  };

  const mx::array ids = list.dtype() == mx::int32 ? list : mx::view(list, mx::int32, s);
  mx::array attended = mx::logical_and(mx::greater_equal(ids, mx::array(0), s), mx::less(ids, mx::array(n.n_coded), s), s);
  const mx::array tokens = mx::where(attended, ids, mx::array(0), s);
  const mx::array columns = mx::add(tokens, mx::array(n.n_first), s);
  auto restrict = [&](const mx::array& condition) { attended = mx::logical_and(attended, condition, s); };
  auto of_sequence = [&](const mx::array& x) { return mx::reshape(x, {n.batch, 1, 1, 1}, s); };
  if (options.mask_mode == "causal") {
    const int seen = n.n_keys() - n.n_queries;
    restrict(
        mx::less_equal(columns, mx::reshape(mx::arange(seen, seen + n.n_queries, mx::int32, s), {1, 1, n.n_queries, 1}, s), s));
  }
  if (options.left_padding) restrict(mx::greater_equal(columns, of_sequence(*options.left_padding), s));
  if (options.lengths) restrict(mx::less(tokens, of_sequence(mx::slice(*options.lengths, {0, 1}, {n.batch, 2}, s)), s));

  mx::array bias = mx::zeros({1}, mx::float32, s);
  if (k.means) {
    const mx::array x = mx::reshape(mx::multiply(mx::astype(q, mx::float32, s), mx::array(scale), s),
                                    {n.batch, n.n_kv_heads, n_repeats * n.n_queries, n.head_dim}, s);
    const mx::array of_blocks = mx::matmul(x, mx::swapaxes(mx::astype(*k.means, mx::float32, s), 2, 3, s), s);
    mx::Shape shape = rows;
    shape[4] = of_blocks.shape(3);
    const mx::array blocks = mx::expand_dims(mx::floor_divide(tokens, mx::array(int(kBlockTokens)), s), 2, s);
    bias = mx::take_along_axis(mx::reshape(of_blocks, shape, s), mx::broadcast_to(blocks, rows, s), 4, s);
    // Minus infinity would be a token that is not attended.
    bias = mx::reshape(mx::add(bias, mx::multiply(bias, mx::array(0.0f), s), s), full, s);
  }
  std::vector<mx::array> parts;
  std::optional<mx::array> given;
  if (options.mask) given = check_mask(*options.mask, n, s);
  // Adds a part of the given mask to scores, and minus infinity where a condition is not met.
  auto add_part = [&](mx::array scores, std::optional<mx::array> condition, const std::optional<mx::array>& part,
                      int n_columns) {
    if (part && part->dtype() == mx::bool_) {
      condition = condition ? mx::logical_and(*condition, *part, s) : *part;
    } else if (part) {
      scores = mx::add(scores, *part, s);
    }
    if (condition) scores = mx::where(*condition, scores, mx::array(-INFINITY), s);
    parts.push_back(mx::broadcast_to(scores, {n.batch, n.n_q_heads, n.n_queries, n_columns}, s));
  };
  auto add_exact = [&](int column, int n_columns) {
    if (n_columns == 0) return;
    const Piece at{0, n.n_queries, column, n_columns};
    std::optional<mx::array> part = given;
    if (part && part->shape(3) != 1) {
      mx::Shape first(4, 0), last = part->shape();
      first[3] = column;
      last[3] = column + n_columns;
      part = mx::slice(*part, first, last, s);
    }
    add_part(mx::zeros({1}, mx::float32, s), column_mask(options, n, at, s), part, n_columns);
  };
  add_exact(0, n.n_first);
  std::optional<mx::array> part = given;
  if (part && part->shape(3) != 1) {
    mx::Shape shape = full;
    shape[3] = n.n_keys();
    part = mx::take_along_axis(mx::broadcast_to(*part, shape, s), to_rows(columns), 3, s);
  }
  add_part(bias, to_rows(attended), part, n_listed);
  add_exact(n.n_first + n.n_coded, n.n_tail);

  const mx::array of_heads = mx::broadcast_to(tokens, {n.batch, n.n_kv_heads, n_lists, n_listed}, s);
  auto gather = [&](const mx::array& x) {
    const int width = x.shape(3);
    const mx::array at = mx::broadcast_to(mx::reshape(of_heads, {n.batch, n.n_kv_heads, n_lists * n_listed, 1}, s),
                                          {n.batch, n.n_kv_heads, n_lists * n_listed, width}, s);
    const mx::array y = mx::reshape(mx::take_along_axis(x, at, 2, s), {n.batch, n.n_kv_heads, n_lists, n_listed, width}, s);
    return mx::reshape(mx::transpose(y, {0, 2, 1, 3, 4}, s), {n.batch * n_lists, n.n_kv_heads, n_listed, width}, s);
  };
  PackedKeys keys = k;
  PackedValues values = v;
  keys.codes = gather(k.codes);
  keys.norms = gather(k.norms);
  keys.means = std::nullopt;
  if (k.signs) {
    keys.signs = gather(*k.signs);
    keys.residual_norms = gather(*k.residual_norms);
  }
  values.codes = gather(v.codes);
  values.params = gather(v.params);
  auto repeat = [&](const std::optional<ExactTokens>& x) -> std::optional<ExactTokens> {
    if (!x || n_lists == 1) return x;
    return ExactTokens{mx::repeat(x->first, n_lists, 0, s), mx::repeat(x->second, n_lists, 0, s)};
  };
  AttentionOptions inner = options;
  inner.scale = scale;
  inner.mask_mode.clear();
  inner.mask = by_list(mx::concatenate(parts, 3, s));
  inner.indices = inner.left_padding = inner.lengths = std::nullopt;
  inner.first = repeat(options.first);
  inner.tail = repeat(options.tail);
  mx::array out = turboquant_attention(by_list(q), keys, values, inner, s);
  if (n_lists == 1) return out;
  return mx::transpose(mx::reshape(out, {n.batch, n_lists, n.n_q_heads, out.shape(3)}, s), {0, 2, 1, 3}, s);
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
  const bool turns_latents =
      options.latent && !options.turned && !options.composed_bytes && stream.device == mx::Device::gpu &&
      key_rotation == Rotation::kHadamard && is_half(q.dtype()) && !options.sinks && !options.lengths &&
      !options.left_padding &&
      gpu_has_latent_kernel(n.head_dim, n.n_q_heads / n.n_kv_heads * n.n_queries, n.batch * n.n_kv_heads, stream);
  if (key_rotation == Rotation::kOrthogonal || value_rotation != key_rotation || turns_latents) {
    auto turn = [&](const mx::array& x, int padded, Rotation how) {
      if (how == Rotation::kOrthogonal) return apply_orthogonal(x, padded, x.shape(-1), false, stream);
      mx::array full = pad_last(x, padded, stream);
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
      if (options.latent) {
        const mx::array latents = turn_keys(tokens->first);
        return ExactTokens{latents, latents};
      }
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
    inner.turned = turns_latents;
    const mx::array whole = turboquant_attention(turn_queries(q), inner_k, inner_v, inner, stream);
    mx::Shape values_end = whole.shape();
    values_end[3] = value_dim;
    mx::array out = options.lse ? mx::slice(whole, {0, 0, 0, 0}, values_end, stream) : whole;
    if (value_rotation == Rotation::kOrthogonal) {
      out = apply_orthogonal(out, value_dim, n.value_dim, true, stream);
    } else if (value_rotation == Rotation::kHadamard) {
      out = rotate(out, true, "hadamard", stream);
    }
    if (options.latent && k.balance) {
      const mx::array balance = mx::repeat(mx::expand_dims(*k.balance, 1, stream), n.n_q_heads / n.n_kv_heads, 0, stream);
      out = mx::divide(mx::slice(out, {0, 0, 0, 0}, {n.batch, n.n_q_heads, n.n_queries, n.head_dim}, stream), balance, stream);
    }
    if (out.shape(3) != n.value_dim) {
      out = mx::slice(out, {0, 0, 0, 0}, {n.batch, n.n_q_heads, n.n_queries, n.value_dim}, stream);
    }
    if (!options.lse) return mx::astype(out, q.dtype(), stream);
    const mx::array lse = mx::slice(whole, {0, 0, 0, value_dim}, whole.shape(), stream);
    return mx::concatenate({mx::astype(out, mx::float32, stream), lse}, 3, stream);
  }

  TurboQuantAttention::State state{.scale = scale,
                                   .causal = options.mask_mode == "causal",
                                   .hadamard = key_rotation == Rotation::kHadamard,
                                   .key_bits = k.bits,
                                   .value_bits = v.bits,
                                   .value_coding = v.coding,
                                   .head_dim = n.head_dim,
                                   .value_dim = n.value_dim,
                                   .present = uint32_t(k.signs.has_value()) << kSigns | uint32_t(options.indices.has_value())
                                                                                            << kIndices,
                                   .of_cache = options.of_cache,
                                   .cache_has_means = k.means.has_value(),
                                   .latent = options.latent,
                                   .turned = options.turned,
                                   .lse = options.lse};
  const bool has_kernel = stream.device == mx::Device::cpu || gpu_has_kernel(state, q);
  if (options.indices && (!has_kernel || options.composed_bytes)) {
    PackedKeys keys = k;
    keys.means = std::move(means);
    if (n.n_coded > 0 && q.size() > 0) return gathered_attention(q, keys, v, options, n, scale, stream);
    AttentionOptions unlisted = options;  // there is nothing to list
    unlisted.indices = std::nullopt;
    return turboquant_attention(fixed_shapes(q, {{"packed_k.codes", k.codes}}, kOp, stream), k, v, unlisted, stream);
  }
  if (!has_kernel || options.composed_bytes) {
    return composed_attention(q, k, v, options, n, scale, options.composed_bytes.value_or(kComposedBytes), stream);
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
  if (options.indices) add(kIndices, *options.indices);
  auto primitive = std::make_shared<TurboQuantAttention>(stream, state);
  return mx::array({n.batch, n.n_q_heads, n.n_queries, state.out_columns()}, options.lse ? mx::float32 : q.dtype(), primitive,
                   inputs);
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
                                 .indices = optional(x.indices),
                                 .first = tokens(x.first_keys, x.first_values),
                                 .tail = tokens(x.tail_keys, x.tail_values),
                                 .latent = state_.latent,
                                 .turned = state_.turned};
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
  shape.back() = state_.out_columns();
  return {shape};
}

}  // namespace tqext
