// What the hosts of both attention kernels do alike: codes of the variants, and the inputs as arguments.
#pragma once

#include <cstdint>

#include "attention_inputs.h"
#include "params.h"
#include "runtime.h"
#include "turboquant_attention.h"

namespace tqext::cuda {

inline int mask_code(const mx::array* mask) {
  return !mask ? int(kMaskNone) : mask->dtype() == mx::bool_ ? int(kMaskBool) : int(kMaskFloat);
}

template <class T, size_t n>
void set_input(const mx::array& x, const T*& data, int64_t (&stride)[n]) {
  data = static_cast<const T*>(device_pointer(x));
  copy_strides(x, stride);
}
template <class T, size_t n>
void set_input(const mx::array* x, const T*& data, int64_t (&stride)[n]) {
  if (x) set_input(*x, data, stride);
}

// Params: AttentionParams or PromptParams. Whether wide loads are possible, and the levels, are left to the caller.
template <class Params>
void set_inputs(Params& p, const TurboQuantAttention::State& state, const AttentionInputs& in) {
  p.n_kv_heads = in.n_kv_heads();
  p.n_repeats = in.n_repeats();
  p.n_queries = in.n_queries();
  p.head_dim = state.head_dim;
  p.value_dim = state.value_dim;
  p.n_first = in.n_first();
  p.n_coded = in.n_coded();
  p.n_tail = in.n_tail();
  p.causal = state.causal;
  p.hadamard = state.hadamard;
  set_input(in.q, p.q, p.q_stride);
  set_input(in.key_codes, p.key_codes, p.key_code_stride);
  set_input(in.key_norms, p.key_norms, p.key_norm_stride);
  set_input(in.value_codes, p.value_codes, p.value_code_stride);
  set_input(in.value_params, p.value_params, p.value_param_stride);
  set_input(in.means, p.means, p.mean_stride);
  p.means_kind = means_code(in.means);
  set_input(in.balance, p.balance, p.balance_stride);
  set_input(in.first_keys, p.first_keys, p.first_key_stride);
  set_input(in.first_values, p.first_values, p.first_value_stride);
  set_input(in.tail_keys, p.tail_keys, p.tail_key_stride);
  set_input(in.tail_values, p.tail_values, p.tail_value_stride);
  if (in.mask) {
    p.mask = device_pointer(*in.mask);
    for (int axis = 0; axis < 4; axis++) p.mask_stride[axis] = in.mask->shape(axis) == 1 ? 0 : in.mask->strides(axis);
  }
  if (in.sinks) {
    p.sinks = static_cast<const float*>(device_pointer(*in.sinks));
    p.sinks_stride = in.sinks->strides(0);
  }
  if (in.left_padding) {
    p.left_padding = static_cast<const int32_t*>(device_pointer(*in.left_padding));
    p.left_padding_stride = in.left_padding->strides(0);
  }
  set_input(in.lengths, p.lengths, p.lengths_stride);
}

}  // namespace tqext::cuda
