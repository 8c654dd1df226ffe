#include "turboquant_attention.h"

#include <algorithm>
#include <optional>

#include "launch.h"
#include "mlx/allocator.h"
#include "pipelines.h"

namespace tqext {

bool gpu_has_kernel(const TurboQuantAttention::State& state, const mx::array& q) {
  const bool listed = state.present >> kIndices & 1;
  if (state.lse || (listed && (state.latent || !metal::has_listed_kernel(q.shape(2))))) return false;
  if (state.latent) return metal::has_latent_kernel(state.head_dim, q.shape(2));
  return metal::has_attention_kernel(state.head_dim, state.value_dim, state.hadamard);
}

// Of latents that are turned: the kernel turns them itself.
bool gpu_has_latent_kernel(int, int, int, mx::Stream) { return false; }

void TurboQuantAttention::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  const mx::Stream s = stream();
  const AttentionInputs in = named(inputs);
  const mx::array key_codes = metal::packed_input(s, in.key_codes), key_norms = metal::packed_input(s, in.key_norms);
  const mx::array value_codes = metal::packed_input(s, in.value_codes);
  const mx::array value_params = metal::packed_input(s, in.value_params);

  metal::AttentionShape shape{};
  shape.type = metal::type_of(in.q.dtype());
  shape.batch = in.batch();
  shape.n_q_heads = in.n_q_heads();
  shape.n_kv_heads = in.n_kv_heads();
  shape.n_queries = in.n_queries();
  shape.head_dim = state_.head_dim;
  shape.value_dim = state_.value_dim;
  shape.n_first = in.n_first();
  shape.n_coded = in.n_coded();
  shape.n_tail = in.n_tail();
  shape.key_bits = state_.key_bits;
  shape.value_bits = state_.value_bits;
  shape.value_coding = state_.value_coding;
  shape.hadamard = state_.hadamard;
  shape.causal = state_.causal && shape.n_queries > 1;  // the last token sees all: no pipeline of its own
  shape.latent = state_.latent;
  shape.scale = state_.scale;
  shape.n_cores = metal::gpu_cores(s);
  shape.q = metal::strides4(in.q);
  shape.key_codes = metal::strides3(key_codes);
  shape.key_norms = metal::strides3(key_norms);
  shape.value_codes = metal::strides3(value_codes);
  shape.value_params = metal::strides3(value_params, state_.value_coding == kValueLloyd ? 1 : 2);

  // Absent arguments are never read, but every index must hold a buffer.
  std::vector<const mx::array*> buffers(kAttentionParams, &in.q);
  auto bind = [&](int index, const mx::array& x) {
    if (x.size() > 0) buffers[index] = &x;
  };
  bind(kAttentionKeyCodes, key_codes);
  bind(kAttentionKeyNorms, key_norms);
  bind(kAttentionValueCodes, value_codes);
  bind(kAttentionValueParams, value_params);
  if (in.means) {
    shape.means_kind = in.means->dtype() == mx::float16 ? kMeansHalf : kMeansFloat;
    shape.means = metal::strides4(*in.means);
    bind(kAttentionMeans, *in.means);
  }
  if (in.balance) {
    shape.has_balance = 1;
    shape.balance = metal::balance_strides(*in.balance);
    bind(kAttentionBalance, *in.balance);
  }
  std::optional<mx::array> signs, residual_norms;
  if (in.signs) {
    signs = metal::packed_input(s, *in.signs);
    residual_norms = metal::packed_input(s, *in.residual_norms);
    shape.has_residual = 1;
    shape.key_signs = metal::strides3(*signs);
    shape.residual_norms = metal::strides3(*residual_norms);
    bind(kAttentionKeySigns, *signs);
    bind(kAttentionResidualNorms, *residual_norms);
  }
  if (in.first_keys) {
    shape.first_keys = metal::strides4(*in.first_keys);
    shape.first_values = metal::strides4(*in.first_values);
    bind(kAttentionFirstKeys, *in.first_keys);
    bind(kAttentionFirstValues, *in.first_values);
  }
  if (in.tail_keys) {
    shape.tail_keys = metal::strides4(*in.tail_keys);
    shape.tail_values = metal::strides4(*in.tail_values);
    bind(kAttentionTailKeys, *in.tail_keys);
    bind(kAttentionTailValues, *in.tail_values);
  }
  if (in.mask) {
    shape.mask_kind = in.mask->dtype() == mx::bool_ ? kMaskBool : kMaskFloat;
    shape.mask = metal::broadcast_strides(*in.mask);
    bind(kAttentionMask, *in.mask);
  }
  // Small vectors that the kernel reads without strides.
  auto bind_vector = [&](const mx::array* x, int index, std::optional<mx::array>& holder) {
    if (!x) return 0;
    holder = metal::contiguous(s, *x);
    bind(index, *holder);
    return 1;
  };
  std::optional<mx::array> sinks, left_padding, lengths;
  shape.has_sinks = bind_vector(in.sinks, kAttentionSinks, sinks);
  shape.has_left_padding = bind_vector(in.left_padding, kAttentionLeftPadding, left_padding);
  if (in.indices) {
    shape.has_indices = 1;
    shape.n_listed = in.indices->shape(3);
    shape.n_lists = in.indices->shape(2);
    shape.indices = metal::broadcast_strides(*in.indices);
    bind(kAttentionIndices, *in.indices);
  }
  shape.has_lengths = bind_vector(in.lengths, kAttentionLengths, lengths);

  const metal::AttentionPlan plan = metal::plan_attention(shape);
  if (state_.of_cache && !state_.latent && shape.n_queries > kMaxDecodeQueries) {
    const bool window = shape.mask_kind == kMaskBool && shape.batch == 1;
    for (const metal::Dispatch& d : metal::pipelines_of_a_generation(shape, state_.cache_has_means, window)) {
      metal::prepare(s, d);
    }
  }
  const auto rows = [](int64_t n) { return int(std::max<int64_t>(1, (n + 31) / 32)); };
  mx::array parts = metal::scratch(s, {rows(plan.n_part_numbers), 32}, mx::float32);
  mx::array states = metal::scratch(s, {rows(plan.n_state_numbers), 32}, mx::float32);
  buffers[kAttentionParts] = &parts;
  buffers[kAttentionStates] = &states;
  for (size_t step = 0; step < plan.dispatches.size(); step++) {
    const bool last = step + 1 == plan.dispatches.size();
    std::vector<metal::Binding> bindings;
    for (int index = 0; index < kAttentionParams; index++) {
      const bool is_scratch = index == kAttentionParts || index == kAttentionStates;
      if (index == kAttentionOut && last) {
        bindings.push_back({index, &out, true});
      } else {
        bindings.push_back({index, buffers[index], is_scratch && step == 0});
      }
    }
    metal::launch(s, plan.dispatches[step], bindings, plan.params, kAttentionParams);
  }
}

int prepare_pipelines(const LayerShapes& layer) {
  const bool hadamard = layer.rotation == "hadamard" && hadamard_factor(padded_dim(layer.head_dim)) &&
                        hadamard_factor(padded_dim(layer.value_dim));
  if (mx::default_device() != mx::Device::gpu || !hadamard) return 0;
  const mx::Stream s = mx::default_stream(mx::Device::gpu);
  metal::AttentionShape shape{};
  shape.type = metal::type_of(layer.query_dtype);
  shape.batch = 1;
  shape.n_q_heads = layer.n_q_heads;
  shape.n_kv_heads = layer.n_kv_heads;
  shape.head_dim = layer.head_dim;
  shape.value_dim = layer.value_dim;
  shape.key_bits = layer.key_bits;
  shape.value_bits = layer.value_bits;
  shape.value_coding = layer.value_coding;
  shape.hadamard = 1;
  shape.has_balance = layer.has_balance;
  shape.has_residual = layer.has_residual;
  shape.has_sinks = layer.has_sinks;
  shape.latent = layer.latent;
  shape.n_cores = metal::gpu_cores(s);
  const auto all = metal::pipelines_of_a_layer(shape, layer.has_means, metal::type_of(layer.token_dtype), layer.has_window);
  for (const metal::Dispatch& d : all) metal::prepare(s, d);
  return int(all.size());
}

}  // namespace tqext
