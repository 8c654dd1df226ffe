// The arguments of turboquant_attention by name, as every backend reads them: a primitive's inputs are a flat list.
#pragma once

#include <cstdint>
#include <vector>

#include "mlx/array.h"

namespace tqext {

namespace mx = mlx::core;

// Positions of the optional inputs behind q, key codes, key norms, value codes, value params; absent ones are left out.
enum OptionalInput : int {
  kMeans,          // [B, n_kv_heads, n_blocks, D] fp16; fp32 where q is in the rotated space already
  kBalance,        // [n_kv_heads, D] fp32
  kSigns,          // [B, n_kv_heads, n_coded, dim / 32] uint32
  kResidualNorms,  // [B, n_kv_heads, n_coded, 1] fp16
  kFirstKeys,      // [B, n_kv_heads, n_first, D], q's dtype
  kFirstValues,
  kTailKeys,  // [B, n_kv_heads, n_tail, D], q's dtype
  kTailValues,
  kMask,         // [B, n_q_heads, L, n_keys], bool or fp32; on the CPU and CUDA an axis may be 1 instead
  kSinks,        // [n_q_heads] fp32
  kLeftPadding,  // [B] int32
  kLengths,      // [B, 3] int32
  kIndices,      // [B, n_kv_heads or 1, L or 1, n_listed] int32 or uint32
  kNumOptionalInputs,
};
enum : int { kNumRequiredInputs = 5 };

struct AttentionInputs {
  const mx::array& q;
  const mx::array& key_codes;
  const mx::array& key_norms;
  const mx::array& value_codes;
  const mx::array& value_params;
  // Null: absent.
  const mx::array* means = nullptr;
  const mx::array* balance = nullptr;
  const mx::array* signs = nullptr;
  const mx::array* residual_norms = nullptr;
  const mx::array* first_keys = nullptr;
  const mx::array* first_values = nullptr;
  const mx::array* tail_keys = nullptr;
  const mx::array* tail_values = nullptr;
  const mx::array* mask = nullptr;
  const mx::array* sinks = nullptr;
  const mx::array* left_padding = nullptr;
  const mx::array* lengths = nullptr;
  const mx::array* indices = nullptr;

  // present: bit i: optional input i is there.
  AttentionInputs(const std::vector<mx::array>& inputs, uint32_t present)
      : q(inputs[0]), key_codes(inputs[1]), key_norms(inputs[2]), value_codes(inputs[3]), value_params(inputs[4]) {
    const mx::array** const fields[kNumOptionalInputs] = {&means,        &balance,   &signs,       &residual_norms, &first_keys,
                                                          &first_values, &tail_keys, &tail_values, &mask,           &sinks,
                                                          &left_padding, &lengths,   &indices};
    size_t next = kNumRequiredInputs;
    for (int which = 0; which < kNumOptionalInputs; which++) {
      if (present >> which & 1) *fields[which] = &inputs[next++];
    }
  }

  int batch() const { return q.shape(0); }
  int n_q_heads() const { return q.shape(1); }
  int n_queries() const { return q.shape(2); }
  int n_kv_heads() const { return key_codes.shape(1); }
  int n_repeats() const { return n_q_heads() / n_kv_heads(); }
  int n_first() const { return first_keys ? first_keys->shape(2) : 0; }
  int n_coded() const { return key_codes.shape(2); }
  int n_tail() const { return tail_keys ? tail_keys->shape(2) : 0; }
  // Each query has a list of its own.
  bool lists_per_query() const { return indices && indices->shape(2) > 1; }
};

}  // namespace tqext
