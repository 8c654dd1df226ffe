// turboquant_attention of many query rows on CUDA (prompt_attention.cu).
#pragma once

#include <optional>
#include <vector>

#include "attention_inputs.h"
#include "codebook.h"
#include "mlx/array.h"
#include "turboquant_attention.h"

namespace tqext::cuda {

// Query rows of a KV head up to which the kernel for few rows takes the call: two of its row tiles.
enum : int { kMaxFewRows = 32 };

// Runs the call, or returns false where the device's shared memory is too small for the shapes.
bool prompt_attention(const TurboQuantAttention::State& state, const AttentionInputs& in, const std::vector<mx::array>& inputs,
                      mx::array& out, mx::Stream stream);

// Levels / 128 as find_levels wants them (PromptParams::key_levels).
void pack_half_levels(const Codebook& book, uint32_t (&words)[4]);

}  // namespace tqext::cuda
