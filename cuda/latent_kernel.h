// Attention over latents on CUDA (latent_attention.cu).
#pragma once

#include <vector>

#include "attention_inputs.h"
#include "mlx/array.h"
#include "turboquant_attention.h"

namespace tqext::cuda {

// Latents and queries in the rotated space, q fp32; the shapes are those that gpu_has_latent_kernel says yes to.
void latent_attention(const TurboQuantAttention::State& state, const AttentionInputs& in, const std::vector<mx::array>& inputs,
                      mx::array& out, mx::Stream stream);

}  // namespace tqext::cuda
