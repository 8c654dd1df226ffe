// Decode attention on packed keys and values (format.h): at most three kernels, each packed byte read once for all query
// rows of its KV head.
//
//   split    up to 4 rows (query heads x queries of one KV head), fp32 FMA; with one range it writes the result itself
//   matrix   up to 8 rows per simdgroup, 8x8 matrices, several row blocks on one staged tile
//   combine  merges the partial results of a row, rotates back, divides
//
// Bytes per token and KV head, D = 128, 3-bit keys, 2-bit values: 48 + 2 + 32 + 16 = 98, against 512 in fp16.
// Work per token, D = 128, 4 rows: 1024 FMA (scores and values), 665 integer and other fp32 operations, 28 shuffles, 672
// bytes of threadgroup memory: 13.2 core cycles by the published rates (tests/metal_sim/cost.py), against 11.5 (M4 Max) to
// 13.0 (M2 Pro) in which the memory delivers 98 bytes: both limits are near. 1 or 2 rows: the memory is the limit. 8 rows
// by matrices: 22 cycles, the multiplications are the limit. Not measured on a GPU.
//
// Where the operations went:
// - Codes are loaded as bytes: the load unit extracts them. A key byte is the index of its two levels in a table of 256
//   entries in threadgroup memory; the table repeats over the bits that belong to other codes, so nothing is masked.
//   A table beats arithmetic here: shifts and conversions take four cycles each, a look-up one instruction.
// - Value codes stay in place: x & (3 << 2s), read as half, is code * 2^(2s - 24), a subnormal; the power of two is paid
//   once, on the sum. The scale of a group goes into the softmax weight, its bias into one FMA per token and lane.
// - Sums over the lanes of a key are transposed: KL sums over KL lanes cost KL - 1 shuffles and leave one score per lane.
// - The running maximum is reduced only when a lane sees a larger score. No barrier of the threadgroup in the loop.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "format.h"
#include "params.h"
#include "rotate_row.h"

using namespace metal;

constant bool has_hadamard [[function_constant(kConstHadamard)]];
constant bool has_mean [[function_constant(kConstMean)]];
constant bool has_residual [[function_constant(kConstResidual)]];
constant int mask_kind [[function_constant(kConstMask)]];
constant bool has_sinks [[function_constant(kConstSinks)]];
constant bool has_left_padding [[function_constant(kConstLeftPadding)]];
constant bool has_lengths [[function_constant(kConstLengths)]];
constant bool is_causal [[function_constant(kConstCausal)]];
constant bool is_direct [[function_constant(kConstDirect)]];

constant constexpr int kSplitSimdgroups = 8;
constant constexpr float kLog2E = 1.44269504088896340736f;
constant constexpr float kSqrtHalfPi = 1.25331413731550025121f;

// Factor of a sum whose maximum was old_max; -inf - -inf would be NaN.
inline float rescale(float old_max, float new_max) { return old_max == new_max ? 1.0f : exp2(old_max - new_max); }

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
  return reinterpret_cast<const device float*>(mask)[at] * kLog2E;
}

inline long mask_row(constant AttentionParams& p, int batch, int kv_head, int row) {
  const int n_repeats = p.n_rows / p.n_queries;
  return batch * p.mask.batch + (kv_head * n_repeats + row / p.n_queries) * p.mask.head + (row % p.n_queries) * p.mask.token;
}

// --- queries ----------------------------------------------------------------------------------------------------------

// One query row, rotated, in units of base-2 scores per codebook level; returns what the key mean adds to its scores.
// residual gets the query of the residual signs.
template <typename T, int D>
inline float load_query(constant AttentionParams& p, const device T* q, const device float* mean, int batch, int kv_head,
                        int row, thread float* x, thread float* residual, threadgroup float* scratch, uint lane) {
  const int n_repeats = p.n_rows / p.n_queries, head = kv_head * n_repeats + row / p.n_queries;
  const device T* from = q + batch * p.q.batch + head * p.q.head + (row % p.n_queries) * p.q.token;
  const device float* center = mean + batch * p.mean.batch + kv_head * p.mean.head;
  float offset = 0.0f;
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    x[i] = d < p.head_dim ? float(from[d * p.q.last]) : 0.0f;
    if (has_mean && d < p.head_dim) offset = fma(x[i], center[d * p.mean.last], offset);
  }
  if (has_mean) offset = simd_sum(offset) * p.score_scale;
  if (has_hadamard) rotate_row<D>(x, TQ_ROTATION_SEED, scratch, lane);
  if (has_residual) {
    for (int i = 0; i < D / 32; i++) residual[i] = x[i];
    rotate_row<D>(residual, TQ_RESIDUAL_SEED, scratch, lane);
    const float scale = p.score_scale * kSqrtHalfPi / precise::sqrt(float(D));
    for (int i = 0; i < D / 32; i++) residual[i] *= scale;
  }
  const float scale = p.score_scale / float(kCodebookTop);
  for (int i = 0; i < D / 32; i++) x[i] *= scale;
  return offset;
}

// --- codes ------------------------------------------------------------------------------------------------------------

// Levels of the two codes in byte b of a key word.
template <int BITS>
inline float2 level_pair(constant AttentionParams& p, uint b) {
  constexpr uint mask = (1u << BITS) - 1u;
  return float2(float(p.codebook[b & mask]), float(p.codebook[(b >> 4) & mask]));
}

// The 32 codes of a unit are four runs of eight; byte b of run i holds dimensions 8 i + 2 b and 8 i + 2 b + 1. c[word] is byte
// b of each word. Returns the byte offset of the pair in a table of 8-byte entries: no shift to the right.
template <int BITS>
inline uint pair_offset(thread const uint* c, int run) {
  if (BITS == 4 || run < (BITS == 3 ? 3 : 2)) return c[run < BITS ? run : 0] * 8u;
  if (BITS == 3) return (c[0] & 0x88u) + ((c[1] & 0x88u) << 1) + ((c[BITS == 3 ? 2 : 0] & 0x88u) << 2);
  return (c[run >= 2 ? run - 2 : 0] & 0xccu) << 1;
}

// Code `slot` of sixteen bits as a half subnormal, code * 2^(BITS * (slot % per) - 24) with `per` codes below bit 10.
template <int BITS>
inline float subnormal_code(ushort x, int slot) {
  constexpr int per = 10 / BITS;
  const ushort y = slot < per ? x : ushort(x >> (BITS * per));
  return float(as_type<half>(ushort(y & ushort(((1 << BITS) - 1) << (BITS * (slot % per))))));
}
template <int BITS>
inline float subnormal_weight(int slot) {
  return exp2(24.0f - float(BITS * (slot % (10 / BITS))));
}

// --- exact tokens -----------------------------------------------------------------------------------------------------

// Attends rows [row0, row0 + n) (at most 8) to exact tokens [begin, end) of first ++ tail, at most kExactTokens, with all
// simdgroups of the threadgroup. out[row * V], state[row * 2] for the n rows, in the space of the model.
template <typename T, int V, typename P>
inline void attend_exact(constant AttentionParams& p, Bounds b, const device T* q, const device T* first_keys,
                         const device T* first_values, const device T* tail_keys, const device T* tail_values,
                         const device uchar* mask, int batch, int kv_head, int row0, int n, int begin, int end,
                         threadgroup float* scores, P out, P state, uint tid, uint sg, uint lane, uint n_sg) {
  const int n_repeats = p.n_rows / p.n_queries;
  for (int e = begin + int(sg); e < end; e += int(n_sg)) {
    const bool is_tail = e >= p.n_first;
    const int t = is_tail ? e - p.n_first : e, column = is_tail ? e + p.n_coded : e;
    const bool stored =
        is_tail ? t >= b.tail_begin && (t < b.tail_end || t >= b.tail_own) : t >= b.first_begin && t < b.first_end;
    const long key = is_tail ? batch * p.tail_keys.batch + kv_head * p.tail_keys.head + t * p.tail_keys.token
                             : batch * p.first_keys.batch + kv_head * p.first_keys.head + t * p.first_keys.token;
    const long step = is_tail ? p.tail_keys.last : p.first_keys.last;
    const device T* from = is_tail ? tail_keys : first_keys;
    for (int r = 0; r < n; r++) {
      const int row = row0 + r, head = kv_head * n_repeats + row / p.n_queries, query = row % p.n_queries;
      const bool seen = stored && (!is_causal || column <= p.n_first + p.n_coded + p.n_tail - p.n_queries + query);
      float score = 0.0f;
      if (seen) {
        const device T* x = q + batch * p.q.batch + head * p.q.head + query * p.q.token;
        for (int d = int(lane); d < p.head_dim; d += 32) {
          score = fma(float(x[d * p.q.last]), float(from[key + d * step]), score);
        }
      }
      score = simd_sum(score) * p.score_scale;
      if (mask_kind != kMaskNone && seen) {
        const float bias = mask_bias(mask, mask_row(p, batch, kv_head, row) + column * p.mask.last);
        score = bias == -INFINITY ? -INFINITY : score + bias;
      }
      if (lane == 0) scores[r * kExactTokens + e - begin] = seen ? score : -INFINITY;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int r = int(sg); r < n; r += int(n_sg)) {
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int e = int(lane); e < end - begin; e += 32) row_max = max(row_max, scores[r * kExactTokens + e]);
    row_max = simd_max(row_max);
    for (int e = int(lane); e < end - begin; e += 32) {
      const float score = scores[r * kExactTokens + e];
      const float weight = score == -INFINITY ? 0.0f : exp2(score - row_max);
      scores[r * kExactTokens + e] = weight;
      row_sum += weight;
    }
    row_sum = simd_sum(row_sum);
    if (lane == 0) {
      state[2 * r] = row_max;
      state[2 * r + 1] = row_sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = int(tid); d < V; d += 32 * int(n_sg)) {
    float acc[8];
    for (int r = 0; r < 8; r++) acc[r] = 0.0f;
    for (int e = begin; e < end && d < p.value_dim; e++) {
      const bool is_tail = e >= p.n_first;
      const int t = is_tail ? e - p.n_first : e;
      const bool stored =
          is_tail ? t >= b.tail_begin && (t < b.tail_end || t >= b.tail_own) : t >= b.first_begin && t < b.first_end;
      if (!stored) continue;
      const float value = is_tail ? float(tail_values[batch * p.tail_values.batch + kv_head * p.tail_values.head +
                                                      t * p.tail_values.token + d * p.tail_values.last])
                                  : float(first_values[batch * p.first_values.batch + kv_head * p.first_values.head +
                                                       t * p.first_values.token + d * p.first_values.last]);
      for (int r = 0; r < 8; r++) {
        const float weight = r < n ? scores[r * kExactTokens + e - begin] : 0.0f;
        if (weight != 0.0f) acc[r] = fma(weight, value, acc[r]);  // a token that is not attended may hold anything
      }
    }
    for (int r = 0; r < 8; r++) {
      if (r < n) out[r * V + d] = acc[r];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// --- merging ----------------------------------------------------------------------------------------------------------

// Merges the partial results of one row on one simdgroup and writes it. parts[part][row][V] and states[part][row][2]; the
// first n_coded parts are in the rotated space. out: value_dim numbers.
template <typename T, int V, typename P>
inline void combine_row(constant AttentionParams& p, P parts, P states, int n_parts, int n_coded, int n_rows, int row,
                        const device float* sinks, int head, device T* out, threadgroup float* scratch, uint lane) {
  float row_max = -INFINITY;
  for (int s = int(lane); s < n_parts; s += 32) row_max = max(row_max, states[2 * (s * n_rows + row)]);
  row_max = simd_max(row_max);
  const float sink = has_sinks ? sinks[head] * kLog2E : -INFINITY;
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
  if (has_hadamard) rotate_row_back<V>(coded, TQ_ROTATION_SEED, scratch, lane);
  const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  for (int i = 0; i < V / 32; i++) {
    const int d = 32 * i + int(lane);
    if (d < p.value_dim) out[d] = T((coded[i] + exact[i]) * inverse);
  }
}

#define TQ_ATTENTION_ARGUMENTS                                                                                                \
  const device T *q [[buffer(kAttentionQueries)]], const device uchar *key_codes [[buffer(kAttentionKeyCodes)]],              \
      const device half *key_norms [[buffer(kAttentionKeyNorms)]],                                                            \
      const device uchar *value_codes [[buffer(kAttentionValueCodes)]],                                                       \
      const device uint *value_params [[buffer(kAttentionValueParams)]], const device float *mean [[buffer(kAttentionMean)]], \
      const device uchar *key_signs [[buffer(kAttentionKeySigns)]],                                                           \
      const device half *residual_norms [[buffer(kAttentionResidualNorms)]],                                                  \
      const device T *first_keys [[buffer(kAttentionFirstKeys)]],                                                             \
      const device T *first_values [[buffer(kAttentionFirstValues)]],                                                         \
      const device T *tail_keys [[buffer(kAttentionTailKeys)]], const device T *tail_values [[buffer(kAttentionTailValues)]], \
      const device uchar *mask [[buffer(kAttentionMask)]], const device float *sinks [[buffer(kAttentionSinks)]],             \
      const device int *left_padding [[buffer(kAttentionLeftPadding)]],                                                       \
      const device int *lengths [[buffer(kAttentionLengths)]], device T *out [[buffer(kAttentionOut)]],                       \
      device float *parts [[buffer(kAttentionParts)]], device float *states [[buffer(kAttentionStates)]],                     \
      constant AttentionParams &p [[buffer(kAttentionParams)]], uint3 tg [[threadgroup_position_in_grid]],                    \
      uint tid [[thread_index_in_threadgroup]], uint sg [[simdgroup_index_in_threadgroup]],                                   \
      uint lane [[thread_index_in_simdgroup]]

// Moves the packed pointers to this KV head. Strides of codes, signs and value parameters are in 4-byte words.
#define TQ_ATTENTION_HEAD                                                               \
  const int batch = int(tg.y) / p.n_kv_heads, kv_head = int(tg.y) % p.n_kv_heads;       \
  key_codes += 4 * (batch * p.key_codes.batch + kv_head * p.key_codes.head);            \
  key_norms += batch * p.key_norms.batch + kv_head * p.key_norms.head;                  \
  value_codes += 4 * (batch * p.value_codes.batch + kv_head * p.value_codes.head);      \
  value_params += batch * p.value_params.batch + kv_head * p.value_params.head;         \
  if (has_residual) {                                                                   \
    key_signs += 4 * (batch * p.key_signs.batch + kv_head * p.key_signs.head);          \
    residual_norms += batch * p.residual_norms.batch + kv_head * p.residual_norms.head; \
  }                                                                                     \
  const Bounds bounds = bounds_of(p, left_padding, lengths, batch);

// --- split: up to 4 rows ----------------------------------------------------------------------------------------------

// Eight simdgroups, each with its own tiles of 32 tokens. Keys: a lane holds 32 / KH dimensions of one unit of the keys it
// sees, KL lanes a key. Values: a lane holds one word, or half of it (VH = 2), of the values it sees, VL lanes a value.
// Units and words of dimensions that are no power of two are padded with idle lanes.
template <typename T, int K, int V, int KB, int VB, int R>
[[kernel, max_total_threads_per_threadgroup(256)]] void turboquant_attention_split(TQ_ATTENTION_ARGUMENTS,
                                                                                   threadgroup float* residual_queries
                                                                                   [[threadgroup(0)]]) {
  constexpr int NSG = kSplitSimdgroups;
  constexpr int NU = K / 32, NUP = power_of_two(NU);  // units of a key
  constexpr int KH = 2 * NUP >= R ? 2 : 4;            // lanes per unit
  constexpr int KL = KH * NUP, KT = 32 / KL;          // lanes per key, keys per step
  constexpr int SB = KL / R;                          // steps per reduction
  constexpr int NB = 4 / KH, NN = 8 / KH;             // bytes and codes of each word per lane
  constexpr int NG = V / 32;                          // value groups
  constexpr int VW = V * VB / 32;                     // words of a value
  constexpr int VH = VB == 2 && R > 2 ? 2 : 1;        // lanes per word
  constexpr int VL = power_of_two(VW) * VH, VT = 32 / VL;
  constexpr int NS = 16 / VB;  // codes in sixteen bits
  constexpr int NH = 2 / VH;   // sixteen-bit halves per lane
  constexpr int M = largest(K, V);
  static_assert(KL <= 32 && VL <= 32 && KL >= R, "a key and a value fit a simdgroup");
  static_assert(R * NG <= VL, "every sum of group biases has a lane");

  threadgroup uint table[512];          // half2 per byte of key codes, twice: odd and even lanes use different banks
  threadgroup float merged[2 * R * M];  // rotated queries; at the end the coded result, then the exact one
  threadgroup float weights_all[NSG * 32 * R];
  threadgroup uint group_params[NSG * 32 * NG];  // (scale, bias) of the tile's tokens
  threadgroup float norms_all[NSG * 32], residual_norms_all[NSG * 32];
  threadgroup float maxima[NSG * R], sums[NSG * R], bias_sums[NSG * R * NG], offsets[R], states_all[4 * R];
  TQ_ATTENTION_HEAD
  const int n_rows = p.n_rows;
  const int n_exact = p.n_first + p.n_tail;

  if (!is_direct && int(tg.x) >= p.n_ranges) {
    const int range = int(tg.x) - p.n_ranges, begin = range * kExactTokens;
    const long part = (long(tg.y) * p.n_parts + int(tg.x)) * n_rows;
    attend_exact<T, V>(p, bounds, q, first_keys, first_values, tail_keys, tail_values, mask, batch, kv_head, 0, n_rows, begin,
                       min(n_exact, begin + kExactTokens), weights_all, parts + part * V, states + part * 2, tid, sg, lane,
                       NSG);
    return;
  }

  for (uint b = tid; b < 256; b += NSG * 32) {
    const uint entry = as_type<uint>(half2(level_pair<KB>(p, b)));
    table[2 * b] = entry;
    table[2 * b + 1] = entry;
  }
  threadgroup float* queries = merged;
  for (int r = int(sg); r < R; r += NSG) {
    float x[NU], residual[NU], offset = 0.0f;
    for (int i = 0; i < NU; i++) x[i] = residual[i] = 0.0f;
    if (r < n_rows) offset = load_query<T, K>(p, q, mean, batch, kv_head, r, x, residual, queries + r * K, lane);
    for (int i = 0; i < NU; i++) {
      queries[r * K + 32 * i + int(lane)] = x[i];
      if (has_residual) residual_queries[r * K + 32 * i + int(lane)] = residual[i];
    }
    if (lane == 0) offsets[r] = offset;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int key_lane = int(lane) % KL, unit = key_lane / KH, part_of_unit = key_lane % KH;
  const int value_lane = int(lane) % VL, word = value_lane / VH, half_of_word = value_lane % VH;
  const bool has_unit = unit < NU, has_word = word < VW;
  const int my_row = key_lane % R;
  const int limit = coded_limit(p, bounds.coded_end, my_row % p.n_queries);
  const float my_offset = offsets[my_row];
  const int bias_row = value_lane % R, bias_group = min(value_lane / R, NG - 1);
  const long my_mask = mask_kind != kMaskNone && my_row < n_rows ? mask_row(p, batch, kv_head, my_row) : 0;
  // Tokens that a row skips inside the range may hold anything: their weight 0 must not meet a NaN.
  const bool skips = mask_kind != kMaskNone || is_causal;

  float query[4 * NN][R], acc[NH * NS][R], bias_acc = 0.0f;
#pragma clang loop unroll(full)
  for (int i = 0; i < 4 * NN; i++) {
    for (int r = 0; r < R; r++) {
      query[i][r] = has_unit ? queries[r * K + 32 * unit + 8 * (i / NN) + NN * part_of_unit + i % NN] : 0.0f;
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < NH * NS; i++) {
    for (int r = 0; r < R; r++) acc[i][r] = 0.0f;
  }
  float row_max = -INFINITY, row_sum = 0.0f;  // of my_row; the sum is this lane's share
  threadgroup const uchar* lookup = reinterpret_cast<threadgroup const uchar*>(table) + 4 * (lane & 1u);
  threadgroup float* weights = weights_all + sg * (32 * R);
  threadgroup uint* tile_params = group_params + sg * (32 * NG);
  threadgroup float* norms = norms_all + sg * 32;
  threadgroup float* tile_residual_norms = residual_norms_all + sg * 32;

  const int t0 = max(bounds.coded_begin, int(tg.x) * p.range_tokens);
  const int t1 = min(bounds.coded_end, (int(tg.x) + 1) * p.range_tokens);
  for (int base = t0 + 32 * int(sg); base < t1; base += 32 * NSG) {
    const int n = min(32, t1 - base);
    const bool mine = int(lane) < n;
    const device uchar* codes = key_codes + 4 * (long(base) * p.key_codes.token);
    norms[lane] = mine ? float(key_norms[(base + int(lane)) * p.key_norms.token]) : 0.0f;
    if (has_residual) {
      tile_residual_norms[lane] = mine ? float(residual_norms[(base + int(lane)) * p.residual_norms.token]) : 0.0f;
    }
    for (int g = 0; g < NG; g++) {
      tile_params[int(lane) * NG + g] = mine ? value_params[(base + int(lane)) * p.value_params.token + g] : 0u;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    float score[R], tile_max = -INFINITY;
#pragma clang loop unroll(full)
    for (int b = 0; b < R; b++) {
      float sum[KL];
#pragma clang loop unroll(full)
      for (int s = 0; s < SB; s++) {
        const int t = (b * SB + s) * KT + int(lane) / KL;
        const bool load = t < n && has_unit;
        uint c[NB][KB];
        for (int i = 0; i < KB; i++) {
          const device uchar* k = codes + 4 * (t * int(p.key_codes.token) + KB * unit + i) + NB * part_of_unit;
          if (NB == 2) {
            const uchar2 x = load ? *reinterpret_cast<const device uchar2*>(k) : uchar2(0);
            c[0][i] = x[0];
            c[NB - 1][i] = x[1];
          } else {
            c[0][i] = load ? *k : uchar(0);
          }
        }
        for (int r = 0; r < R; r++) sum[s * R + r] = 0.0f;
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) {
          for (int j = 0; j < NB; j++) {
            const half2 x = *reinterpret_cast<threadgroup const half2*>(lookup + pair_offset<KB>(c[j], i));
            for (int r = 0; r < R; r++) {
              sum[s * R + r] = fma(float(x.x), query[NN * i + 2 * j][r], sum[s * R + r]);
              sum[s * R + r] = fma(float(x.y), query[NN * i + 2 * j + 1][r], sum[s * R + r]);
            }
          }
        }
        if (has_residual) {
          constexpr int n_bits = 32 / KH;
          const device uchar* from = key_signs + 4 * ((base + t) * p.key_signs.token + unit) + n_bits / 8 * part_of_unit;
          uint bits = 0u;
          if (load) bits = KH == 2 ? uint(*reinterpret_cast<const device ushort*>(from)) : uint(*from);
          for (int r = 0; r < R; r++) {
            float residual = 0.0f;
            for (int j = 0; j < n_bits && has_unit; j++) {
              const float x = residual_queries[r * K + 32 * unit + n_bits * part_of_unit + j];
              residual += (bits >> uint(j) & 1u) ? x : -x;
            }
            sum[s * R + r] = fma(sum[s * R + r], norms[t], residual * tile_residual_norms[t]);
          }
        }
      }
#pragma clang loop unroll(full)
      for (ushort h = KL / 2; h >= 1; h /= 2) {
        for (int i = 0; i < h; i++) {
          const bool up = key_lane & h;
          sum[i] = (up ? sum[i + h] : sum[i]) + simd_shuffle_xor(up ? sum[i] : sum[i + h], h);
        }
      }
      const int t = (b * SB + key_lane / R) * KT + int(lane) / KL;
      float x = has_residual ? sum[0] + my_offset : fma(sum[0], norms[t], my_offset);
      bool live = t < n && base + t < limit;
      if (mask_kind != kMaskNone && live && my_row < n_rows) {
        const float bias = mask_bias(mask, my_mask + (p.n_first + base + t) * p.mask.last);
        live = bias != -INFINITY;
        x += bias;
      }
      score[b] = live ? x : -INFINITY;
      tile_max = max(tile_max, score[b]);
    }
    if (simd_any(tile_max > row_max)) {
      for (ushort h = R; h < 32; h *= 2) tile_max = max(tile_max, simd_shuffle_xor(tile_max, h));
      const float new_max = max(row_max, tile_max), factor = rescale(row_max, new_max);
      row_max = new_max;
      row_sum *= factor;
#pragma clang loop unroll(full)
      for (int r = 0; r < R; r++) {
        const float row_factor = simd_shuffle(factor, ushort(r));
        for (int i = 0; i < NH * NS; i++) acc[i][r] *= row_factor;
      }
      bias_acc *= simd_shuffle(factor, ushort(bias_row));
    }
#pragma clang loop unroll(full)
    for (int b = 0; b < R; b++) {
      const float weight = score[b] == -INFINITY ? 0.0f : exp2(score[b] - row_max);
      row_sum += weight;
      weights[((b * SB + key_lane / R) * KT + int(lane) / KL) * R + my_row] = weight;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    const device uchar* values = value_codes + 4 * (long(base) * p.value_codes.token);
    for (int s = 0; s < VL; s++) {
      const int t = s * VT + int(lane) / VL;
      ushort x[NH];
      for (int i = 0; i < NH; i++) {
        const device ushort* v = reinterpret_cast<const device ushort*>(values + 4 * (t * int(p.value_codes.token) + word));
        x[i] = t < n && has_word ? v[half_of_word + i] : ushort(0);
      }
      const float bias = float(as_type<half2>(tile_params[t * NG + bias_group]).y), bias_weight = weights[t * R + bias_row];
      if (!skips || bias_weight != 0.0f) bias_acc = fma(bias_weight, bias, bias_acc);
      if (32 % VW == 0) {  // each slot lies in one group
        constexpr int LG = largest(1, NG / VH);
        const int first_group = VW * NH * NS * half_of_word / 32;
        float scaled[LG][R];
        for (int g = 0; g < LG; g++) {
          const float scale = float(as_type<half2>(tile_params[t * NG + first_group + g]).x);
          for (int r = 0; r < R; r++) {
            const float weight = weights[t * R + r];
            scaled[g][r] = skips && weight == 0.0f ? 0.0f : weight * scale;
          }
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < NH * NS; i++) {
          const float code = subnormal_code<VB>(x[i / NS], i % NS);
          for (int r = 0; r < R; r++) acc[i][r] = fma(scaled[VW * i / 32][r], code, acc[i][r]);
        }
      } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < NH * NS; i++) {
          const float code = subnormal_code<VB>(x[i / NS], i % NS);
          const int group = min((VW * (NH * NS * half_of_word + i) + word) / 32, NG - 1);
          const float scale = float(as_type<half2>(tile_params[t * NG + group]).x);
          for (int r = 0; r < R; r++) {
            const float weight = weights[t * R + r];
            if (!skips || weight != 0.0f) acc[i][r] = fma(weight * scale, code, acc[i][r]);
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  for (ushort h = R; h < 32; h *= 2) row_sum += simd_shuffle_xor(row_sum, h);
  if (lane < uint(R)) {
    maxima[sg * R + lane] = row_max;
    sums[sg * R + lane] = row_sum;
  }
  for (ushort h = VL; h < 32; h *= 2) {
    bias_acc += simd_shuffle_xor(bias_acc, h);
    for (int r = 0; r < R; r++) {
      for (int i = 0; i < NH * NS; i++) acc[i][r] += simd_shuffle_xor(acc[i][r], h);
    }
  }
  if (int(lane) < R * NG) bias_sums[(int(sg) * R + bias_row) * NG + bias_group] = bias_acc;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < NSG; s++) {
    if (s == int(sg) && int(lane) < VL && has_word) {
      for (int r = 0; r < R; r++) {
        float all_max = -INFINITY;
        for (int i = 0; i < NSG; i++) all_max = max(all_max, maxima[i * R + r]);
        const float factor = rescale(maxima[s * R + r], all_max);
#pragma clang loop unroll(full)
        for (int i = 0; i < NH * NS; i++) {
          const int d = VW * (NH * NS * half_of_word + i) + word;
          const float y = factor * fma(acc[i][r], subnormal_weight<VB>(i % NS), bias_sums[(s * R + r) * NG + d / 32]);
          merged[r * V + d] = s == 0 ? y : merged[r * V + d] + y;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (int(tid) < R) {
    float all_max = -INFINITY, all_sum = 0.0f;
    for (int i = 0; i < NSG; i++) all_max = max(all_max, maxima[i * R + int(tid)]);
    for (int i = 0; i < NSG; i++) all_sum += sums[i * R + int(tid)] * rescale(maxima[i * R + int(tid)], all_max);
    states_all[2 * tid] = all_max;
    states_all[2 * tid + 1] = all_sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!is_direct) {
    const long part = (long(tg.y) * p.n_parts + int(tg.x)) * n_rows;
    for (int i = int(tid); i < n_rows * V; i += NSG * 32) parts[part * V + i] = merged[i];
    if (int(tid) < 2 * n_rows) states[part * 2 + int(tid)] = states_all[tid];
    return;
  }
  if (n_exact > 0) {
    attend_exact<T, V>(p, bounds, q, first_keys, first_values, tail_keys, tail_values, mask, batch, kv_head, 0, n_rows, 0,
                       n_exact, weights_all, merged + R * V, states_all + 2 * R, tid, sg, lane, NSG);
  }
  for (int r = int(sg); r < n_rows; r += NSG) {
    const int n_repeats = n_rows / p.n_queries, head = kv_head * n_repeats + r / p.n_queries;
    device T* to = out + (long(tg.y) * n_rows + r) * p.value_dim;
    combine_row<T, V>(p, merged, states_all, n_exact > 0 ? 2 : 1, 1, R, r, sinks, head, to, merged + r * V, lane);
  }
}

// --- matrix: up to 8 rows per simdgroup -------------------------------------------------------------------------------

// Scores^T [8 tokens x 8 rows] = K Q^T and Out^T [8 dimensions x 8 rows] += V^T P^T, decoded straight into the registers of
// the 8x8 operands: no decoded tile, no reduction per score. A lane holds elements (row, column) and (row, column + 1).
// row_blocks simdgroups share the staged packed bytes of a tile of 32 tokens; a threadgroup holds several such groups, each
// with its own tiles and its own partial result.
inline void put(thread simdgroup_float8x8& a, float2 v) { reinterpret_cast<thread float2&>(a.thread_elements()) = v; }
inline float2 get(thread simdgroup_float8x8& a) { return reinterpret_cast<thread float2&>(a.thread_elements()); }

inline float2 rescale_both(float2 old_max, float2 new_max) {
  return float2(rescale(old_max.x, new_max.x), rescale(old_max.y, new_max.y));
}

// Sum or maximum over the rows of an operand: lane bits 1, 2 and 4.
inline float2 row_sums(float2 x) {
  for (ushort h = 2; h < 32; h = h == 4 ? 16 : h * 2) x = x + float2(simd_shuffle_xor(x.x, h), simd_shuffle_xor(x.y, h));
  return x;
}
inline float2 row_maxima(float2 x) {
  for (ushort h = 2; h < 32; h = h == 4 ? 16 : h * 2) x = max(x, float2(simd_shuffle_xor(x.x, h), simd_shuffle_xor(x.y, h)));
  return x;
}

inline void tile_barrier(bool alone) {
  if (alone) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Code of dimension 8 step + row of a value in threadgroup memory, times weight<...>(step).
template <int V, int BITS>
struct ValueCodes {
  static constant constexpr int VW = V * BITS / 32, NS = 16 / BITS;
  static constant constexpr bool kWide = VW % 8 == 0, kNarrow = 8 % VW == 0;

  static inline float code(threadgroup const uint* words, int step, int row) {
    if (kWide) {
      const int slot = 8 * step / VW;
      threadgroup const ushort* x = reinterpret_cast<threadgroup const ushort*>(words + 8 * step % VW + row);
      return subnormal_code<BITS>(x[slot / NS], slot % NS);
    }
    if (kNarrow) {
      const int slot = step * (8 / VW);
      const uint x = words[row % VW] >> uint(BITS * (row / VW));
      return subnormal_code<BITS>(ushort(slot < NS ? x : x >> 16), slot % NS);
    }
    const int d = 8 * step + row;
    return float(words[d % VW] >> uint(BITS * (d / VW)) & ((1u << BITS) - 1u));
  }

  static inline float weight(int step) {
    if (kWide) return subnormal_weight<BITS>(8 * step / VW % NS);
    if (kNarrow) return subnormal_weight<BITS>(step * (8 / VW) % NS);
    return 1.0f;
  }
};

template <typename T, int K, int V, int KB, int VB>
[[kernel, max_total_threads_per_threadgroup(256)]] void turboquant_attention_matrix(
    TQ_ATTENTION_ARGUMENTS, uint n_sg [[simdgroups_per_threadgroup]], threadgroup float* queries_all [[threadgroup(0)]],
    threadgroup uint* tiles [[threadgroup(1)]]) {
  constexpr int NU = K / 32, NG = V / 32, KW = K * KB / 32, VW = V * VB / 32;
  threadgroup float2 table[256];  // level pair per byte of key codes
  threadgroup float offsets[64];  // row_blocks is at most 8
  TQ_ATTENTION_HEAD
  const int n_rows = p.n_rows, n_blocks = p.row_blocks, n_groups = int(n_sg) / n_blocks;
  const int block = int(sg) % n_blocks, group = int(sg) / n_blocks;
  const int first_row = 8 * n_blocks * int(tg.z);  // of this threadgroup
  const int n_exact = p.n_first + p.n_tail;

  if (int(tg.x) * n_groups >= p.n_ranges) {
    const int range = int(tg.x) - p.n_ranges / n_groups, begin = range * kExactTokens;
    const long part = (long(tg.y) * p.n_parts + p.n_ranges + range) * n_rows;
    for (int row = first_row; row < min(n_rows, first_row + 8 * n_blocks); row += 8) {
      attend_exact<T, V>(p, bounds, q, first_keys, first_values, tail_keys, tail_values, mask, batch, kv_head, row,
                         min(8, n_rows - row), begin, min(n_exact, begin + kExactTokens),
                         reinterpret_cast<threadgroup float*>(tiles), parts + (part + row) * V, states + (part + row) * 2, tid,
                         sg, lane, n_sg);
    }
    return;
  }

  for (uint b = tid; b < 256; b += 32 * n_sg) table[b] = level_pair<KB>(p, b);
  // Row r, dimension d at [(r / 8 * K + d) * 8 + r % 8]; the residual queries follow.
  threadgroup float* residual_queries = queries_all + 8 * n_blocks * K;
  threadgroup float* scratch = reinterpret_cast<threadgroup float*>(tiles) + sg * K;
  for (int r = int(sg); r < 8 * n_blocks; r += int(n_sg)) {
    float x[NU], residual[NU], offset = 0.0f;
    for (int i = 0; i < NU; i++) x[i] = residual[i] = 0.0f;
    if (first_row + r < n_rows)
      offset = load_query<T, K>(p, q, mean, batch, kv_head, first_row + r, x, residual, scratch, lane);
    for (int i = 0; i < NU; i++) {
      const int at = (r / 8 * K + 32 * i + int(lane)) * 8 + r % 8;
      queries_all[at] = x[i];
      if (has_residual) residual_queries[at] = residual[i];
    }
    if (lane == 0) offsets[r] = offset;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int row = int(lane / 4 & 4u) + int(lane / 2 & 3u), column = int(lane / 4 & 2u) * 2 + int(lane & 1u) * 2,
            pair = column / 2;
  threadgroup const float* queries = queries_all + (block * K + row) * 8 + column;
  const int row0 = first_row + 8 * block + column;
  const float2 offset = float2(offsets[8 * block + column], offsets[8 * block + column + 1]);
  const int2 limit =
      int2(coded_limit(p, bounds.coded_end, row0 % p.n_queries), coded_limit(p, bounds.coded_end, (row0 + 1) % p.n_queries));
  const long mask0 = mask_kind != kMaskNone && row0 < n_rows ? mask_row(p, batch, kv_head, row0) : 0;
  const long mask1 = mask_kind != kMaskNone && row0 + 1 < n_rows ? mask_row(p, batch, kv_head, row0 + 1) : 0;
  const bool skips = mask_kind != kMaskNone || is_causal;

  simdgroup_float8x8 acc[V / 8];
#pragma clang loop unroll(full)
  for (int s = 0; s < V / 8; s++) put(acc[s], float2(0.0f));
  float2 bias_acc[NG];
  for (int g = 0; g < NG; g++) bias_acc[g] = float2(0.0f);
  float2 row_max = float2(-INFINITY), row_sum = float2(0.0f);

  // The tile of this group: key words, value words, (scale, bias) pairs, norms, residual norms, residual signs.
  const int tile_words = 32 * (KW + VW + NG + 1 + (has_residual ? 1 + NU : 0));
  threadgroup uint* key_tile = tiles + group * tile_words;
  threadgroup uint* value_tile = key_tile + 32 * KW;
  threadgroup uint* tile_params = value_tile + 32 * VW;
  threadgroup float* norms = reinterpret_cast<threadgroup float*>(tile_params + 32 * NG);
  threadgroup float* tile_residual_norms = norms + 32;
  threadgroup uint* sign_tile = tile_params + 32 * NG + 64;
  threadgroup const uchar* lookup = reinterpret_cast<threadgroup const uchar*>(table);

  const int t0 = max(bounds.coded_begin, int(tg.x) * p.range_tokens);
  const int t1 = min(bounds.coded_end, (int(tg.x) + 1) * p.range_tokens);
  const int my_thread = block * 32 + int(lane), n_threads = 32 * n_blocks;
  // Every group runs the same number of steps: they share the threadgroup's barriers.
  for (int start = t0; start < t1; start += 32 * n_groups) {
    const int base = start + 32 * group, n = clamp(t1 - base, 0, 32);
    tile_barrier(n_blocks == 1);
    for (int i = my_thread; i < 32 * KW; i += n_threads) {
      const device uint* words = reinterpret_cast<const device uint*>(key_codes) + long(base + i / KW) * p.key_codes.token;
      key_tile[i] = i / KW < n ? words[i % KW] : 0u;
    }
    for (int i = my_thread; i < 32 * VW; i += n_threads) {
      const device uint* words = reinterpret_cast<const device uint*>(value_codes) + long(base + i / VW) * p.value_codes.token;
      value_tile[i] = i / VW < n ? words[i % VW] : 0u;
    }
    for (int i = my_thread; i < 32 * NG; i += n_threads) {
      tile_params[i] = i / NG < n ? value_params[long(base + i / NG) * p.value_params.token + i % NG] : 0u;
    }
    for (int i = my_thread; i < 32; i += n_threads) {
      norms[i] = i < n ? float(key_norms[(base + i) * p.key_norms.token]) : 0.0f;
      if (has_residual) tile_residual_norms[i] = i < n ? float(residual_norms[(base + i) * p.residual_norms.token]) : 0.0f;
    }
    for (int i = my_thread; has_residual && i < 32 * NU; i += n_threads) {
      const device uint* words = reinterpret_cast<const device uint*>(key_signs) + long(base + i / NU) * p.key_signs.token;
      sign_tile[i] = i / NU < n ? words[i % NU] : 0u;
    }
    tile_barrier(n_blocks == 1);

    simdgroup_float8x8 scores[4], residual_scores[4];
    for (int rt = 0; rt < 4; rt++) {
      put(scores[rt], float2(0.0f));
      put(residual_scores[rt], float2(0.0f));
    }
#pragma clang loop unroll(full)
    for (int u = 0; u < NU; u++) {
      uint c[4][KB];  // byte `pair` of each word of the unit
#pragma clang loop unroll(full)
      for (int rt = 0; rt < 4; rt++) {
        threadgroup const uchar* from =
            reinterpret_cast<threadgroup const uchar*>(key_tile + (8 * rt + row) * KW + KB * u) + pair;
        for (int i = 0; i < KB; i++) c[rt][i] = from[4 * i];
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        simdgroup_float8x8 a, b;
        put(b, *reinterpret_cast<threadgroup const float2*>(queries + 8 * (32 * u + 8 * i)));
        for (int rt = 0; rt < 4; rt++) {
          put(a, *reinterpret_cast<threadgroup const float2*>(lookup + pair_offset<KB>(c[rt], i)));
          simdgroup_multiply_accumulate(scores[rt], a, b, scores[rt]);
        }
      }
      if (has_residual) {
        for (int i = 0; i < 4; i++) {
          simdgroup_float8x8 a, b;
          put(b, *reinterpret_cast<threadgroup const float2*>(queries + 8 * n_blocks * K + 8 * (32 * u + 8 * i)));
          for (int rt = 0; rt < 4; rt++) {
            const uint bits = sign_tile[(8 * rt + row) * NU + u] >> uint(8 * i + column);
            put(a, float2((bits & 1u) ? 1.0f : -1.0f, (bits & 2u) ? 1.0f : -1.0f));
            simdgroup_multiply_accumulate(residual_scores[rt], a, b, residual_scores[rt]);
          }
        }
      }
    }

    float2 weights[4], tile_max = float2(-INFINITY);
    for (int rt = 0; rt < 4; rt++) {
      const int t = 8 * rt + row;
      float2 x = get(scores[rt]) * norms[t] + offset;
      if (has_residual) x = x + get(residual_scores[rt]) * tile_residual_norms[t];
      bool live0 = t < n && base + t < limit.x, live1 = t < n && base + t < limit.y;
      if (mask_kind != kMaskNone) {
        const long at = (p.n_first + base + t) * p.mask.last;
        const float2 bias = float2(live0 && row0 < n_rows ? mask_bias(mask, mask0 + at) : 0.0f,
                                   live1 && row0 + 1 < n_rows ? mask_bias(mask, mask1 + at) : 0.0f);
        live0 = live0 && bias.x != -INFINITY;
        live1 = live1 && bias.y != -INFINITY;
        x = x + bias;
      }
      weights[rt] = float2(live0 ? x.x : -INFINITY, live1 ? x.y : -INFINITY);
      tile_max = max(tile_max, weights[rt]);
    }
    if (simd_any(tile_max.x > row_max.x || tile_max.y > row_max.y)) {
      const float2 new_max = max(row_max, row_maxima(tile_max)), factor = rescale_both(row_max, new_max);
      row_max = new_max;
      row_sum = row_sum * factor;
#pragma clang loop unroll(full)
      for (int s = 0; s < V / 8; s++) put(acc[s], get(acc[s]) * factor);
      for (int g = 0; g < NG; g++) bias_acc[g] = bias_acc[g] * factor;
    }
#pragma clang loop unroll(full)
    for (int rt = 0; rt < 4; rt++) {
      const int t = 8 * rt + row;
      weights[rt] = float2(weights[rt].x == -INFINITY ? 0.0f : exp2(weights[rt].x - row_max.x),
                           weights[rt].y == -INFINITY ? 0.0f : exp2(weights[rt].y - row_max.y));
      row_sum = row_sum + weights[rt];
      threadgroup const uint* words0 = value_tile + (8 * rt + column) * VW;
      threadgroup const uint* words1 = words0 + VW;
#pragma clang loop unroll(full)
      for (int g = 0; g < NG; g++) {
        const half2 scale_bias = as_type<half2>(tile_params[t * NG + g]);
        float2 scaled = weights[rt] * float(scale_bias.x), biased = weights[rt] * float(scale_bias.y);
        if (skips) {  // a token that a row does not attend may hold anything
          scaled = float2(weights[rt].x == 0.0f ? 0.0f : scaled.x, weights[rt].y == 0.0f ? 0.0f : scaled.y);
          biased = float2(weights[rt].x == 0.0f ? 0.0f : biased.x, weights[rt].y == 0.0f ? 0.0f : biased.y);
        }
        bias_acc[g] = bias_acc[g] + biased;
        simdgroup_float8x8 a, b;
        put(b, scaled);
        for (int s = 4 * g; s < 4 * g + 4; s++) {
          put(a, float2(ValueCodes<V, VB>::code(words0, s, row), ValueCodes<V, VB>::code(words1, s, row)));
          simdgroup_multiply_accumulate(acc[s], a, b, acc[s]);
        }
      }
    }
  }

  row_sum = row_sums(row_sum);
  for (int g = 0; g < NG; g++) bias_acc[g] = row_sums(bias_acc[g]);
  const long part = (long(tg.y) * p.n_parts + int(tg.x) * n_groups + group) * n_rows;
  for (int k = 0; k < 2; k++) {
    if (row0 + k >= n_rows) continue;
#pragma clang loop unroll(full)
    for (int s = 0; s < V / 8; s++) {
      parts[(part + row0 + k) * V + 8 * s + row] = fma(get(acc[s])[k], ValueCodes<V, VB>::weight(s), bias_acc[s / 4][k]);
    }
    if (row == 0) {
      states[(part + row0 + k) * 2] = row_max[k];
      states[(part + row0 + k) * 2 + 1] = row_sum[k];
    }
  }
}

// --- combine ----------------------------------------------------------------------------------------------------------

// One simdgroup per query row.
template <typename T, int V>
[[kernel]] void turboquant_attention_combine(const device float* parts [[buffer(kAttentionParts)]],
                                             const device float* states [[buffer(kAttentionStates)]],
                                             const device float* sinks [[buffer(kAttentionSinks)]],
                                             device T* out [[buffer(kAttentionOut)]],
                                             constant AttentionParams& p [[buffer(kAttentionParams)]],
                                             uint3 tg [[threadgroup_position_in_grid]],
                                             uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float scratch[V];
  const int row = int(tg.x), n_repeats = p.n_rows / p.n_queries;
  const int head = int(tg.y) % p.n_kv_heads * n_repeats + row / p.n_queries;
  const long part = long(tg.y) * p.n_parts * p.n_rows;
  combine_row<T, V>(p, parts + part * V, states + part * 2, p.n_parts, p.n_ranges, p.n_rows, row, sinks, head,
                    out + (long(tg.y) * p.n_rows + row) * p.value_dim, scratch, lane);
}

#define TQ_SPLIT(name, type, k, v, key_bits, value_bits, rows)                                                         \
  template [[host_name(name)]] [[kernel]] decltype(turboquant_attention_split<type, k, v, key_bits, value_bits, rows>) \
      turboquant_attention_split<type, k, v, key_bits, value_bits, rows>;
#define TQ_MATRIX(name, type, k, v, key_bits, value_bits)                                                         \
  template [[host_name(name)]] [[kernel]] decltype(turboquant_attention_matrix<type, k, v, key_bits, value_bits>) \
      turboquant_attention_matrix<type, k, v, key_bits, value_bits>;
#define TQ_COMBINE(name, type, v) \
  template [[host_name(name)]] [[kernel]] decltype(turboquant_attention_combine<type, v>) turboquant_attention_combine<type, v>;
