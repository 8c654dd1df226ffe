#include "turboquant_attention.h"

#include <algorithm>
#include <optional>

#include "launch.h"
#include "mlx/allocator.h"

namespace tqext {

bool gpu_has_kernel(const TurboQuantAttention::State& state, const mx::array& q, const mx::array&) {
  return metal::has_attention_kernel(q.shape(2), state.head_dim, state.value_dim, state.hadamard, kMaxDecodeQueries);
}

void TurboQuantAttention::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  const mx::Stream s = stream();
  const mx::array& q = inputs[0];
  const mx::array key_codes = metal::packed_input(s, inputs[1]), key_norms = metal::packed_input(s, inputs[2]);
  const mx::array value_codes = metal::packed_input(s, inputs[3]), value_params = metal::packed_input(s, inputs[4]);

  metal::AttentionShape shape{};
  shape.type = metal::type_of(q.dtype());
  shape.batch = q.shape(0);
  shape.n_q_heads = q.shape(1);
  shape.n_kv_heads = key_codes.shape(1);
  shape.n_queries = q.shape(2);
  shape.head_dim = state_.head_dim;
  shape.value_dim = state_.value_dim;
  shape.n_coded = key_codes.shape(2);
  shape.key_bits = state_.key_bits;
  shape.value_bits = state_.value_bits;
  shape.hadamard = state_.hadamard;
  shape.causal = state_.causal;
  shape.scale = state_.scale;
  shape.n_cores = metal::gpu_cores(s);
  shape.q = metal::strides4(q);
  shape.key_codes = metal::strides3(key_codes);
  shape.key_norms = metal::strides3(key_norms);
  shape.value_codes = metal::strides3(value_codes);
  shape.value_params = metal::strides3(value_params, 2);

  // Absent arguments are never read, but every index must hold a buffer.
  std::vector<const mx::array*> buffers(kAttentionParams, &q);
  auto bind = [&](int index, const mx::array& x) {
    if (x.size() > 0) buffers[index] = &x;
  };
  bind(kAttentionKeyCodes, key_codes);
  bind(kAttentionKeyNorms, key_norms);
  bind(kAttentionValueCodes, value_codes);
  bind(kAttentionValueParams, value_params);
  if (const mx::array* mean = optional(inputs, kMean)) {
    shape.has_mean = 1;
    shape.mean = metal::mean_strides(*mean);
    bind(kAttentionMean, *mean);
  }
  std::optional<mx::array> signs, residual_norms;
  if (const mx::array* given = optional(inputs, kSigns)) {
    signs = metal::packed_input(s, *given);
    residual_norms = metal::packed_input(s, *optional(inputs, kResidualNorms));
    shape.has_residual = 1;
    shape.key_signs = metal::strides3(*signs);
    shape.residual_norms = metal::strides3(*residual_norms);
    bind(kAttentionKeySigns, *signs);
    bind(kAttentionResidualNorms, *residual_norms);
  }
  if (const mx::array* keys = optional(inputs, kFirstKeys)) {
    const mx::array* values = optional(inputs, kFirstValues);
    shape.n_first = keys->shape(2);
    shape.first_keys = metal::strides4(*keys);
    shape.first_values = metal::strides4(*values);
    bind(kAttentionFirstKeys, *keys);
    bind(kAttentionFirstValues, *values);
  }
  if (const mx::array* keys = optional(inputs, kTailKeys)) {
    const mx::array* values = optional(inputs, kTailValues);
    shape.n_tail = keys->shape(2);
    shape.tail_keys = metal::strides4(*keys);
    shape.tail_values = metal::strides4(*values);
    bind(kAttentionTailKeys, *keys);
    bind(kAttentionTailValues, *values);
  }
  if (const mx::array* mask = optional(inputs, kMask)) {
    shape.mask_kind = mask->dtype() == mx::bool_ ? kMaskBool : kMaskFloat;
    shape.mask = metal::broadcast_strides(*mask);
    bind(kAttentionMask, *mask);
  }
  // Small vectors that the kernel reads without strides.
  auto bind_vector = [&](OptionalInput which, int index, std::optional<mx::array>& holder) {
    const mx::array* x = optional(inputs, which);
    if (!x) return 0;
    holder = metal::contiguous(s, *x);
    bind(index, *holder);
    return 1;
  };
  std::optional<mx::array> sinks, left_padding, lengths;
  shape.has_sinks = bind_vector(kSinks, kAttentionSinks, sinks);
  shape.has_left_padding = bind_vector(kLeftPadding, kAttentionLeftPadding, left_padding);
  shape.has_lengths = bind_vector(kLengths, kAttentionLengths, lengths);

  const metal::AttentionPlan plan = metal::plan_attention(shape);
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

}  // namespace tqext
