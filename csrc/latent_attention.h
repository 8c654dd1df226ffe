// latent_attention: attention over cached latents that are keys and values at once (multi-head latent attention, DeepSeek-V2,
// arXiv:2405.04434), with the query and the output in the latents' space.
//
// Columns are ordered first ++ coded ++ tail. x̂: a decoded latent, rotate^-1(k̂) / balance + the mean of its block.
//   score  = scale * (<q, x> + <q_rope, k_rope>) + mask, x = x̂ or an exact latent
//   output = sum over columns of softmax(score) x
// The sum over coded latents is taken in the rotated space and rotated back once; a block's mean is weighed by the sum of its
// tokens' weights.
#pragma once

#include <optional>

#include "history.h"
#include "turboquant_attention.h"

namespace tqext {

struct LatentOptions {
  float scale;
  MaskArgument mask;
  std::optional<mx::array> q_rope;  // [B, n_q_heads, L, R]
  std::optional<mx::array> k_rope;  // [B, n_kv_heads, n_keys, R]
  std::optional<mx::array> first, tail;
  std::optional<int64_t> composed_bytes = std::nullopt;  // as in AttentionOptions
};

mx::array latent_attention(const mx::array& q, const PackedKeys& latents, const LatentOptions& options, mx::StreamOrDevice s);

// Latents as the values that turboquant_attention takes beside them.
PackedValues values_of(const PackedKeys& latents);

}  // namespace tqext
