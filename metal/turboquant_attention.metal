// Decode attention on packed keys and values (format.h): at most three kernels, each packed byte read once for all query
// rows of its KV head.
//
//   split    up to 4 rows (query heads x queries of one KV head), fp32 FMA; with one range it writes the result itself
//   matrix   up to 8 rows per simdgroup, 8x8 matrices, several row blocks on one staged tile; reads lists of tokens
//   combine  merges the partial results of a row, rotates back, divides
//
// Bytes per token and KV head, D = 128, 3-bit keys, against 512 in fp16; the mean of a block is 4 bytes a token:
//   2-bit groups    48 + 2 + 32 + 16 + 4 = 102
//   3-bit Lloyd-Max 48 + 2 + 48 + 2 + 4 = 104
// Work per token, D = 128, 4 rows, by the published rates (tests/metal_sim/cost.py):
//   groups     1052 FMA, 600 integer and other fp32 operations, 31 shuffles, 1012 bytes of threadgroup memory: 13.4 core cycles
//   Lloyd-Max  1036 FMA, 476 other operations, 31 shuffles, 856 bytes: 12.3 core cycles
// The memory delivers 102 bytes in 12.0 (M4 Max) to 13.5 cycles (M2 Pro): both limits are near. 1 or 2 rows: the memory is the
// limit. 8 rows by matrices: 17 cycles for the products alone. What else is issued: docs/metal.md. Not measured on a GPU.
//
// Where the operations went:
// - Codes are loaded as bytes: the load unit extracts them. A key byte is the index of its two levels in a table of 256
//   entries in threadgroup memory; the table repeats over the bits that belong to other codes, so nothing is masked.
//   A table beats arithmetic here: shifts and conversions take four cycles each, a look-up one instruction.
// - Value codes stay in place: x & (3 << 2s), read as half, is code * 2^(2s - 24), a subnormal; the power of two is paid
//   once, on the sum. The scale of a group goes into the softmax weight, its bias into one FMA per token and lane.
// - Lloyd-Max values are laid out as keys and decoded by the same table where bits and dimension are the keys'. Their norms go
//   into the softmax weights as these are made: no bias, no scale per group.
// - The mean of a block is multiplied with the rows once for its 64 tokens, not rotated and not balanced: fp32 products of
//   what was stored, however large a key bias is.
// - Sums over the lanes of a key are transposed: KL sums over KL lanes cost KL - 1 shuffles and leave one score per lane.
// - The running maximum is reduced only when a lane sees a larger score. No barrier of the threadgroup in the loop.
#include "attention.h"

constant constexpr int kSplitSimdgroups = 8;

// --- means and codes --------------------------------------------------------------------------------------------------

// What the mean of a block adds to the scores of row lane % R. queries: R rows of D numbers as the model has them.
template <int D, int R>
inline float block_offset(constant AttentionParams& p, const device uchar* means, int block, threadgroup const float* queries,
                          uint lane) {
  float sum[R];
  for (int r = 0; r < R; r++) sum[r] = 0.0f;
  const long at = block * p.means.token + lane * p.means.last;
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    const float mean = d < p.head_dim ? mean_at(means, at + 32 * i * p.means.last) : 0.0f;
    for (int r = 0; r < R; r++) sum[r] = fma(queries[r * D + d], mean, sum[r]);
  }
#pragma clang loop unroll(full)
  for (ushort h = R / 2; h >= 1; h /= 2) {
    for (int i = 0; i < h; i++) {
      const bool up = lane & h;
      const float low = sum[i], high = sum[i + h];
      sum[i] = (up ? high : low) + simd_shuffle_xor(up ? low : high, h);
    }
  }
  for (ushort h = R; h < 32; h *= 2) sum[0] += simd_shuffle_xor(sum[0], h);
  return sum[0] * p.score_scale;
}

// NB neighbouring bytes of each word of a unit: c[BITS j + i] = byte j of word i, zero without `load`.
template <int BITS, int NB>
inline void load_unit(const device uchar* from, bool load, thread uint* c) {
  for (int i = 0; i < BITS; i++) {
    if (NB == 2) {
      const uchar2 x = load ? *reinterpret_cast<const device uchar2*>(from + 4 * i) : uchar2(0);
      c[i] = x[0];
      c[(NB - 1) * BITS + i] = x[1];
    } else {
      c[i] = load ? from[4 * i] : uchar(0);
    }
  }
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
  return as_type<float>(uint(127 + 24 - BITS * (slot % (10 / BITS))) << 23);
}

// --- values of the split kernel ---------------------------------------------------------------------------------------

// Both codings say how a simdgroup shares values: kLanes lanes a value, kHeld numbers a lane, dim() their dimensions, kParams
// words of parameters per token in threadgroup memory. add() adds the n tokens of a tile, times their weights, to acc[i R + r];
// acc times unit() is the sum. values: the lane's first codes, those of its next token `step` bytes on.

// Groups: a lane holds one word, or half of it, of the values it sees. The scale of a group goes into the weight.
template <int V, int BITS, int R>
struct GroupValues {
  static constant constexpr int kWords = V * BITS / 32, kPerWord = BITS == 2 && R > 2 ? 2 : 1, kHalves = 2 / kPerWord;
  static constant constexpr int kLanes = power_of_two(kWords) * kPerWord, kTokens = 32 / kLanes;
  static constant constexpr int kSlots = 16 / BITS, kHeld = kHalves * kSlots, kParams = V / 32;
  static_assert(kLanes <= 32 && R * kParams <= kLanes, "a value fits a simdgroup, every sum of group biases has a lane");

  static inline bool has_codes(int lane) { return lane / kPerWord < kWords; }
  static inline int first_byte(int lane) { return 4 * (lane / kPerWord) + 2 * (lane % kPerWord); }
  static inline int dim(int lane, int i) { return kWords * (kHeld * (lane % kPerWord) + i) + lane / kPerWord; }
  static inline float unit(int i) { return subnormal_weight<BITS>(i % kSlots); }
  // The sum of biases that a lane makes.
  static inline int bias_row(int lane) { return lane % R; }
  static inline int bias_group(int lane) { return min(lane / R, kParams - 1); }

  static inline void add(const device uchar* values, int step, int n, threadgroup const uint* params,
                         threadgroup const float* weights, threadgroup const uchar*, bool skips, int lane, int first,
                         thread float* acc, thread float& bias_acc) {
    const bool has = has_codes(lane);
    const int row = bias_row(lane), group = bias_group(lane);
#pragma clang loop unroll_count(2)
    for (int s = 0; s < kLanes; s++) {
      const int t = s * kTokens + first;
      const device ushort* from = reinterpret_cast<const device ushort*>(values + s * step);
      ushort x[kHalves];
      for (int i = 0; i < kHalves; i++) x[i] = t < n && has ? from[i] : ushort(0);
      const float bias = float(as_type<half2>(params[t * kParams + group]).y), bias_weight = weights[t * R + row];
      if (!skips || bias_weight != 0.0f) bias_acc = fma(bias_weight, bias, bias_acc);
      if (32 % kWords == 0) {  // each slot lies in one group
        constexpr int n_groups = largest(1, kParams / kPerWord);
        const int first_group = kWords * kHeld * (lane % kPerWord) / 32;
        float scaled[n_groups * R];
        for (int g = 0; g < n_groups; g++) {
          const float scale = float(as_type<half2>(params[t * kParams + first_group + g]).x);
          for (int r = 0; r < R; r++) {
            const float weight = weights[t * R + r];
            scaled[g * R + r] = skips && weight == 0.0f ? 0.0f : weight * scale;
          }
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < kHeld; i++) {
          const float code = subnormal_code<BITS>(x[i / kSlots], i % kSlots);
          for (int r = 0; r < R; r++) acc[i * R + r] = fma(scaled[kWords * i / 32 * R + r], code, acc[i * R + r]);
        }
      } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < kHeld; i++) {
          const float code = subnormal_code<BITS>(x[i / kSlots], i % kSlots);
          const float scale = float(as_type<half2>(params[t * kParams + min(dim(lane, i) / 32, kParams - 1)]).x);
          for (int r = 0; r < R; r++) {
            const float weight = weights[t * R + r];
            if (!skips || weight != 0.0f) acc[i * R + r] = fma(weight * scale, code, acc[i * R + r]);
          }
        }
      }
    }
  }
};

// Lloyd-Max levels: a lane holds a quarter or half of a unit, decoded by the table as keys are. The norms are in the weights.
template <int V, int BITS, int R>
struct LloydValues {
  static constant constexpr int kUnits = V / 32, kPerUnit = R > 2 ? 4 : 2, kBytes = 4 / kPerUnit, kRun = 8 / kPerUnit;
  static constant constexpr int kLanes = power_of_two(kUnits) * kPerUnit, kTokens = 32 / kLanes;
  static constant constexpr int kHeld = 4 * kRun, kParams = 1;
  static_assert(kLanes <= 32, "a value fits a simdgroup");

  static inline bool has_codes(int lane) { return lane / kPerUnit < kUnits; }
  static inline int first_byte(int lane) { return 4 * BITS * (lane / kPerUnit) + kBytes * (lane % kPerUnit); }
  static inline int dim(int lane, int i) {
    return 32 * (lane / kPerUnit) + 8 * (i / kRun) + kRun * (lane % kPerUnit) + i % kRun;
  }
  static inline float unit(int) { return 1.0f / float(kCodebookTop); }
  static inline int bias_row(int) { return 0; }
  static inline int bias_group(int) { return 0; }

  static inline void add(const device uchar* values, int step, int n, threadgroup const uint*, threadgroup const float* weights,
                         threadgroup const uchar* lookup, bool, int lane, int first, thread float* acc, thread float&) {
    const bool has = has_codes(lane);
#pragma clang loop unroll_count(2)
    for (int s = 0; s < kLanes; s++) {
      const int t = s * kTokens + first;
      uint c[kBytes * BITS];
      load_unit<BITS, kBytes>(values + s * step, t < n && has, c);
      float weight[R];
      for (int r = 0; r < R; r++) weight[r] = weights[t * R + r];
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        for (int j = 0; j < kBytes; j++) {
          const half2 x = *reinterpret_cast<threadgroup const half2*>(lookup + pair_offset<BITS>(c + BITS * j, i));
          const int at = (kRun * i + 2 * j) * R;
          for (int r = 0; r < R; r++) {
            acc[at + r] = fma(float(x.x), weight[r], acc[at + r]);
            acc[at + R + r] = fma(float(x.y), weight[r], acc[at + R + r]);
          }
        }
      }
    }
  }
};

template <int CODING, typename Groups, typename Lloyd>
struct ChooseValues {
  typedef Groups type;
};
template <typename Groups, typename Lloyd>
struct ChooseValues<kValueLloyd, Groups, Lloyd> {
  typedef Lloyd type;
};

// --- exact tokens -----------------------------------------------------------------------------------------------------

// A run of tokens of the first ones or of the tail, all of one KV head.
struct ExactRun {
  int begin, n;                       // tokens of the part
  int column;                         // of token `begin`
  int stored_begin, stored_end, own;  // stored: [stored_begin, stored_end) and from `own` on
  int at;                             // of token `begin` among the threadgroup's
};

// Those of first (part 0) or tail (part 1) among the tokens [begin, end) of first ++ tail.
inline ExactRun exact_run(constant AttentionParams& p, Bounds b, int part, int begin, int end) {
  const int n_before = min(end, p.n_first) - min(begin, p.n_first);
  ExactRun run;
  run.begin = part ? max(begin - p.n_first, 0) : min(begin, p.n_first);
  run.n = part ? end - begin - n_before : n_before;
  run.column = part ? p.n_first + p.n_coded + run.begin : run.begin;
  run.stored_begin = part ? b.tail_begin : b.first_begin;
  run.stored_end = part ? b.tail_end : b.first_end;
  run.own = part ? b.tail_own : p.n_first;
  run.at = part ? n_before : 0;
  return run;
}

// Scores of rows [row0, row0 + n): scores[r * n_tokens + at + i]. A simdgroup takes four tokens at a time. Tokens that are not
// attended to are read all the same, so that no load waits for a condition.
template <typename T, int K>
inline void score_exact(constant AttentionParams& p, const device T* q, const device T* keys, constant Strides4& strides,
                        ExactRun run, const device uchar* mask, int batch, int kv_head, int row0, int n, int n_tokens,
                        threadgroup float* scores, uint sg, uint lane, uint n_sg) {
  const int n_repeats = p.n_rows / p.n_queries;
  keys += batch * strides.batch + kv_head * strides.head + run.begin * strides.token;
#pragma clang loop unroll(disable)
  for (int first = 4 * int(sg); first < run.n; first += 4 * int(n_sg)) {
    float key[4][K / 32];
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
      const device T* from = keys + min(first + j, run.n - 1) * strides.token;
      for (int i = 0; i < K / 32; i++) {
        const int d = 32 * i + int(lane);
        const float x = float(from[(d < p.head_dim ? d : 0) * strides.last]);
        key[j][i] = d < p.head_dim ? x : 0.0f;
      }
    }
    const int i_token = first + int(lane & 3u), t = run.begin + i_token, column = run.column + i_token;
    const bool stored = i_token < run.n && t >= run.stored_begin && (t < run.stored_end || t >= run.own);
#pragma clang loop unroll(disable)
    for (int r = 0; r < n; r++) {
      const int row = row0 + r, head = kv_head * n_repeats + row / p.n_queries, query = row % p.n_queries;
      const device T* x = q + batch * p.q.batch + head * p.q.head + query * p.q.token;
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int i = 0; i < K / 32; i++) {
        const int d = 32 * i + int(lane);
        const float y = float(x[(d < p.head_dim ? d : 0) * p.q.last]);
        for (int j = 0; j < 4; j++) sum[j] = fma(y, key[j][i], sum[j]);
      }
      // The sum of token lane % 4 on each lane.
      const bool up2 = lane & 2u, up1 = lane & 1u;
      const float low = (up2 ? sum[2] : sum[0]) + simd_shuffle_xor(up2 ? sum[0] : sum[2], ushort(2));
      const float high = (up2 ? sum[3] : sum[1]) + simd_shuffle_xor(up2 ? sum[1] : sum[3], ushort(2));
      float score = (up1 ? high : low) + simd_shuffle_xor(up1 ? low : high, ushort(1));
      for (ushort h = 4; h < 32; h *= 2) score += simd_shuffle_xor(score, h);
      score *= p.score_scale;
      const bool seen = stored && (!is_causal || column <= p.n_first + p.n_coded + p.n_tail - p.n_queries + query);
      if (mask_kind != kMaskNone && seen) {
        const float bias = mask_bias(mask, mask_row(p, batch, kv_head, row) + column * p.mask.last);
        score = bias == -INFINITY ? -INFINITY : score + bias;
      }
      if (lane < 4 && i_token < run.n) scores[r * n_tokens + run.at + i_token] = seen ? score : -INFINITY;
    }
  }
}

// Adds every n_slices-th value of the run from `slice` on, dimension d, times the weights of N rows.
template <typename T, int N>
inline void add_exact(const device T* values, constant Strides4& strides, ExactRun run, int batch, int kv_head, int n,
                      int n_tokens, threadgroup const float* weights, int d, int slice, int n_slices, thread float* acc) {
  values += batch * strides.batch + kv_head * strides.head + run.begin * strides.token + d * strides.last;
#pragma clang loop unroll_count(4)
  for (int i = slice; i < run.n; i += n_slices) {
    const float value = float(values[i * strides.token]);
    for (int r = 0; r < N; r++) {
      const float weight = r < n ? weights[r * n_tokens + run.at + i] : 0.0f;
      acc[r] = weight == 0.0f ? acc[r] : fma(weight, value, acc[r]);  // a token that is not attended may hold anything
    }
  }
}

// Attends rows [row0, row0 + n) (at most N) to exact tokens [begin, end) of first ++ tail, at most kExactTokens, with all
// simdgroups of the threadgroup. scratch: N numbers per thread, and per token at least. out[row * V], state[row * 2] for the
// n rows, in the space of the model.
template <typename T, int K, int V, int N, typename P>
inline void attend_exact(constant AttentionParams& p, Bounds b, const device T* q, const device T* first_keys,
                         const device T* first_values, const device T* tail_keys, const device T* tail_values,
                         const device uchar* mask, int batch, int kv_head, int row0, int n, int begin, int end,
                         threadgroup float* scratch, P out, P state, uint tid, uint sg, uint lane, uint n_sg) {
  const int n_tokens = end - begin;
#pragma clang loop unroll(disable)
  for (int part = 0; part < 2; part++) {
    score_exact<T, K>(p, q, part ? tail_keys : first_keys, part ? p.tail_keys : p.first_keys, exact_run(p, b, part, begin, end),
                      mask, batch, kv_head, row0, n, n_tokens, scratch, sg, lane, n_sg);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int r = int(sg); r < n; r += int(n_sg)) {
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int e = int(lane); e < n_tokens; e += 32) row_max = max(row_max, scratch[r * n_tokens + e]);
    row_max = simd_max(row_max);
    for (int e = int(lane); e < n_tokens; e += 32) {
      const float score = scratch[r * n_tokens + e];
      const float weight = score == -INFINITY ? 0.0f : fast::exp2(score - row_max);
      scratch[r * n_tokens + e] = weight;
      row_sum += weight;
    }
    row_sum = simd_sum(row_sum);
    if (lane == 0) {
      state[2 * r] = row_max;
      state[2 * r + 1] = row_sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Every dimension has as many threads as there are, each with a slice of the tokens.
  const int n_threads = 32 * int(n_sg), n_slices = clamp(1 + (n_threads - n_tokens) / V, 1, max(1, n_threads / V));
  threadgroup float* partial = scratch + n * n_tokens;
  const int slice = int(tid) / V;
  float acc[N];
  for (int d = int(tid) % V; d < V && slice < n_slices; d += n_threads) {
    for (int r = 0; r < N; r++) acc[r] = 0.0f;
#pragma clang loop unroll(disable)
    for (int part = 0; part < 2 && d < p.value_dim; part++) {
      add_exact<T, N>(part ? tail_values : first_values, part ? p.tail_values : p.first_values,
                      exact_run(p, b, part, begin, end), batch, kv_head, n, n_tokens, scratch, d, slice, n_slices, acc);
    }
    for (int r = 0; r < N; r++) {
      if (r >= n) continue;
      if (n_slices == 1) {
        out[r * V + d] = acc[r];
      } else if (slice > 0) {
        partial[((slice - 1) * n + r) * V + d] = acc[r];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (n_slices > 1) {
    for (int r = 0; r < N; r++) {
      if (slice > 0 || r >= n) continue;
      float sum = acc[r];
      for (int i = 1; i < n_slices; i++) sum += partial[((i - 1) * n + r) * V + int(tid)];
      out[r * V + int(tid)] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// --- split: up to 4 rows ----------------------------------------------------------------------------------------------

// Eight simdgroups, each with a share of neighbouring tiles of 32 tokens, so that the mean of a block is read once by all that
// need it. Keys: a lane holds 32 / KH dimensions of one unit of the keys it sees, KL lanes a key. Values: GroupValues or
// LloydValues. Units and words of dimensions that are no power of two are padded with idle lanes.
template <int K, int KB, int R>
struct SplitKeys {
  static constant constexpr int kUnits = K / 32, kPerUnit = 2 * power_of_two(kUnits) >= R ? 2 : 4;  // lanes per unit
  static constant constexpr int kLanes = kPerUnit * power_of_two(kUnits), kTokens = 32 / kLanes;    // per key; per step
  static constant constexpr int kSteps = kLanes / R;                                                // per reduction
  static constant constexpr int kBytes = 4 / kPerUnit, kRun = 8 / kPerUnit;  // bytes and codes of each word per lane
  static constant constexpr int kHeld = 4 * kRun;                            // dimensions of a lane
  static_assert(kLanes <= 32 && kLanes >= R, "a key fits a simdgroup");

  static inline int dim(int unit, int part, int i) { return 32 * unit + 8 * (i / kRun) + kRun * part + i % kRun; }

  // Products of one key with R rows over this lane's dimensions: sum[r]. query[i * R + r].
  static inline void multiply(const device uchar* from, bool load, threadgroup const uchar* lookup, thread const float* query,
                              thread float* sum) {
    uint c[kBytes * KB];
    load_unit<KB, kBytes>(from, load, c);
    for (int r = 0; r < R; r++) sum[r] = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
      for (int j = 0; j < kBytes; j++) {
        const half2 x = *reinterpret_cast<threadgroup const half2*>(lookup + pair_offset<KB>(c + KB * j, i));
        for (int r = 0; r < R; r++) {
          sum[r] = fma(float(x.x), query[(kRun * i + 2 * j) * R + r], sum[r]);
          sum[r] = fma(float(x.y), query[(kRun * i + 2 * j + 1) * R + r], sum[r]);
        }
      }
    }
  }

  // The norm and the residual's share of the same sums. bits: signs of this lane's 32 / kPerUnit neighbouring dimensions.
  static inline void add_residual(const device uchar* from, bool load, bool has_unit, threadgroup const float* queries,
                                  float norm, float residual_norm, thread float* sum) {
    constexpr int n_bits = 32 / kPerUnit;
    uint bits = 0u;
    if (load) bits = kPerUnit == 2 ? uint(*reinterpret_cast<const device ushort*>(from)) : uint(*from);
    for (int r = 0; r < R; r++) {
      float residual = 0.0f;
      for (int j = 0; j < n_bits && has_unit; j++) {
        const float x = queries[r * K + j];
        residual += (bits >> uint(j) & 1u) ? x : -x;
      }
      sum[r] = fma(sum[r], norm, residual * residual_norm);
    }
  }

  // Sums over the lanes of a key: that of step key_lane / R and row key_lane % R on each lane.
  static inline float reduce(thread float* sum, int key_lane) {
#pragma clang loop unroll(full)
    for (ushort h = kLanes / 2; h >= 1; h /= 2) {
      for (int i = 0; i < h; i++) {
        const bool up = key_lane & h;
        // Values are selected, not elements: an index at run time would make the array memory.
        const float low = sum[i], high = sum[i + h];
        sum[i] = (up ? high : low) + simd_shuffle_xor(up ? low : high, h);
      }
    }
    return sum[0];
  }
};

// The rows as coded keys, their means and their residual signs need them: R rows of K numbers each.
template <typename T, int K, int R>
inline void stage_split_queries(constant AttentionParams& p, const device T* q, const device float* balance, int batch,
                                int kv_head, int n_rows, threadgroup float* queries, threadgroup float* plain_queries,
                                threadgroup float* residual_queries, uint sg, uint lane) {
  constexpr int NU = K / 32;
  for (int r = int(sg); r < R; r += kSplitSimdgroups) {
    float x[NU], residual[NU];
    for (int i = 0; i < NU; i++) x[i] = residual[i] = 0.0f;
    if (r < n_rows) load_query<T, K>(p, q, batch, kv_head, r, x, lane);
    for (int i = 0; means_kind != kMeansNone && i < NU; i++) plain_queries[r * K + 32 * i + int(lane)] = x[i];
    if (r < n_rows) prepare_query<K>(p, balance, kv_head, x, residual, queries + r * K, lane);
    for (int i = 0; i < NU; i++) {
      queries[r * K + 32 * i + int(lane)] = x[i];
      if (has_residual) residual_queries[r * K + 32 * i + int(lane)] = residual[i];
    }
  }
}

// Norms and value parameters of the n tokens of a tile, one token a lane.
template <int NP, bool LLOYD>
inline void stage_split_numbers(constant AttentionParams& p, const device half* key_norms, const device half* residual_norms,
                                const device uchar* value_params, int base, int n, threadgroup float* norms,
                                threadgroup float* tile_residual_norms, threadgroup uint* tile_params, uint lane) {
  const bool mine = int(lane) < n;
  norms[lane] = mine ? float(key_norms[(base + int(lane)) * p.key_norms.token]) : 0.0f;
  if (has_residual) {
    tile_residual_norms[lane] = mine ? float(residual_norms[(base + int(lane)) * p.residual_norms.token]) : 0.0f;
  }
  for (int i = 0; i < NP; i++) {
    const long at = (base + int(lane)) * p.value_params.token + i;
    uint x = 0u;
    if (mine && LLOYD) x = as_type<uint>(float(reinterpret_cast<const device half*>(value_params)[at]));
    if (mine && !LLOYD) x = reinterpret_cast<const device uint*>(value_params)[at];
    tile_params[int(lane) * NP + i] = x;
  }
}

// Maxima and sums of the simdgroups become those of the threadgroup: states[2 r], states[2 r + 1].
template <int R>
inline void join_states(threadgroup const float* maxima, threadgroup const float* sums, threadgroup float* states, uint tid) {
  if (int(tid) >= R) return;
  float all_max = -INFINITY, all_sum = 0.0f;
  for (int i = 0; i < kSplitSimdgroups; i++) all_max = max(all_max, maxima[i * R + int(tid)]);
  for (int i = 0; i < kSplitSimdgroups; i++) {
    all_sum += sums[i * R + int(tid)] * rescale(maxima[i * R + int(tid)], all_max);
  }
  states[2 * tid] = all_max;
  states[2 * tid + 1] = all_sum;
}

// The simdgroups' sums become those of the threadgroup, merged[r * V + d], MR rows at a time: pool holds as many of each.
template <typename Values, int V, int R, int MR, bool LLOYD>
inline void join_sums(thread const float* acc, threadgroup const float* maxima, threadgroup const float* bias_sums,
                      threadgroup float* pool, threadgroup float* merged, int value_lane, uint tid, uint sg, uint lane) {
  constexpr int NSG = kSplitSimdgroups, NG = V / 32;
#pragma clang loop unroll(full)
  for (int first = 0; first < R; first += MR) {
    if (int(lane) < Values::kLanes && Values::has_codes(value_lane)) {
      for (int r = first; r < first + MR; r++) {
        float all_max = -INFINITY;
        for (int i = 0; i < NSG; i++) all_max = max(all_max, maxima[i * R + r]);
        const float factor = rescale(maxima[int(sg) * R + r], all_max);
#pragma clang loop unroll(full)
        for (int i = 0; i < Values::kHeld; i++) {
          const int d = Values::dim(value_lane, i);
          const float bias = LLOYD ? 0.0f : bias_sums[(int(sg) * R + r) * NG + d / 32];
          pool[(int(sg) * MR + r - first) * V + d] = factor * fma(acc[i * R + r], Values::unit(i), bias);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = int(tid); i < MR * V; i += NSG * 32) {
      float sum = pool[i];
      for (int j = 1; j < NSG; j++) sum += pool[j * MR * V + i];
      merged[first * V + i] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

template <typename T, int K, int V, int KB, int VB, int VC, int R>
[[kernel, max_total_threads_per_threadgroup(256)]] void turboquant_attention_split(TQ_ATTENTION_ARGUMENTS,
                                                                                   threadgroup float* residual_queries
                                                                                   [[threadgroup(0)]]) {
  constexpr bool LLOYD = VC == kValueLloyd;
  constexpr bool OWN_TABLE = LLOYD && (VB != KB || V != K);  // else keys and values share one
  constexpr int NSG = kSplitSimdgroups;
  constexpr int NG = V / 32;  // value groups
  typedef SplitKeys<K, KB, R> Keys;
  constexpr int NU = Keys::kUnits, KH = Keys::kPerUnit, KL = Keys::kLanes, KT = Keys::kTokens, SB = Keys::kSteps;
  typedef typename ChooseValues<VC, GroupValues<V, VB, R>, LloydValues<V, VB, R>>::type Values;
  constexpr int VL = Values::kLanes, NP = Values::kParams, NA = Values::kHeld;
  constexpr int M = largest(K, V);
  constexpr int MR = M <= 128 ? R : 1;  // rows joined at a time, as far as the memory reaches
  constexpr int POOL = largest(NSG * 32 * (R + 2), NSG * MR * V);
  static_assert(2048 * (OWN_TABLE ? 2 : 1) + 8 * R * M + 4 * POOL + 128 * NSG * NP + 4 * R * (NSG * (NG + 2) + 4) + 4 * R * K <=
                    32768 - 16,
                "threadgroup memory, with that of the residual queries");

  threadgroup uint table[512];  // half2 per byte of key codes, twice: odd and even lanes use different banks
  threadgroup uint value_table[OWN_TABLE ? 512 : 1];
  threadgroup float merged[2 * R * M];  // rotated queries, then unrotated ones; at the end the coded result, then the exact one
  // Weights, norms and residual norms of the simdgroups' tiles; scratch for exact tokens; sums that are to be joined.
  threadgroup float pool[POOL];
  threadgroup uint params_all[NSG * 32 * NP];  // (scale, bias) or norm of the tile's tokens
  threadgroup float maxima[NSG * R], sums[NSG * R], bias_sums[LLOYD ? 1 : NSG * R * NG], states_all[4 * R];
  TQ_ATTENTION_HEAD
  const int n_rows = p.n_rows;
  const int n_exact = p.n_first + p.n_tail;

  if (!is_direct && int(tg.x) >= p.n_ranges) {
    const int range = int(tg.x) - p.n_ranges, begin = range * kExactRange;
    const long part = (long(tg.y) * p.n_parts + int(tg.x)) * n_rows;
    attend_exact<T, K, V, R>(p, bounds, q, first_keys, first_values, tail_keys, tail_values, mask, batch, kv_head, 0, n_rows,
                             begin, min(n_exact, begin + kExactRange), pool, parts + part * V, states + part * 2, tid, sg, lane,
                             NSG);
    return;
  }

  for (uint b = tid; b < 256; b += NSG * 32) {
    const uint entry = as_type<uint>(half2(level_pair<KB>(p.codebook, b)));
    table[2 * b] = entry;
    table[2 * b + 1] = entry;
    if (OWN_TABLE) {
      const uint value_entry = as_type<uint>(half2(level_pair<VB>(p.value_codebook, b)));
      value_table[2 * b] = value_entry;
      value_table[2 * b + 1] = value_entry;
    }
  }
  threadgroup float* queries = merged;
  threadgroup float* plain_queries = merged + R * M;  // for the means
  stage_split_queries<T, K, R>(p, q, balance, batch, kv_head, n_rows, queries, plain_queries, residual_queries, sg, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int key_lane = int(lane) % KL, unit = key_lane / KH, part_of_unit = key_lane % KH;
  const int value_lane = int(lane) % VL, bias_row = Values::bias_row(value_lane);
  const bool has_unit = unit < NU;
  const int my_row = key_lane % R;
  const int limit = coded_limit(p, bounds.coded_end, my_row % p.n_queries);
  const long my_mask = mask_kind != kMaskNone && my_row < n_rows ? mask_row(p, batch, kv_head, my_row) : 0;
  // Tokens that a row skips inside the range may hold anything: their weight 0 must not meet a NaN.
  const bool skips = mask_kind != kMaskNone || is_causal;

  float query[Keys::kHeld * R], acc[NA * R], bias_acc = 0.0f;
#pragma clang loop unroll(full)
  for (int i = 0; i < Keys::kHeld; i++) {
    for (int r = 0; r < R; r++) query[i * R + r] = has_unit ? queries[r * K + Keys::dim(unit, part_of_unit, i)] : 0.0f;
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < NA * R; i++) acc[i] = 0.0f;
  float row_max = -INFINITY, row_sum = 0.0f;  // of my_row; the sum is this lane's share
  const uint bank = 4 * (lane & 1u);
  threadgroup const uchar* lookup = reinterpret_cast<threadgroup const uchar*>(table) + bank;
  threadgroup const uchar* value_lookup = OWN_TABLE ? reinterpret_cast<threadgroup const uchar*>(value_table) + bank : lookup;
  threadgroup float* weights = pool + sg * (32 * R);
  threadgroup uint* tile_params = params_all + sg * (32 * NP);
  threadgroup float* norms = pool + NSG * 32 * R + sg * 32;
  threadgroup float* tile_residual_norms = norms + NSG * 32;

  // Byte addresses: one offset of the lane, the same step for all lanes.
  const int key_step = 4 * KT * int(p.key_codes.token), value_step = 4 * Values::kTokens * int(p.value_codes.token);
  const int key_offset = int(lane) / KL * (4 * int(p.key_codes.token)) + 4 * KB * unit + Keys::kBytes * part_of_unit;
  const int value_offset = int(lane) / VL * (4 * int(p.value_codes.token)) + Values::first_byte(value_lane);

  const Range range = coded_range(p, bounds, int(tg.x));
  const int share = (range.end - range.block_begin + 32 * NSG - 1) / (32 * NSG) * 32;
  const int begin = range.block_begin + int(sg) * share, end = min(range.end, begin + share);
  float my_offset = 0.0f;  // of my_row, from the mean of the block
  int my_block = -1;
  for (int tile = begin; tile < end; tile += 32) {
    const int base = max(tile, range.begin), n = min(tile + 32, end) - base;
    if (n <= 0) continue;  // padding
    if (means_kind != kMeansNone && base / kBlockTokens != my_block) {
      my_block = base / kBlockTokens;
      my_offset = block_offset<K, R>(p, means, my_block, plain_queries, lane);
    }
    stage_split_numbers<NP, LLOYD>(p, key_norms, residual_norms, value_params, base, n, norms, tile_residual_norms, tile_params,
                                   lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);

    const device uchar* keys = key_codes + 4 * (base * p.key_codes.token) + key_offset;
    float score[R], tile_max = -INFINITY;
#pragma clang loop unroll(full)
    for (int b = 0; b < R; b++) {
      float sum[KL];
#pragma clang loop unroll(full)
      for (int s = 0; s < SB; s++) {
        const int t = (b * SB + s) * KT + int(lane) / KL;
        const bool load = t < n && has_unit;
        Keys::multiply(keys + (b * SB + s) * key_step, load, lookup, query, sum + s * R);
        if (has_residual) {
          constexpr int n_bits = 32 / KH;
          const device uchar* signs = key_signs + 4 * ((base + t) * p.key_signs.token + unit) + n_bits / 8 * part_of_unit;
          Keys::add_residual(signs, load, has_unit, residual_queries + 32 * unit + n_bits * part_of_unit, norms[t],
                             tile_residual_norms[t], sum + s * R);
        }
      }
      const float product = Keys::reduce(sum, key_lane);
      const int t = (b * SB + key_lane / R) * KT + int(lane) / KL;
      float x = has_residual ? product + my_offset : fma(product, norms[t], my_offset);
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
        for (int i = 0; i < NA; i++) acc[i * R + r] *= row_factor;
      }
      if (!LLOYD) bias_acc *= simd_shuffle(factor, ushort(bias_row));
    }
#pragma clang loop unroll(full)
    for (int b = 0; b < R; b++) {
      const float weight = score[b] == -INFINITY ? 0.0f : fast::exp2(score[b] - row_max);
      row_sum += weight;
      const int t = (b * SB + key_lane / R) * KT + int(lane) / KL;
      float scaled = weight;
      if (LLOYD) {
        scaled = weight * as_type<float>(tile_params[t]);
        if (skips) scaled = weight == 0.0f ? 0.0f : scaled;
      }
      weights[t * R + my_row] = scaled;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    Values::add(value_codes + 4 * (base * p.value_codes.token) + value_offset, value_step, n, tile_params, weights,
                value_lookup, skips, value_lane, int(lane) / VL, acc, bias_acc);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  for (ushort h = R; h < 32; h *= 2) row_sum += simd_shuffle_xor(row_sum, h);
  if (lane < uint(R)) {
    maxima[sg * R + lane] = row_max;
    sums[sg * R + lane] = row_sum;
  }
  for (ushort h = VL; h < 32; h *= 2) {
    if (!LLOYD) bias_acc += simd_shuffle_xor(bias_acc, h);
    for (int i = 0; i < NA * R; i++) acc[i] += simd_shuffle_xor(acc[i], h);
  }
  if (!LLOYD && int(lane) < R * NG) {
    bias_sums[(int(sg) * R + bias_row) * NG + Values::bias_group(value_lane)] = bias_acc;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  join_states<R>(maxima, sums, states_all, tid);
  join_sums<Values, V, R, MR, LLOYD>(acc, maxima, bias_sums, pool, merged, value_lane, tid, sg, lane);
  if (!is_direct) {
    const long part = (long(tg.y) * p.n_parts + int(tg.x)) * n_rows;
    for (int i = int(tid); i < n_rows * V; i += NSG * 32) parts[part * V + i] = merged[i];
    if (int(tid) < 2 * n_rows) states[part * 2 + int(tid)] = states_all[tid];
    return;
  }
  if (n_exact > 0) {
    attend_exact<T, K, V, R>(p, bounds, q, first_keys, first_values, tail_keys, tail_values, mask, batch, kv_head, 0, n_rows, 0,
                             n_exact, pool, merged + R * V, states_all + 2 * R, tid, sg, lane, NSG);
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

// Row `row` of those that attend to a list. Where each query has its own, they are the rows of a query: one for each head.
inline int row_of_list(constant AttentionParams& p, int list, int row) { return has_indices ? row * p.n_lists + list : row; }

// What the means of eight blocks add to the scores of rows row0 and row1: those of block `row` on this lane.
template <typename T, int K>
inline float2 stage_offsets(constant AttentionParams& p, const device T* q, int batch, int kv_head, int row0, int row1,
                            threadgroup const half* half_means, threadgroup const float* float_means, int row, int column) {
  const int n_repeats = p.n_rows / p.n_queries;
  const int head0 = kv_head * n_repeats + row0 / p.n_queries, head1 = kv_head * n_repeats + row1 / p.n_queries;
  const device T* q0 = q + batch * p.q.batch + head0 * p.q.head + row0 % p.n_queries * p.q.token + row * p.q.last;
  const device T* q1 = q + batch * p.q.batch + head1 * p.q.head + row1 % p.n_queries * p.q.token + row * p.q.last;
  const bool has0 = row0 < p.n_rows, has1 = row1 < p.n_rows;
  simdgroup_float8x8 a, b, sum;
  put(sum, float2(0.0f));
#pragma clang loop unroll(disable)
  for (int s = 0; s < K / 8; s++) {
    const int at = row * K + 8 * s + column;
    if (means_kind == kMeansHalf) {
      const half2 mean = *reinterpret_cast<threadgroup const half2*>(half_means + at);
      put(a, float2(float(mean.x), float(mean.y)));
    } else {
      put(a, *reinterpret_cast<threadgroup const float2*>(float_means + at));
    }
    const bool inside = 8 * s + row < p.head_dim;
    put(b, float2(inside && has0 ? float(q0[8 * s * p.q.last]) : 0.0f, inside && has1 ? float(q1[8 * s * p.q.last]) : 0.0f));
    simdgroup_multiply_accumulate(sum, a, b, sum);
  }
  return get(sum) * p.score_scale;
}

// Row r of the list's, from first_row on: dimension d at queries[(r / 8 * K + d) * 8 + r % 8]. scratch: K numbers of this
// simdgroup.
template <typename T, int K>
inline void stage_matrix_queries(constant AttentionParams& p, const device T* q, const device float* balance, int batch,
                                 int kv_head, int list, int first_row, int n_blocks, threadgroup float* queries_all,
                                 threadgroup float* residual_queries, threadgroup float* scratch, uint sg, uint lane,
                                 uint n_sg) {
  constexpr int NU = K / 32;
  for (int r = int(sg); r < 8 * n_blocks; r += int(n_sg)) {
    float x[NU], residual[NU];
    for (int i = 0; i < NU; i++) x[i] = residual[i] = 0.0f;
    const int row = row_of_list(p, list, first_row + r);
    if (row < p.n_rows) {
      load_query<T, K>(p, q, batch, kv_head, row, x, lane);
      prepare_query<K>(p, balance, kv_head, x, residual, scratch, lane);
    }
    for (int i = 0; i < NU; i++) {
      const int at = (r / 8 * K + 32 * i + int(lane)) * 8 + r % 8;
      queries_all[at] = x[i];
      if (has_residual) residual_queries[at] = residual[i];
    }
  }
}

// Of a tile's token t: its number and whether it is there. ids: of a list, less than 0 where a slot names none.
inline int token_at(threadgroup const int* ids, int base, int t) { return has_indices ? ids[t] : base + t; }
inline bool is_there(threadgroup const int* ids, int n, int t) { return has_indices ? ids[t] >= 0 : t < n; }

// The ids of a tile of a list: of n slots from `base` on.
inline void stage_ids(constant AttentionParams& p, const device int* list, Bounds b, int base, int n, threadgroup int* ids,
                      int my_thread, int n_threads) {
  for (int i = my_thread; i < 32; i += n_threads) {
    const int id = i < n ? list[(base + i) * p.indices.last] : -1;
    ids[i] = id >= b.coded_begin && id < b.coded_end ? id : -1;
  }
}

// The means of eight listed tokens' blocks.
template <int K>
inline void stage_listed_means(constant AttentionParams& p, const device uchar* means, threadgroup const int* ids,
                               threadgroup half* half_means, threadgroup float* float_means, int my_thread, int n_threads) {
  for (int i = my_thread; i < 8 * K; i += n_threads) {
    const int id = ids[i / K], d = i % K;
    const bool load = id >= 0 && d < p.head_dim;
    const float mean = load ? mean_at(means, id / kBlockTokens * p.means.token + d * p.means.last) : 0.0f;
    if (means_kind == kMeansHalf) {
      half_means[i] = half(mean);
    } else {
      float_means[i] = mean;
    }
  }
}

// The ids of a tile, and what their blocks' means add to the scores of rows row0 and row1: those of token 8 i + row in
// offsets[i]. The means lie where the tile will.
template <typename T, int K>
inline void stage_list(constant AttentionParams& p, const device int* list, Bounds b, int base, int n, threadgroup int* ids,
                       const device uchar* means, threadgroup uint* tile, const device T* q, int batch, int kv_head, int row0,
                       int row1, int row, int column, bool alone, int my_thread, int n_threads, thread float2* offsets) {
  threadgroup half* half_means = reinterpret_cast<threadgroup half*>(tile);
  threadgroup float* float_means = reinterpret_cast<threadgroup float*>(tile);
  tile_barrier(alone);
  stage_ids(p, list, b, base, n, ids, my_thread, n_threads);
  tile_barrier(alone);
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; i++) {
    offsets[i] = float2(0.0f);
    if (means_kind == kMeansNone) continue;
    stage_listed_means<K>(p, means, ids + 8 * i, half_means, float_means, my_thread, n_threads);
    tile_barrier(alone);
    offsets[i] = stage_offsets<T, K>(p, q, batch, kv_head, row0, row1, half_means, float_means, row, column);
    tile_barrier(alone);
  }
}

// The means of eight blocks from `first` on.
template <int K>
inline void stage_means(constant AttentionParams& p, const device uchar* means, int first, int end,
                        threadgroup half* half_means, threadgroup float* float_means, int my_thread, int n_threads) {
  for (int i = my_thread; i < kStagedBlocks * K; i += n_threads) {
    const int b = first + i / K, d = i % K;
    const bool load = b * kBlockTokens < end && d < p.head_dim;
    const float mean = load ? mean_at(means, b * p.means.token + d * p.means.last) : 0.0f;
    if (means_kind == kMeansHalf) {
      half_means[i] = half(mean);
    } else {
      float_means[i] = mean;
    }
  }
}

// `width` words of each of the tile's n tokens, zeros for those that are not there. step: words from token to token.
inline void stage_words(const device uchar* from, long step, threadgroup const int* ids, int base, int n, int width,
                        threadgroup uint* to, int my_thread, int n_threads) {
  for (int i = my_thread; i < 32 * width; i += n_threads) {
    const device uint* words = reinterpret_cast<const device uint*>(from) + long(token_at(ids, base, i / width)) * step;
    to[i] = is_there(ids, n, i / width) ? words[i % width] : 0u;
  }
}

template <int NP, bool LLOYD>
inline void stage_parameters(constant AttentionParams& p, const device uchar* value_params, threadgroup const int* ids,
                             int base, int n, threadgroup uint* to, int my_thread, int n_threads) {
  for (int i = my_thread; i < 32 * NP; i += n_threads) {
    const long at = token_at(ids, base, i / NP) * p.value_params.token + i % NP;
    const bool there = is_there(ids, n, i / NP);
    uint x = 0u;
    if (there && LLOYD) x = as_type<uint>(float(reinterpret_cast<const device half*>(value_params)[at]));
    if (there && !LLOYD) x = reinterpret_cast<const device uint*>(value_params)[at];
    to[i] = x;
  }
}

// Scores^T of 32 tokens and 8 rows: products of decoded keys with the rows, of signs with the residual rows, which lie
// `residual` numbers behind.
template <int K, int KB>
inline void multiply_keys(threadgroup const uint* key_tile, threadgroup const uint* sign_tile, threadgroup const float* queries,
                          int residual, threadgroup const uchar* lookup, int row, int column, thread simdgroup_float8x8* scores,
                          thread simdgroup_float8x8* residual_scores) {
  constexpr int NU = K / 32, KW = K * KB / 32;
  const int pair = column / 2;
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
        put(b, *reinterpret_cast<threadgroup const float2*>(queries + residual + 8 * (32 * u + 8 * i)));
        for (int rt = 0; rt < 4; rt++) {
          const uint bits = sign_tile[(8 * rt + row) * NU + u] >> uint(8 * i + column);
          put(a, float2((bits & 1u) ? 1.0f : -1.0f, (bits & 2u) ? 1.0f : -1.0f));
          simdgroup_multiply_accumulate(residual_scores[rt], a, b, residual_scores[rt]);
        }
      }
    }
  }
}

// Out^T += V^T P^T for eight tokens: words0 are those of this lane's first one.
template <int V, int VB>
inline void add_lloyd_values(threadgroup const uint* words0, float2 scaled, threadgroup const uchar* value_lookup, int row,
                             thread simdgroup_float8x8* acc) {
  constexpr int NG = V / 32, VW = V * VB / 32;
  simdgroup_float8x8 a, b;
  put(b, scaled);
#pragma clang loop unroll(full)
  for (int u = 0; u < NG; u++) {
    // Byte row / 2 of each word of the unit, of two tokens.
    threadgroup const uchar* bytes = reinterpret_cast<threadgroup const uchar*>(words0 + VB * u) + row / 2;
    uint c[2 * VB];
    for (int i = 0; i < VB; i++) {
      c[i] = bytes[4 * i];
      c[VB + i] = bytes[4 * (VW + i)];
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
      put(a, float2(*reinterpret_cast<threadgroup const float*>(value_lookup + pair_offset<VB>(c, i)),
                    *reinterpret_cast<threadgroup const float*>(value_lookup + pair_offset<VB>(c + VB, i))));
      simdgroup_multiply_accumulate(acc[4 * u + i], a, b, acc[4 * u + i]);
    }
  }
}

// What a group of simdgroups has found for rows row0 and row1.
template <int V, int VB, bool LLOYD>
inline void write_matrix_part(thread simdgroup_float8x8* acc, thread const float2* bias_acc, float2 row_max, float2 row_sum,
                              int row0, int row1, int n_rows, int row, device float* parts, device float* states) {
  for (int k = 0; k < 2; k++) {
    const int r = k ? row1 : row0;
    if (r >= n_rows) continue;
#pragma clang loop unroll(full)
    for (int s = 0; s < V / 8; s++) {
      const float unit = LLOYD ? 1.0f / float(kCodebookTop) : ValueCodes<V, VB>::weight(s);
      parts[long(r) * V + 8 * s + row] = fma(get(acc[s])[k], unit, bias_acc[s / 4][k]);
    }
    if (row == 0) {
      states[long(r) * 2] = row_max[k];
      states[long(r) * 2 + 1] = row_sum[k];
    }
  }
}

template <typename T, int K, int V, int KB, int VB, int VC>
[[kernel, max_total_threads_per_threadgroup(256)]] void turboquant_attention_matrix(
    TQ_ATTENTION_ARGUMENTS, uint n_sg [[simdgroups_per_threadgroup]], threadgroup float* queries_all [[threadgroup(0)]],
    threadgroup uint* tiles [[threadgroup(1)]]) {
  constexpr bool LLOYD = VC == kValueLloyd;
  constexpr bool OWN_TABLE = LLOYD && (VB != KB || V != K);  // else keys and values share one
  constexpr int NU = K / 32, NG = V / 32, NP = LLOYD ? 1 : NG, KW = K * KB / 32, VW = V * VB / 32;
  threadgroup float2 table[256];  // level pair per byte of key codes
  threadgroup float2 value_table[OWN_TABLE ? 256 : 1];
  TQ_ATTENTION_HEAD
  const int n_rows = p.n_rows, n_blocks = p.row_blocks, n_groups = int(n_sg) / n_blocks;
  const int block = int(sg) % n_blocks, group = int(sg) / n_blocks;
  const int n_lists = has_indices ? p.n_lists : 1, list = int(tg.z) % n_lists;
  const int first_row = 8 * n_blocks * (int(tg.z) / n_lists);  // of this threadgroup among those of its list
  const int n_exact = p.n_first + p.n_tail;

  if (int(tg.x) * n_groups >= p.n_ranges) {
    const int range = int(tg.x) - p.n_ranges / n_groups, begin = range * kExactRange;
    const long part = (long(tg.y) * p.n_parts + p.n_ranges + range) * n_rows;
    const int exact_row = 8 * n_blocks * int(tg.z);  // of all rows: these tokens are the same for all lists
    for (int row = exact_row; row < min(n_rows, exact_row + 8 * n_blocks); row += 8) {
      attend_exact<T, K, V, 8>(p, bounds, q, first_keys, first_values, tail_keys, tail_values, mask, batch, kv_head, row,
                               min(8, n_rows - row), begin, min(n_exact, begin + kExactRange),
                               reinterpret_cast<threadgroup float*>(tiles), parts + (part + row) * V, states + (part + row) * 2,
                               tid, sg, lane, n_sg);
    }
    return;
  }

  for (uint b = tid; b < 256; b += 32 * n_sg) {
    table[b] = level_pair<KB>(p.codebook, b);
    if (OWN_TABLE) value_table[b] = level_pair<VB>(p.value_codebook, b);
  }
  // Row r, dimension d at [(r / 8 * K + d) * 8 + r % 8]; the residual queries follow.
  threadgroup float* residual_queries = queries_all + 8 * n_blocks * K;
  stage_matrix_queries<T, K>(p, q, balance, batch, kv_head, list, first_row, n_blocks, queries_all, residual_queries,
                             reinterpret_cast<threadgroup float*>(tiles) + sg * K, sg, lane, n_sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int row = int(lane / 4 & 4u) + int(lane / 2 & 3u), column = int(lane / 4 & 2u) * 2 + int(lane & 1u) * 2;
  threadgroup const float* queries = queries_all + (block * K + row) * 8 + column;
  const int row0 = row_of_list(p, list, first_row + 8 * block + column);
  const int row1 = row_of_list(p, list, first_row + 8 * block + column + 1);
  const int2 limit =
      int2(coded_limit(p, bounds.coded_end, row0 % p.n_queries), coded_limit(p, bounds.coded_end, row1 % p.n_queries));
  const long mask0 = mask_kind != kMaskNone && row0 < n_rows ? mask_row(p, batch, kv_head, row0) : 0;
  const long mask1 = mask_kind != kMaskNone && row1 < n_rows ? mask_row(p, batch, kv_head, row1) : 0;
  const bool skips = mask_kind != kMaskNone || is_causal;

  simdgroup_float8x8 acc[V / 8];
#pragma clang loop unroll(full)
  for (int s = 0; s < V / 8; s++) put(acc[s], float2(0.0f));
  float2 bias_acc[NG];
  for (int g = 0; g < NG; g++) bias_acc[g] = float2(0.0f);
  float2 row_max = float2(-INFINITY), row_sum = float2(0.0f);

  // The tile of this group: key words, value words, value parameters, norms, residual norms, residual signs. Before every
  // sixteenth tile the means of the next eight blocks are in its place.
  threadgroup uint* key_tile = tiles + group * p.group_words;
  threadgroup uint* value_tile = key_tile + 32 * KW;
  threadgroup uint* tile_params = value_tile + 32 * VW;
  threadgroup float* norms = reinterpret_cast<threadgroup float*>(tile_params + 32 * NP);
  threadgroup float* tile_residual_norms = norms + 32;
  threadgroup uint* sign_tile = tile_params + 32 * NP + 64;
  threadgroup const uchar* lookup = reinterpret_cast<threadgroup const uchar*>(table);
  // One level of a pair: that of an even or an odd dimension.
  threadgroup const uchar* value_lookup =
      (OWN_TABLE ? reinterpret_cast<threadgroup const uchar*>(value_table) : lookup) + 4 * (row & 1);

  const int my_thread = block * 32 + int(lane), n_threads = 32 * n_blocks;
  // A share of whole blocks for each group. Every group runs the same number of steps: they share the threadgroup's barriers.
  Range range = coded_range(p, bounds, int(tg.x));
  if (has_indices) {  // slots of the list
    range.begin = min(p.n_listed, int(tg.x) * p.range_tokens);
    range.end = min(p.n_listed, range.begin + p.range_tokens);
    range.block_begin = range.begin;
    indices += batch * p.indices.batch + kv_head * p.indices.head + list * p.indices.token;
  }
  threadgroup int* ids = reinterpret_cast<threadgroup int*>(key_tile + p.group_words - 32);  // behind tile and means
  const int block_tokens = kBlockTokens * n_groups;
  const int share = (range.end - range.block_begin + block_tokens - 1) / block_tokens * kBlockTokens;
  const int begin = range.block_begin + group * share, end = min(range.end, begin + share);
  const int n_tiles = (min(range.end - range.block_begin, share) + 31) / 32;
  float2 block_offsets = float2(0.0f);  // of the block `row` of eight, for this lane's rows
  for (int i_tile = 0; i_tile < n_tiles; i_tile++) {
    const int tile = begin + 32 * i_tile, base = max(tile, range.begin), n = clamp(min(tile + 32, end) - base, 0, 32);
    float2 listed_offsets[4];  // of the tokens of scores[rt]
    if (has_indices) {
      stage_list<T, K>(p, indices, bounds, base, n, ids, means, key_tile, q, batch, kv_head, row0, row1, row, column,
                       n_blocks == 1, my_thread, n_threads, listed_offsets);
    }
    if (!has_indices && means_kind != kMeansNone && i_tile % (2 * kStagedBlocks) == 0) {
      tile_barrier(n_blocks == 1);
      threadgroup half* half_means = reinterpret_cast<threadgroup half*>(key_tile);
      threadgroup float* float_means = reinterpret_cast<threadgroup float*>(key_tile);
      stage_means<K>(p, means, tile / kBlockTokens, end, half_means, float_means, my_thread, n_threads);
      tile_barrier(n_blocks == 1);
      block_offsets = stage_offsets<T, K>(p, q, batch, kv_head, row0, row1, half_means, float_means, row, column);
    }
    tile_barrier(n_blocks == 1);
    stage_words(key_codes, p.key_codes.token, ids, base, n, KW, key_tile, my_thread, n_threads);
    stage_words(value_codes, p.value_codes.token, ids, base, n, VW, value_tile, my_thread, n_threads);
    stage_parameters<NP, LLOYD>(p, value_params, ids, base, n, tile_params, my_thread, n_threads);
    for (int i = my_thread; i < 32; i += n_threads) {
      const int t = token_at(ids, base, i);
      const bool there = is_there(ids, n, i);
      norms[i] = there ? float(key_norms[t * p.key_norms.token]) : 0.0f;
      if (has_residual) tile_residual_norms[i] = there ? float(residual_norms[t * p.residual_norms.token]) : 0.0f;
    }
    if (has_residual) stage_words(key_signs, p.key_signs.token, ids, base, n, NU, sign_tile, my_thread, n_threads);
    tile_barrier(n_blocks == 1);

    simdgroup_float8x8 scores[4], residual_scores[4];
    for (int rt = 0; rt < 4; rt++) {
      put(scores[rt], float2(0.0f));
      put(residual_scores[rt], float2(0.0f));
    }
    multiply_keys<K, KB>(key_tile, sign_tile, queries, 8 * n_blocks * K, lookup, row, column, scores, residual_scores);

    // Lane bits 1, 2 and 4 are the row of a matrix: the block's.
    const int b = i_tile / 2 % kStagedBlocks;
    const ushort from = ushort((b & 4) << 2 | (b & 3) << 1 | int(lane & 9u));
    float2 offset = float2(0.0f);
    if (!has_indices && means_kind != kMeansNone)
      offset = float2(simd_shuffle(block_offsets.x, from), simd_shuffle(block_offsets.y, from));
    float2 weights[4], tile_max = float2(-INFINITY);
    for (int rt = 0; rt < 4; rt++) {
      const int t = 8 * rt + row;
      float2 x = get(scores[rt]) * norms[t] + (has_indices ? listed_offsets[rt] : offset);
      if (has_residual) x = x + get(residual_scores[rt]) * tile_residual_norms[t];
      const bool there = is_there(ids, n, t);
      const int number = token_at(ids, base, t);
      bool live0 = there && number < limit.x, live1 = there && number < limit.y;
      if (mask_kind != kMaskNone) {
        const long at = (p.n_first + number) * p.mask.last;
        const float2 bias = float2(live0 && row0 < n_rows ? mask_bias(mask, mask0 + at) : 0.0f,
                                   live1 && row1 < n_rows ? mask_bias(mask, mask1 + at) : 0.0f);
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
      for (int g = 0; !LLOYD && g < NG; g++) bias_acc[g] = bias_acc[g] * factor;
    }
#pragma clang loop unroll(full)
    for (int rt = 0; rt < 4; rt++) {
      const int t = 8 * rt + row;
      weights[rt] = float2(weights[rt].x == -INFINITY ? 0.0f : fast::exp2(weights[rt].x - row_max.x),
                           weights[rt].y == -INFINITY ? 0.0f : fast::exp2(weights[rt].y - row_max.y));
      row_sum = row_sum + weights[rt];
      threadgroup const uint* words0 = value_tile + (8 * rt + column) * VW;
      threadgroup const uint* words1 = words0 + VW;
      if (LLOYD) {
        const float norm = as_type<float>(tile_params[t]);
        float2 scaled = weights[rt] * norm;
        if (skips) scaled = float2(weights[rt].x == 0.0f ? 0.0f : scaled.x, weights[rt].y == 0.0f ? 0.0f : scaled.y);
        add_lloyd_values<V, VB>(words0, scaled, value_lookup, row, acc);
        continue;
      }
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
  for (int g = 0; !LLOYD && g < NG; g++) bias_acc[g] = row_sums(bias_acc[g]);
  const long part = (long(tg.y) * p.n_parts + int(tg.x) * n_groups + group) * n_rows;
  write_matrix_part<V, VB, LLOYD>(acc, bias_acc, row_max, row_sum, row0, row1, n_rows, row, parts + part * V,
                                  states + part * 2);
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

#define TQ_SPLIT(name, type, k, v, key_bits, value_bits, coding, rows)                 \
  template [[host_name(name)]] [[kernel]]                                              \
  decltype(turboquant_attention_split<type, k, v, key_bits, value_bits, coding, rows>) \
      turboquant_attention_split<type, k, v, key_bits, value_bits, coding, rows>;
#define TQ_MATRIX(name, type, k, v, key_bits, value_bits, coding)                 \
  template [[host_name(name)]] [[kernel]]                                         \
  decltype(turboquant_attention_matrix<type, k, v, key_bits, value_bits, coding>) \
      turboquant_attention_matrix<type, k, v, key_bits, value_bits, coding>;
#define TQ_COMBINE(name, type, v) \
  template [[host_name(name)]] [[kernel]] decltype(turboquant_attention_combine<type, v>) turboquant_attention_combine<type, v>;
