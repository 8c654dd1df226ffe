#include "latent_attention.h"

#include <cmath>

#include "check_arrays.h"
#include "mlx/ops.h"

namespace tqext {

namespace {

constexpr const char* kOp = "latent_attention";

struct Shapes {
  int batch, n_q_heads, n_kv_heads, n_queries, dim, n_keys;
};

int check_exact(const std::optional<mx::array>& x, const Shapes& n, const char* name) {
  if (!x) return 0;
  check_activation(*x, kOp, name);
  check(x->ndim() == 4, "[", kOp, "] ", name, ": expected 4 axes [batch, n_kv_heads, n_tokens, dim], got shape ", x->shape());
  check_shape(*x, {n.batch, n.n_kv_heads, x->shape(2), n.dim}, kOp, name);
  return x->shape(2);
}

Shapes check_inputs(const mx::array& q, const PackedKeys& latents, const LatentOptions& options, mx::Stream s) {
  check_activation(q, kOp, "q");
  check(q.ndim() == 4, "[", kOp, "] q: expected 4 axes [batch, n_q_heads, n_queries, dim], got shape ", q.shape());
  check_packed_keys(latents, kOp);
  Shapes n{q.shape(0), q.shape(1), latents.codes.shape(1), q.shape(2), latents.head_dim, latents.codes.shape(2)};
  check(q.shape(3) == n.dim, "[", kOp, "] q: expected dimension ", n.dim, " as the latents have, got shape ", q.shape());
  check(latents.codes.shape(0) == n.batch, "[", kOp, "] packed.codes: expected batch ", n.batch, ", got shape ",
        latents.codes.shape());
  check(n.n_kv_heads > 0 && n.n_q_heads % n.n_kv_heads == 0, "[", kOp, "] q: expected a multiple of ", n.n_kv_heads,
        " heads, got ", n.n_q_heads);
  check(!latents.signs && !latents.residual_norms, "[", kOp,
        "] packed.signs: expected none, as residual signs estimate scores and no values, got residual signs");
  check(resolve_rotation(latents.rotation, padded_dim(n.dim), kOp) != Rotation::kOrthogonal, "[", kOp,
        "] packed.rotation: expected \"hadamard\" with a dimension that has a Hadamard matrix, or \"none\", got a dense "
        "rotation");
  if (latents.balance) check_balance(*latents.balance, n.n_kv_heads, n.dim, kOp);
  if (latents.means) {
    const bool rotated = latents.rotation == "none";
    check_means(*latents.means, n.batch, n.n_kv_heads, n.n_keys, n.dim, rotated, kOp, s);
  }
  check(std::isfinite(options.scale), "[", kOp, "] scale: expected a finite number, got ", options.scale);
  n.n_keys += check_exact(options.first, n, "first");
  n.n_keys += check_exact(options.tail, n, "tail");
  check(options.q_rope.has_value() == options.k_rope.has_value(), "[", kOp,
        "] k_rope: expected q_rope and k_rope together, got only one");
  if (options.q_rope) {
    check_activation(*options.q_rope, kOp, "q_rope");
    check_activation(*options.k_rope, kOp, "k_rope");
    check(options.q_rope->ndim() == 4, "[", kOp,
          "] q_rope: expected 4 axes [batch, n_q_heads, n_queries, rope_dim], got shape ", options.q_rope->shape());
    const int rope_dim = options.q_rope->shape(3);
    check_shape(*options.q_rope, {n.batch, n.n_q_heads, n.n_queries, rope_dim}, kOp, "q_rope");
    check_shape(*options.k_rope, {n.batch, n.n_kv_heads, n.n_keys, rope_dim}, kOp, "k_rope");
  }
  if (auto* mode = std::get_if<std::string>(&options.mask)) {
    check(*mode == "causal", "[", kOp, "] mask: expected None, \"causal\" or an array, got \"", *mode, "\"");
  } else if (auto* mask = std::get_if<mx::array>(&options.mask)) {
    check(mask->dtype() == mx::bool_ || is_activation(mask->dtype()), "[", kOp,
          "] mask: expected bool, float32, float16 or bfloat16, got ", mask->dtype());
    const mx::Shape full{n.batch, n.n_q_heads, n.n_queries, n.n_keys};
    bool fits = mask->ndim() <= 4;
    for (int i = 1; fits && i <= int(mask->ndim()); i++) fits = mask->shape(-i) == 1 || mask->shape(-i) == full[4 - i];
    check(fits, "[", kOp, "] mask: expected a shape that broadcasts to ", full,
          " [batch, n_q_heads, n_queries, n_keys], got shape ", mask->shape());
  }
  return n;
}

// The rotary part of the scores, fp32 [B, n_q_heads, L, n_keys].
mx::array rope_scores(const LatentOptions& options, const Shapes& n, mx::Stream s) {
  const int repeats = n.n_q_heads / n.n_kv_heads, dim = options.q_rope->shape(3);
  const mx::array q = mx::multiply(mx::astype(*options.q_rope, mx::float32, s), mx::array(options.scale), s);
  const mx::array k = mx::swapaxes(mx::astype(*options.k_rope, mx::float32, s), 2, 3, s);
  const mx::array rows = mx::reshape(q, {n.batch, n.n_kv_heads, repeats * n.n_queries, dim}, s);
  return mx::reshape(mx::matmul(rows, k, s), {n.batch, n.n_q_heads, n.n_queries, n.n_keys}, s);
}

}  // namespace

PackedValues values_of(const PackedKeys& latents) {
  return {.codes = latents.codes,
          .params = latents.norms,
          .bits = latents.bits,
          .head_dim = latents.head_dim,
          .coding = kValueLloyd,
          .rotation = latents.rotation};
}

mx::array latent_attention(const mx::array& q, const PackedKeys& latents, const LatentOptions& options, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const Shapes n = check_inputs(q, latents, options, stream);
  MaskArgument mask = options.mask;
  AttentionOptions inner{.scale = options.scale,
                         .mask_mode = "",
                         .mask = {},
                         .sinks = {},
                         .left_padding = {},
                         .lengths = {},
                         .indices = {},
                         .first = {},
                         .tail = {},
                         .latent = true,
                         .composed_bytes = options.composed_bytes};
  inner = with_mask(inner, mask);
  if (options.q_rope) {
    const mx::array scores = rope_scores(options, n, stream);
    if (!inner.mask) {
      inner.mask = scores;
    } else if (inner.mask->dtype() == mx::bool_) {
      inner.mask = mx::where(*inner.mask, scores, mx::array(-INFINITY), stream);
    } else {
      inner.mask = mx::add(mx::astype(*inner.mask, mx::float32, stream), scores, stream);
    }
  }
  if (options.first) inner.first = ExactTokens(*options.first, *options.first);
  if (options.tail) inner.tail = ExactTokens(*options.tail, *options.tail);
  return turboquant_attention(q, latents, values_of(latents), inner, stream);
}

}  // namespace tqext
