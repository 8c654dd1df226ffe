// What the attention kernels share: function constants, which tokens a row attends to, queries, tables of levels, 8x8 matrices.
#pragma once

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "format.h"
#include "params.h"
#include "rotate_row.h"
#include "softmax.h"

using namespace metal;

constant bool has_hadamard [[function_constant(kConstHadamard)]];
constant int means_kind [[function_constant(kConstMeans)]];
constant bool has_balance [[function_constant(kConstBalance)]];
constant bool has_residual [[function_constant(kConstResidual)]];
constant int mask_kind [[function_constant(kConstMask)]];
constant bool has_sinks [[function_constant(kConstSinks)]];
constant bool has_left_padding [[function_constant(kConstLeftPadding)]];
constant bool has_lengths [[function_constant(kConstLengths)]];
constant bool is_causal [[function_constant(kConstCausal)]];
constant bool has_indices [[function_constant(kConstIndices)]];
constant bool is_direct [[function_constant(kConstDirect)]];

constexpr int power_of_two(int n) {
  return n <= 1 ? 1 : n <= 2 ? 2 : n <= 4 ? 4 : n <= 8 ? 8 : n <= 16 ? 16 : n <= 32 ? 32 : 64;
}
constexpr int largest(int a, int b) { return a > b ? a : b; }

// --- which tokens a row attends to -------------------------------------------------------------------------------------

struct Bounds {
  int first_begin, first_end, coded_begin, coded_end, tail_begin, tail_end, tail_own;
};

// tail_own: from here on the tail holds the queries' own tokens, which are always stored.
inline Bounds bounds_of(constant AttentionParams& p, const device int* left_padding, const device int* lengths, int batch) {
  Bounds b;
  const int pad = has_left_padding ? left_padding[batch] : 0;
  b.first_begin = max(0, pad);
  b.coded_begin = max(0, pad - p.n_first);
  b.tail_begin = max(0, pad - p.n_first - p.n_coded);
  b.first_end = has_lengths ? min(p.n_first, lengths[3 * batch]) : p.n_first;
  b.coded_end = has_lengths ? min(p.n_coded, lengths[3 * batch + 1]) : p.n_coded;
  b.tail_end = has_lengths ? min(p.n_tail, lengths[3 * batch + 2]) : p.n_tail;
  b.tail_own = is_causal ? p.n_tail - p.n_queries : p.n_tail;
  return b;
}

// Coded tokens before this are attended by a query.
inline int coded_limit(constant AttentionParams& p, int coded_end, int query) {
  return is_causal ? min(coded_end, p.n_coded + p.n_tail - p.n_queries + query + 1) : coded_end;
}

// Added to a score, base 2; -inf is "not attended".
inline float mask_bias(const device uchar* mask, long at) {
  if (mask_kind == kMaskBool) return mask[at] ? 0.0f : -INFINITY;
  return reinterpret_cast<const device float*>(mask)[at] * kLog2e;
}

inline long mask_row(constant AttentionParams& p, int batch, int kv_head, int row) {
  const int n_repeats = p.n_rows / p.n_queries;
  return batch * p.mask.batch + (kv_head * n_repeats + row / p.n_queries) * p.mask.head + (row % p.n_queries) * p.mask.token;
}

// --- queries and means ------------------------------------------------------------------------------------------------

// One query row as the model has it, padded with zeros.
template <typename T, int D>
inline void load_query(constant AttentionParams& p, const device T* q, int batch, int kv_head, int row, thread float* x,
                       uint lane) {
  const int n_repeats = p.n_rows / p.n_queries, head = kv_head * n_repeats + row / p.n_queries;
  const device T* from = q + batch * p.q.batch + head * p.q.head + (row % p.n_queries) * p.q.token;
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    x[i] = d < p.head_dim ? float(from[d * p.q.last]) : 0.0f;
  }
}

// The query for coded keys: less the balance, rotated, in units of base-2 scores per codebook level. residual gets the query
// of the residual signs.
template <int D>
inline void prepare_query(constant AttentionParams& p, const device float* balance, int kv_head, thread float* x,
                          thread float* residual, threadgroup float* scratch, uint lane) {
  for (int i = 0; has_balance && i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    if (d < p.head_dim) x[i] /= balance[kv_head * p.balance.head + d * p.balance.last];
  }
  if (has_hadamard) rotate_row<D>(x, TQ_ROTATION_SEED, p.key_rotation_scale, scratch, lane);
  if (has_residual) {
    for (int i = 0; i < D / 32; i++) residual[i] = x[i];
    rotate_row<D>(residual, TQ_RESIDUAL_SEED, p.key_rotation_scale, scratch, lane);
    for (int i = 0; i < D / 32; i++) residual[i] *= p.residual_scale;
  }
  const float scale = p.score_scale / float(kCodebookTop);
  for (int i = 0; i < D / 32; i++) x[i] *= scale;
}

inline float mean_at(const device uchar* means, long at) {
  if (means_kind == kMeansFloat) return reinterpret_cast<const device float*>(means)[at];
  return float(reinterpret_cast<const device half*>(means)[at]);
}

// --- codes ------------------------------------------------------------------------------------------------------------

// Levels of the two codes in byte b of a word of level codes.
template <int BITS>
inline float2 level_pair(constant int8_t* levels, uint b) {
  constexpr uint mask = (1u << BITS) - 1u;
  return float2(float(levels[b & mask]), float(levels[(b >> 4) & mask]));
}

// The 32 codes of a unit are four runs of eight; byte b of run i holds dimensions 8 i + 2 b and 8 i + 2 b + 1. c[word] is byte
// b of each word. Returns the byte offset of the pair in a table of 8-byte entries: no shift to the right.
template <int BITS>
inline uint pair_offset(thread const uint* c, int run) {
  if (BITS == 4 || run < (BITS == 3 ? 3 : 2)) return c[run < BITS ? run : 0] * 8u;
  if (BITS == 3) return (c[0] & 0x88u) + ((c[1] & 0x88u) << 1) + ((c[BITS == 3 ? 2 : 0] & 0x88u) << 2);
  return (c[run >= 2 ? run - 2 : 0] & 0xccu) << 1;
}

// --- kernels ----------------------------------------------------------------------------------------------------------

#define TQ_ATTENTION_ARGUMENTS                                                                                                \
  const device T *q [[buffer(kAttentionQueries)]], const device uchar *key_codes [[buffer(kAttentionKeyCodes)]],              \
      const device half *key_norms [[buffer(kAttentionKeyNorms)]],                                                            \
      const device uchar *value_codes [[buffer(kAttentionValueCodes)]],                                                       \
      const device uchar *value_params [[buffer(kAttentionValueParams)]],                                                     \
      const device uchar *means [[buffer(kAttentionMeans)]], const device float *balance [[buffer(kAttentionBalance)]],       \
      const device uchar *key_signs [[buffer(kAttentionKeySigns)]],                                                           \
      const device half *residual_norms [[buffer(kAttentionResidualNorms)]],                                                  \
      const device T *first_keys [[buffer(kAttentionFirstKeys)]],                                                             \
      const device T *first_values [[buffer(kAttentionFirstValues)]],                                                         \
      const device T *tail_keys [[buffer(kAttentionTailKeys)]], const device T *tail_values [[buffer(kAttentionTailValues)]], \
      const device uchar *mask [[buffer(kAttentionMask)]], const device float *sinks [[buffer(kAttentionSinks)]],             \
      const device int *left_padding [[buffer(kAttentionLeftPadding)]],                                                       \
      const device int *lengths [[buffer(kAttentionLengths)]], const device int *indices [[buffer(kAttentionIndices)]],       \
      device T *out [[buffer(kAttentionOut)]], device float *parts [[buffer(kAttentionParts)]],                               \
      device float *states [[buffer(kAttentionStates)]], constant AttentionParams &p [[buffer(kAttentionParams)]],            \
      uint3 tg [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]],                                    \
      uint sg [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]

// Moves the packed pointers to this KV head. Strides of codes, signs and parameters of value groups are in 4-byte words.
#define TQ_ATTENTION_HEAD                                                                           \
  const int batch = int(tg.y) / p.n_kv_heads, kv_head = int(tg.y) % p.n_kv_heads;                   \
  key_codes += 4 * (batch * p.key_codes.batch + kv_head * p.key_codes.head);                        \
  key_norms += batch * p.key_norms.batch + kv_head * p.key_norms.head;                              \
  value_codes += 4 * (batch * p.value_codes.batch + kv_head * p.value_codes.head);                  \
  value_params += (LLOYD ? 2 : 4) * (batch * p.value_params.batch + kv_head * p.value_params.head); \
  if (means_kind != kMeansNone) {                                                                   \
    means += (means_kind == kMeansHalf ? 2 : 4) * (batch * p.means.batch + kv_head * p.means.head); \
  }                                                                                                 \
  if (has_residual) {                                                                               \
    key_signs += 4 * (batch * p.key_signs.batch + kv_head * p.key_signs.head);                      \
    residual_norms += batch * p.residual_norms.batch + kv_head * p.residual_norms.head;             \
  }                                                                                                 \
  const Bounds bounds = bounds_of(p, left_padding, lengths, batch);

// The coded tokens of a threadgroup that are attended to: [begin, end), and the start of the block of the first one.
struct Range {
  int begin, end, block_begin;
};

inline Range coded_range(constant AttentionParams& p, Bounds b, int tg) {
  Range range;
  const int limit = min(p.n_coded, (tg + 1) * p.range_tokens);
  range.begin = clamp(b.coded_begin, min(limit, tg * p.range_tokens), limit);
  range.end = clamp(b.coded_end, range.begin, limit);
  range.block_begin = range.begin / kBlockTokens * kBlockTokens;
  return range;
}

// Exact tokens of a KV head: first ++ tail, token e.
inline bool is_stored(constant AttentionParams& p, Bounds b, int e) {
  const int t = e - p.n_first;
  return t < 0 ? e >= b.first_begin && e < b.first_end : t >= b.tail_begin && (t < b.tail_end || t >= b.tail_own);
}

// A tile of codes laid out as those of keys, on its way to threadgroup memory as levels. A thread takes one byte of each word
// of a unit: four pairs of dimensions.
template <int BITS, int UNITS, int TOKENS, int THREADS>
struct LevelTile {
  static constant constexpr int kParts = 4 * UNITS, kStep = THREADS / kParts;  // threads of a token, tokens at a time
  static constant constexpr int kEach = (TOKENS + kStep - 1) / kStep, kHeld = kEach * BITS;

  // Codes of tokens [begin, end) of the tile; zeros for others.
  static inline void load(const device uchar* codes, long token_bytes, int tile, int begin, int end, int tid,
                          thread uint* held) {
    const int first = tile + tid / kParts, part = tid % kParts;
    codes += first * token_bytes + 4 * BITS * (part / 4) + part % 4;
#pragma clang loop unroll(full)
    for (int k = 0; k < kEach; k++) {
      const int t = first + kStep * k;
      const bool has = tid < kStep * kParts && t < tile + TOKENS && t >= begin && t < end;
      for (int i = 0; i < BITS; i++) held[k * BITS + i] = has ? uint(codes[kStep * k * token_bytes + 4 * i]) : 0u;
    }
  }

  static inline void store(thread const uint* held, threadgroup half* tile, int line, threadgroup const uchar* lookup,
                           int tid) {
    const int first = tid / kParts, part = tid % kParts;
    threadgroup half* to = tile + first * line + 32 * (part / 4) + 2 * (part % 4);
#pragma clang loop unroll(full)
    for (int k = 0; k < kEach; k++) {
      if (tid >= kStep * kParts || first + kStep * k >= TOKENS) continue;
      for (int i = 0; i < 4; i++) {
        *reinterpret_cast<threadgroup half2*>(to + kStep * k * line + 8 * i) =
            *reinterpret_cast<threadgroup const half2*>(lookup + pair_offset<BITS>(held + k * BITS, i));
      }
    }
  }
};

// --- merging ----------------------------------------------------------------------------------------------------------

// Merges the partial results of one row on one simdgroup and writes it. parts[part][row][V] and states[part][row][2]; the
// first n_coded parts are in the rotated space. BALANCE: and times the balance of this KV head. out: value_dim numbers.
template <typename T, int V, bool BALANCE = false, typename P>
inline void combine_row(constant AttentionParams& p, P parts, P states, int n_parts, int n_coded, int n_rows, int row,
                        const device float* sinks, int head, device T* out, threadgroup float* scratch, uint lane,
                        const device float* balance = nullptr) {
  float row_max = -INFINITY;
  for (int s = int(lane); s < n_parts; s += 32) row_max = max(row_max, states[2 * (s * n_rows + row)]);
  row_max = simd_max(row_max);
  const float sink = has_sinks ? sinks[head] * kLog2e : -INFINITY;
  row_max = max(row_max, sink);
  float row_sum = sink == -INFINITY ? 0.0f : rescale(sink, row_max);
  float coded[V / 32], exact[V / 32];
  for (int i = 0; i < V / 32; i++) coded[i] = exact[i] = 0.0f;
  for (int s = 0; s < n_parts; s++) {
    const float factor = rescale(states[2 * (s * n_rows + row)], row_max);
    row_sum = fma(factor, states[2 * (s * n_rows + row) + 1], row_sum);
    for (int i = 0; i < V / 32; i++) {
      const float part = factor * parts[(s * n_rows + row) * V + 32 * i + int(lane)];
      if (s < n_coded) {
        coded[i] += part;
      } else {
        exact[i] += part;
      }
    }
  }
  if (has_hadamard) rotate_row_back<V>(coded, TQ_ROTATION_SEED, p.value_rotation_scale, scratch, lane);
  const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  for (int i = 0; i < V / 32; i++) {
    const int d = 32 * i + int(lane);
    if (d >= p.value_dim) continue;
    if (BALANCE && has_balance) coded[i] /= balance[d * p.balance.last];
    out[d] = T((coded[i] + exact[i]) * inverse);
  }
}

// --- 8x8 matrices -----------------------------------------------------------------------------------------------------

// A lane holds elements (row, column) and (row, column + 1).
inline void put(thread simdgroup_float8x8& a, float2 v) { reinterpret_cast<thread float2&>(a.thread_elements()) = v; }
inline float2 get(thread simdgroup_float8x8& a) { return reinterpret_cast<thread float2&>(a.thread_elements()); }

inline void tile_barrier(bool alone) {
  if (alone) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
