// A decoding step of a cache, in as few calls from Python as mlx-lm's own cache takes: append a token, attend.
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "turboquant_attention.h"

namespace tqext {

using MaskArgument = std::variant<std::monostate, std::string, mx::array>;  // none, "causal", an array

// What attention reads besides the recent tokens. It changes only when a block is encoded.
class History {
 public:
  // latent: the values are the keys (latent_attention.h), which stand in both places, also among exact tokens.
  History(PackedKeys keys, PackedValues values, std::optional<ExactTokens> first, bool latent)
      : keys_(std::move(keys)), values_(std::move(values)), first_(std::move(first)), latent_(latent) {}
  mx::array attend(const mx::array& q, const mx::array& tail_keys, const mx::array& tail_values, float scale,
                   const MaskArgument& mask, const std::optional<mx::array>& sinks, const std::optional<mx::array>& lengths,
                   const std::optional<mx::array>& left_padding, bool lse) const;

 private:
  PackedKeys keys_;
  PackedValues values_;
  std::optional<ExactTokens> first_;
  bool latent_;
};

AttentionOptions with_mask(AttentionOptions options, const MaskArgument& mask);

// keys [B, n_kv_heads, 1, D] and values: one token. It is written to column `at` of the buffers [B, n_kv_heads, width, D], in
// place where nothing else holds them. Returns the columns up to it, or nothing, and writes nothing, if the token is not one
// that the buffers have room for.
std::optional<ExactTokens> append_token(mx::array& tail_keys, mx::array& tail_values, const mx::array& keys,
                                        const mx::array& values, int at);

// The same with a column for each sequence, int32 [B, 1, 1, 1], of which `most` is the last.
std::optional<ExactTokens> append_tokens(mx::array& tail_keys, mx::array& tail_values, const mx::array& keys,
                                         const mx::array& values, const mx::array& at, int most);

}  // namespace tqext
