// turboquant_attention: softmax(scale * q k^T + mask) v over exact first tokens, coded tokens and an exact tail, in one pass
// over the packed bytes.
//
// Columns are ordered first ++ coded ++ tail; n_keys is their sum. Per query row and column:
//   coded score  = scale * (<rotate(q / balance), k̂> + <q, mean of the column's block>) [+ the residual estimate of format.h]
//   exact score  = scale * <q, k>
//   output       = rotate^-1(sum over coded p v̂) + sum over exact p v, divided by sum p + exp(sinks)
// A row that attends to nothing is zero.
//
// Latent (latent_attention.h): the values are the keys. A coded token's value is rotate^-1(k̂) / balance + the mean of its
// block, an exact one's is its key.
//
// Validity of column c for row i of sequence b:
//   c >= left_padding[b]; inside each part, index < lengths[b][part]; mask
//   "causal": c <= n_keys - L + i; with lengths, the last L tail columns are the rows' own tokens, always stored, and
//   lengths[b][2] counts the tail tokens before them.
//
// lse: the output is fp32 with one column more: the log of sum p + exp(sinks), which joins results over parts of the tokens.
//
// indices: of the coded tokens only those that the list names are attended to, each as often as it is named; ids count from the
// first coded token. A slot whose id is none of [0, n_coded) is empty (uint32 as int32: 2^31 and above are negative). What is
// valid is decided by a token's column as without a list. Exact tokens are not listed: they are attended to as without one.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_inputs.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "rotate.h"
#include "turboquant_encode.h"

namespace tqext {

using ExactTokens = std::pair<mx::array, mx::array>;  // keys, values

struct AttentionOptions {
  std::optional<float> scale;
  std::string mask_mode;  // "" or "causal"
  std::optional<mx::array> mask, sinks, left_padding, lengths, indices;
  std::optional<ExactTokens> first, tail;
  // The values are the keys: packed_v and the second of exact tokens are those of the keys, and are not looked at.
  bool latent = false;
  // With latent: all is in the rotated space, for a kernel to which 16 bits of the query are enough.
  bool turned = false;
  bool lse = false;
  // The cache of a generation calls: Metal compiles with a prompt what its later steps need.
  bool of_cache = false;
  // Composes of MLX's operations within so many bytes what a kernel would do: for tests.
  std::optional<int64_t> composed_bytes = std::nullopt;
};

mx::array turboquant_attention(const mx::array& q, const PackedKeys& k, const PackedValues& v, const AttentionOptions& options,
                               mx::StreamOrDevice s);

// Queries up to which a step counts as decoding (one token, or the verification of a draft): fused on every backend.
enum : int { kMaxDecodeQueries = 8 };

class TurboQuantAttention : public mx::UnaryPrimitive {
 public:
  struct State {
    float scale;
    bool causal, hadamard;  // hadamard: rotate query and output inside; else everything is in the rotated space
    int key_bits, value_bits, value_coding, head_dim, value_dim;
    uint32_t present;  // bit i: optional input i is there
    bool of_cache = false, cache_has_means = false;
    bool latent = false, turned = false;  // as in AttentionOptions; the values' inputs are those of the keys
    bool lse = false;
    int out_columns() const { return value_dim + lse; }
    bool operator==(const State&) const = default;
  };
  TurboQuantAttention(mx::Stream stream, const State& state) : UnaryPrimitive(stream), state_(state) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(TurboQuantAttention)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override {
    return state_ == static_cast<const TurboQuantAttention&>(other).state_;
  }
  const State& state() const { return state_; }
  AttentionInputs named(const std::vector<mx::array>& inputs) const { return {inputs, state_.present}; }

 private:
  State state_;
};

// Whether the GPU backend of this build has a kernel for the shapes; otherwise the op is composed of MLX's own operations
// on the dequantised tokens of this call.
bool gpu_has_kernel(const TurboQuantAttention::State& state, const mx::array& q);

// The same for latents that are turned: n_rows query rows of each of n_heads KV heads of all sequences.
bool gpu_has_latent_kernel(int head_dim, int n_rows, int n_heads, mx::Stream stream);

}  // namespace tqext
