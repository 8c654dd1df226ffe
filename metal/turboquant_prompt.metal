// Attention of many query rows on packed keys and values (format.h): FlashAttention's structure on 8x8 matrices. A threadgroup
// takes a block of 32 or 64 rows and goes through the tokens by tiles; a tile is decoded once for all rows of the block.
//
//   S [8 rows x 8 tokens] = Q K^T, Out [8 rows x 8 dimensions] += P V; a simdgroup has 8 rows, its query and its sums in
//   registers. Above dimension 128 two simdgroups share 8 rows, each with half of the dimensions: they add up their scores.
//
// Coded tokens come first, in the rotated space. Then the sums are rotated back and the exact tokens (first ones, tail) are
// added in the same softmax, with the query as the model has it. Contexts that are split give partial results, which the
// combine kernel of turboquant_attention.metal merges.
//
// Threadgroup memory, bytes; 32768 is the limit:
//   tile     32 tokens (16 above dimension 128) of keys, then of values: codebook levels or codes as halves, exact tokens as
//            they are. 8704 at D = 128 in 16 bits, 16896 in fp32; 8448 and 16640 at D = 256
//   tables   2048, and 2048 more where values have levels of their own
//   the rest norms, parameters and signs of the tile, scores that two simdgroups share: up to 5796
// Work of a simdgroup per tile at D = 128: 128 multiplications of matrices, each with one operand from threadgroup memory (two
// halves a lane; lines are 16 bytes longer than their data, for the banks), 8 exponentials a lane.
//
// - The bytes of the next tile are loaded before the matrices of this one are multiplied.
// - Levels and codes are exact as halves; norms and scales go into scores and weights, in fp32.
// - A value that a row does not attend to must not reach it, NaN or not: scales and norms are on the side of the weights, and
//   a tile of exact values that are not all finite is added without matrices.
// - The biases of value groups are one more product of matrices: eight groups at most.
#include "attention.h"

// Value groups, as code - kMiddle: sums of codes and of biases that are not centred would grow with the tokens and cancel in
// the end. A thread takes the same 16 bits of two neighbouring words: pairs of dimensions.
template <int BITS, int UNITS, int TOKENS, int THREADS>
struct CodeTile {
  static constant constexpr float kMiddle = 0.5f * float((1 << BITS) - 1);
  static constant constexpr int kWords = UNITS * BITS, kStep = THREADS / kWords;
  static constant constexpr int kEach = (TOKENS + kStep - 1) / kStep, kHeld = kEach;

  static inline void load(const device uchar* codes, long token_bytes, int tile, int begin, int end, int tid,
                          thread uint* held) {
    const int first = tile + tid / kWords, part = tid % kWords;
    codes += first * token_bytes + 8 * (part / 2) + 2 * (part % 2);
#pragma clang loop unroll(full)
    for (int k = 0; k < kEach; k++) {
      const int t = first + kStep * k;
      const bool has = tid < kStep * kWords && t < tile + TOKENS && t >= begin && t < end;
      const device ushort* from = reinterpret_cast<const device ushort*>(codes + kStep * k * token_bytes);
      held[k] = has ? uint(from[0]) | uint(from[2]) << 16 : 0u;
    }
  }

  static inline void store(thread const uint* held, threadgroup half* tile, int line, threadgroup const uchar*, int tid) {
    constexpr uint mask = (1u << BITS) - 1u;
    const int first = tid / kWords, part = tid % kWords;
    threadgroup half* to = tile + first * line + kWords * (16 / BITS) * (part % 2) + 2 * (part / 2);
#pragma clang loop unroll(full)
    for (int k = 0; k < kEach; k++) {
      if (tid >= kStep * kWords || first + kStep * k >= TOKENS) continue;
      for (int s = 0; s < 16 / BITS; s++) {
        // 1024 + code as a half, twice.
        const uint codes = (held[k] >> uint(BITS * s) & (mask | mask << 16)) | 0x64006400u;
        *reinterpret_cast<threadgroup half2*>(to + kStep * k * line + kWords * s) =
            as_type<half2>(codes) - half2(half(1024.0f)) - half2(half(kMiddle));
      }
    }
  }
};

template <int CODING, typename Groups, typename Lloyd>
struct ChooseTile {
  typedef Groups type;
};
template <typename Groups, typename Lloyd>
struct ChooseTile<kValueLloyd, Groups, Lloyd> {
  typedef Lloyd type;
};

// Keys or values of tokens [tile, end), at most TOKENS of them, with zeros for what is not stored. Whether a thread met a
// number that is not finite.
template <typename T, int DIM, int LINE, int TOKENS, int THREADS>
inline bool stage_exact(const device T* first, const device T* tail, constant Strides4& first_strides,
                        constant Strides4& tail_strides, constant AttentionParams& p, Bounds b, int dim, int begin, int end,
                        threadgroup T* tile, int tid) {
  constexpr int step = THREADS / DIM;  // tokens at a time
  static_assert(step >= 1, "a thread for every dimension");
  const int d = tid % DIM;
  first += d * first_strides.last;
  tail += d * tail_strides.last;
  bool odd = false;
#pragma clang loop unroll_count(4)
  for (int i = tid / DIM; i < TOKENS; i += step) {
    if (tid >= step * DIM) continue;
    const int e = begin + i;
    T x = T(0.0f);
    if (e < end && d < dim && is_stored(p, b, e)) {
      x = e < p.n_first ? first[e * first_strides.token] : tail[(e - p.n_first) * tail_strides.token];
    }
    tile[i * LINE + d] = x;
    odd = odd || (as_type<uint>(float(x)) & 0x7f800000u) == 0x7f800000u;
  }
  return odd;
}

// Sum or maximum over the columns of a matrix: lane bits 0 and 3.
inline float column_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}
inline float column_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}

// The lane of the same row that holds columns `column` and its neighbour.
inline ushort lane_of_column(uint lane, int column) {
  return ushort(int(lane & 22u) | (column >> 1 & 1) | (column >> 2 & 1) << 3);
}

// What the means of eight blocks add to the scores of a row: those of blocks column and column + 1 on this lane.
template <typename T, int K>
inline float2 mean_offsets(constant AttentionParams& p, const device T* query, bool has_row, threadgroup const half* half_means,
                           threadgroup const float* float_means, int row, int column) {
  simdgroup_float8x8 a, b, sum;
  put(sum, float2(0.0f));
#pragma clang loop unroll(disable)
  for (int s = 0; s < K / 8; s++) {
    const int d = 8 * s + column, at = column * K + 8 * s + row;
    put(a, float2(has_row && d < p.head_dim ? float(query[d * p.q.last]) : 0.0f,
                  has_row && d + 1 < p.head_dim ? float(query[(d + 1) * p.q.last]) : 0.0f));
    if (means_kind == kMeansHalf) {
      put(b, float2(float(half_means[at]), float(half_means[at + K])));
    } else {
      put(b, float2(float_means[at], float_means[at + K]));
    }
    simdgroup_multiply_accumulate(sum, a, b, sum);
  }
  return get(sum) * p.score_scale;
}

// A row that the lanes hold as rotate_row() does becomes a row of matrices: elements from dimension `first` on of those lanes
// that have it.
template <int K, int N>
inline void keep_row(threadgroup float* scratch, thread const float* x, thread simdgroup_float8x8* matrices, bool mine,
                     int first, uint lane) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < K / 32; i++) scratch[32 * i + int(lane)] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
  for (int i = 0; i < N; i++) {
    const int d = first + 8 * i;
    const float2 old = get(matrices[i]);
    const float2 y = d < K ? *reinterpret_cast<threadgroup const float2*>(scratch + d) : float2(0.0f);
    put(matrices[i], float2(mine ? y.x : old.x, mine ? y.y : old.y));
  }
}

// What a thread holds of a tile of keys beside their codes: the norms of a token, a word of signs.
struct KeySide {
  float norm, residual_norm;
  uint signs;
};
template <int UNITS, int TOKENS>
inline KeySide load_key_side(constant AttentionParams& p, const device half* key_norms, const device half* residual_norms,
                             const device uchar* key_signs, int tile, Range range, int tid) {
  KeySide side;
  const int t = tile + tid;
  const bool has = tid < TOKENS && t >= range.begin && t < range.end;
  side.norm = has ? float(key_norms[t * p.key_norms.token]) : 0.0f;
  side.residual_norm = has && has_residual ? float(residual_norms[t * p.residual_norms.token]) : 0.0f;
  const int signs_t = tile + tid / UNITS;
  const bool has_signs = has_residual && tid < TOKENS * UNITS && signs_t >= range.begin && signs_t < range.end;
  const device uint* words = reinterpret_cast<const device uint*>(key_signs) + signs_t * p.key_signs.token;
  side.signs = has_signs ? words[tid % UNITS] : 0u;
  return side;
}

// A lane's place: its simdgroup, that one's part of the dimensions, and the elements of matrices that the lane holds
// (attention.h).
struct Place {
  int part, row, column;
  uint sg, lane;
};

// What an instance's parameters decide.
template <typename T, int KEY_DIM, int VALUE_DIM, int KEY_BITS, int VALUE_BITS, int VC, int ROWS>
struct PromptShape {
  static constant constexpr int K = KEY_DIM, V = VALUE_DIM, KB = KEY_BITS, VB = VALUE_BITS;
  static constant constexpr bool LLOYD = VC == kValueLloyd;
  static constant constexpr bool OWN_TABLE = LLOYD && (VB != KB || V != K);  // else keys and values share one
  static constant constexpr int D = largest(K, V);
  static constant constexpr int S = D > kPromptDim ? 2 : 1;           // simdgroups that share rows
  static constant constexpr int NSG = ROWS / 8 * S, NT = 32 * NSG;    // simdgroups, threads
  static constant constexpr int TT = S == 2 ? 16 : 32, NF = TT / 8;   // tokens of a tile, matrices of them
  static constant constexpr int NU = K / 32, NUS = (NU + S - 1) / S;  // units of a key, those of a simdgroup
  static constant constexpr int NG = V / 32, NGS = (NG + S - 1) / S;  // groups of a value, those of a simdgroup
  static constant constexpr int NP = LLOYD ? 1 : NG;                  // words of value parameters per token
  static constant constexpr int KL = K + 8, VL = V + 8;               // lines of coded tiles, in halves
  static constant constexpr int SIZE = int(sizeof(T)), PAD = 16 / SIZE, KE = K + PAD, VE = V + PAD;  // of exact ones
  static constant constexpr int TILE =
      largest(largest(TT * (2 * D + 16), (SIZE * D + 16) * TT), largest(4 * NSG * D, 4 * kStagedBlocks * K));  // bytes
  typedef LevelTile<KB, NU, TT, NT> KeyTile;
  typedef typename ChooseTile<VC, CodeTile<VB, NG, TT, NT>, LevelTile<VB, NG, TT, NT>>::type ValueTile;
  static_assert(NT <= 256 && TT * NP <= NT && TT * NU <= NT, "a thread stages one parameter, one word of signs");
};

// Two levels as halves for every byte of codes.
template <typename X>
inline void fill_tables(constant AttentionParams& p, threadgroup uint* table, threadgroup uint* value_table, int thread_id) {
  constexpr bool OWN_TABLE = X::OWN_TABLE;
  constexpr int KB = X::KB, VB = X::VB, NT = X::NT;
  for (int b = thread_id; b < 256; b += NT) {
    const uint entry = as_type<uint>(half2(level_pair<KB>(p.codebook, uint(b))));
    table[2 * b] = entry;
    table[2 * b + 1] = entry;
    if (OWN_TABLE) {
      const uint value_entry = as_type<uint>(half2(level_pair<VB>(p.value_codebook, uint(b))));
      value_table[2 * b] = value_entry;
      value_table[2 * b + 1] = value_entry;
    }
  }
}

// A simdgroup's eight rows as matrices: the queries for coded keys. scratch: K numbers.
template <typename T, typename X>
inline void keep_queries(constant AttentionParams& p, const device T* q, const device float* balance, int batch, int kv_head,
                         int simd_row, int n_rows, threadgroup float* scratch, thread simdgroup_float8x8* queries,
                         thread simdgroup_float8x8* residual_queries, Place place) {
  constexpr int K = X::K, NU = X::NU, NUS = X::NUS;
  const int part = place.part, row = place.row, column = place.column;
  const uint lane = place.lane;
#pragma clang loop unroll(disable)
  for (int r = 0; r < 8; r++) {
    float x[NU], residual[NU];
    for (int i = 0; i < NU; i++) x[i] = residual[i] = 0.0f;
    if (simd_row + r < n_rows) {
      load_query<T, K>(p, q, batch, kv_head, simd_row + r, x, lane);
      prepare_query<K>(p, balance, kv_head, x, residual, scratch, lane);
    }
    keep_row<K, 4 * NUS>(scratch, x, queries, row == r, 32 * NUS * part + column, lane);
    if (has_residual) keep_row<K, 4 * NUS>(scratch, residual, residual_queries, row == r, 32 * NUS * part + column, lane);
  }
}

// Means of eight blocks from `block` on, as halves in `tile` or as floats in `numbers`: [block][K].
template <typename X>
inline void stage_block_means(constant AttentionParams& p, const device uchar* means, int block, int end,
                              threadgroup half* tile, threadgroup float* numbers, int thread_id) {
  constexpr int K = X::K, NT = X::NT;
  for (int i = thread_id; i < kStagedBlocks * K; i += NT) {
    const int b = block + i / K, d = i % K;
    const bool load = b * kBlockTokens < end && d < p.head_dim;
    const float mean = load ? mean_at(means, b * p.means.token + d * p.means.last) : 0.0f;
    if (means_kind == kMeansHalf) {
      tile[i] = half(mean);
    } else {
      numbers[i] = mean;
    }
  }
}

// What a thread holds of a tile of values beside their codes: a norm, or scale and bias of a group.
template <typename X>
inline uint load_value_side(constant AttentionParams& p, const device uchar* value_params, int tile_begin, Range range,
                            int thread_id) {
  constexpr bool LLOYD = X::LLOYD;
  constexpr int TT = X::TT, NP = X::NP;
  const int t = tile_begin + thread_id / NP;
  const bool has = thread_id < TT * NP && t >= range.begin && t < range.end;
  const long at = t * p.value_params.token + thread_id % NP;
  uint held = 0u;
  if (has && LLOYD) held = uint(reinterpret_cast<const device ushort*>(value_params)[at]);
  if (has && !LLOYD) held = reinterpret_cast<const device uint*>(value_params)[at];
  return held;
}

// Scores of coded tokens become complete, -inf where the row does not attend. Returns the lane's largest one.
template <typename X>
inline float mask_coded(constant AttentionParams& p, const device uchar* mask, long my_mask, threadgroup const float2* partial,
                        float offset, int tile_begin, int begin, int limit, thread float2* weights, Place place) {
  constexpr int S = X::S, NF = X::NF;
  const int column = place.column;
  const uint sg = place.sg, lane = place.lane;
  float tile_max = -INFINITY;
  for (int f = 0; f < NF; f++) {
    const int t = tile_begin + 8 * f + column;
    float2 x = weights[f];
    if (S == 2) x = x + partial[((int(sg) ^ 1) * NF + f) * 32 + int(lane)];
    x = x + float2(offset);
    bool live0 = t >= begin && t < limit, live1 = t + 1 >= begin && t + 1 < limit;
    if (mask_kind != kMaskNone) {
      const long at = my_mask + (p.n_first + t) * p.mask.last;
      const float2 bias = float2(live0 ? mask_bias(mask, at) : 0.0f, live1 ? mask_bias(mask, at + p.mask.last) : 0.0f);
      live0 = live0 && bias.x != -INFINITY;
      live1 = live1 && bias.y != -INFINITY;
      x = x + bias;
    }
    weights[f] = float2(live0 ? x.x : -INFINITY, live1 ? x.y : -INFINITY);
    tile_max = max(tile_max, max(weights[f].x, weights[f].y));
  }
  return tile_max;
}

// Scores become weights, relative to the running maximum, and are added to their sum.
template <int NF>
inline void weigh_scores(thread float2* weights, float row_max, thread float& row_sum) {
  for (int f = 0; f < NF; f++) {
    weights[f] = float2(weights[f].x == -INFINITY ? 0.0f : fast::exp2(weights[f].x - row_max),
                        weights[f].y == -INFINITY ? 0.0f : fast::exp2(weights[f].y - row_max));
    row_sum += weights[f].x + weights[f].y;
  }
}

// Adds a tile of coded values. skips: tokens may have a weight of zero, and then nothing of theirs is added.
template <typename X>
inline void add_coded_values(threadgroup const half* tile, threadgroup const float* tile_scales,
                             threadgroup const float* tile_biases, thread const float2* weights, bool skips,
                             thread simdgroup_float8x8* acc, thread simdgroup_float8x8& bias_acc, Place place) {
  constexpr bool LLOYD = X::LLOYD;
  constexpr int NF = X::NF, NG = X::NG, NGS = X::NGS, NP = X::NP, VL = X::VL;
  const int part = place.part, row = place.row, column = place.column;
#pragma clang loop unroll(full)
  for (int f = 0; f < NF; f++) {
    const int t = 8 * f + column;
    const bool none0 = skips && weights[f].x == 0.0f, none1 = skips && weights[f].y == 0.0f;
    threadgroup const half* values = tile + (8 * f + row) * VL + column;
    simdgroup_float8x8 a, b;
    if (LLOYD) {
      const float2 scaled = weights[f] * float2(tile_scales[t], tile_scales[t + 1]);
      put(a, float2(none0 ? 0.0f : scaled.x, none1 ? 0.0f : scaled.y));
    } else {
      threadgroup const float* biases = tile_biases + (8 * f + row) * NP;
      const float bias0 = biases[min(column, NG - 1)], bias1 = biases[min(column + 1, NG - 1)];
      put(a, weights[f]);
      put(b, float2(column < NG ? bias0 : 0.0f, column + 1 < NG ? bias1 : 0.0f));
      simdgroup_multiply_accumulate(bias_acc, a, b, bias_acc);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < NGS; i++) {
      const int g = NGS * part + i;
      if (g >= NG) continue;
      simdgroup_barrier(mem_flags::mem_none);
      if (!LLOYD) {
        const float2 scaled = weights[f] * float2(tile_scales[t * NP + g], tile_scales[(t + 1) * NP + g]);
        put(a, float2(none0 ? 0.0f : scaled.x, none1 ? 0.0f : scaled.y));
      }
#pragma clang loop unroll(full)
      for (int j = 0; j < 4; j++) {
        const half2 x = *reinterpret_cast<threadgroup const half2*>(values + 32 * g + 8 * j);
        put(b, float2(float(x.x), float(x.y)));
        simdgroup_multiply_accumulate(acc[4 * i + j], a, b, acc[4 * i + j]);
      }
    }
  }
}

// Sums of levels or codes become sums of values.
template <typename X>
inline void finish_coded_values(thread simdgroup_float8x8* acc, thread simdgroup_float8x8& bias_acc, Place place) {
  constexpr bool LLOYD = X::LLOYD;
  constexpr int NG = X::NG, NGS = X::NGS;
  const int part = place.part;
  const uint lane = place.lane;
  constexpr float unit = LLOYD ? 1.0f / float(kCodebookTop) : 1.0f;
  for (int i = 0; i < NGS; i++) {
    float bias = 0.0f;
    if (!LLOYD) {
      const int g = min(NGS * part + i, NG - 1);
      const float2 biases = get(bias_acc);
      bias = simd_shuffle((g & 1) ? biases.y : biases.x, lane_of_column(lane, g));
    }
    for (int j = 0; j < 4; j++) put(acc[4 * i + j], get(acc[4 * i + j]) * unit + float2(bias));
  }
}

template <typename X>
inline void rotate_sums_back(constant AttentionParams& p, threadgroup float* numbers, thread simdgroup_float8x8* acc,
                             Place place) {
  constexpr int V = X::V, S = X::S, NG = X::NG, NGS = X::NGS;
  const int part = place.part, row = place.row, column = place.column;
  const uint sg = place.sg, lane = place.lane;
  // S rows at a time: their simdgroups write what they have of a row, one of them rotates it.
  threadgroup float* rows = numbers + int(sg) / S * S * V;
  threadgroup float* own = rows + part * V;
#pragma clang loop unroll(disable)
  for (int first = 0; first < 8; first += S) {
    threadgroup float* mine = rows + (row - first) * V + 32 * NGS * part + column;
    const bool turn = row >= first && row < first + S;
#pragma clang loop unroll(full)
    for (int i = 0; i < 4 * NGS; i++) {
      if (turn && 32 * NGS * part + 8 * i < V) *reinterpret_cast<threadgroup float2*>(mine + 8 * i) = get(acc[i]);
    }
    tile_barrier(S == 1);
    float x[NG];
    for (int i = 0; i < NG; i++) x[i] = own[32 * i + int(lane)];
    rotate_row_back<V>(x, TQ_ROTATION_SEED, p.value_rotation_scale, own, lane);
    for (int i = 0; i < NG; i++) own[32 * i + int(lane)] = x[i];
    tile_barrier(S == 1);
#pragma clang loop unroll(full)
    for (int i = 0; i < 4 * NGS; i++) {
      if (turn && 32 * NGS * part + 8 * i < V) put(acc[i], *reinterpret_cast<threadgroup const float2*>(mine + 8 * i));
    }
    tile_barrier(S == 1);
  }
}

// The queries as the model has them, for exact tokens.
template <typename T, typename X>
inline void keep_exact_queries(constant AttentionParams& p, const device T* query, bool has_row,
                               thread simdgroup_float8x8* queries, Place place) {
  constexpr int NUS = X::NUS;
  const int part = place.part, column = place.column;
#pragma clang loop unroll(full)
  for (int i = 0; i < 4 * NUS; i++) {
    const int d = 32 * NUS * part + 8 * i + column;
    const float2 x = float2(has_row && d < p.head_dim ? float(query[d * p.q.last]) : 0.0f,
                            has_row && d + 1 < p.head_dim ? float(query[(d + 1) * p.q.last]) : 0.0f);
    put(queries[i], x * p.score_scale);
  }
}

// Scores of a tile of exact keys; where two simdgroups share rows, half of them, in `partial` too.
template <typename T, typename X>
inline void score_exact_keys(threadgroup const T* exact_tile, thread simdgroup_float8x8* queries, threadgroup float2* partial,
                             thread float2* weights, Place place) {
  constexpr int K = X::K, S = X::S, NF = X::NF, NUS = X::NUS, KE = X::KE;
  const int part = place.part, row = place.row, column = place.column;
  const uint sg = place.sg, lane = place.lane;
  simdgroup_float8x8 scores[NF];
  for (int f = 0; f < NF; f++) put(scores[f], float2(0.0f));
#pragma clang loop unroll(full)
  for (int i = 0; i < 4 * NUS; i++) {
    const int d = 32 * NUS * part + 8 * i;
    if (d >= K) continue;
    simdgroup_barrier(mem_flags::mem_none);  // loads stay with their products: fewer registers
#pragma clang loop unroll(full)
    for (int f = 0; f < NF; f++) {
      simdgroup_float8x8 b;
      threadgroup const T* from = exact_tile + (8 * f + column) * KE + d + row;
      put(b, float2(float(from[0]), float(from[KE])));
      simdgroup_multiply_accumulate(scores[f], queries[i], b, scores[f]);
    }
  }
  for (int f = 0; f < NF; f++) {
    weights[f] = get(scores[f]);
    if (S == 2) partial[(int(sg) * NF + f) * 32 + int(lane)] = weights[f];
  }
}

// mask_coded for exact tokens. seen: the last column that the row attends to, -1 for none.
template <typename X>
inline float mask_exact(constant AttentionParams& p, Bounds bounds, const device uchar* mask, long my_mask,
                        threadgroup const float2* partial, int tile_begin, int end, int seen, thread float2* weights,
                        Place place) {
  constexpr int S = X::S, NF = X::NF;
  const int column = place.column;
  const uint sg = place.sg, lane = place.lane;
  float tile_max = -INFINITY;
  for (int f = 0; f < NF; f++) {
    float2 x = weights[f];
    if (S == 2) x = x + partial[((int(sg) ^ 1) * NF + f) * 32 + int(lane)];
#pragma clang loop unroll(full)
    for (int k = 0; k < 2; k++) {
      const int e = tile_begin + 8 * f + column + k, at = e < p.n_first ? e : p.n_coded + e;
      bool live = e < end && at <= seen && is_stored(p, bounds, e);
      if (mask_kind != kMaskNone && live) {
        const float bias = mask_bias(mask, my_mask + at * p.mask.last);
        live = bias != -INFINITY;
        x[k] += bias;
      }
      x[k] = live ? x[k] : -INFINITY;
    }
    weights[f] = x;
    tile_max = max(tile_max, max(x.x, x.y));
  }
  return tile_max;
}

// add_exact_values without matrices: a number that is not finite reaches only rows with a weight for it.
template <typename T, typename X>
inline void add_spoilt_values(threadgroup const T* exact_tile, thread const float2* weights, thread simdgroup_float8x8* acc,
                              Place place) {
  constexpr int V = X::V, NF = X::NF, NGS = X::NGS, VE = X::VE;
  const int part = place.part, column = place.column;
  const uint lane = place.lane;
#pragma clang loop unroll(full)
  for (int f = 0; f < NF; f++) {
#pragma clang loop unroll(disable)
    for (int t = 0; t < 8; t++) {
      const float weight = simd_shuffle((t & 1) ? weights[f].y : weights[f].x, lane_of_column(lane, t));
      threadgroup const T* values = exact_tile + (8 * f + t) * VE + 32 * NGS * part + column;
#pragma clang loop unroll(full)
      for (int i = 0; i < 4 * NGS; i++) {
        if (32 * NGS * part + 8 * i >= V || weight == 0.0f) continue;
        put(acc[i], get(acc[i]) + weight * float2(float(values[8 * i]), float(values[8 * i + 1])));
      }
    }
  }
}

template <typename T, typename X>
inline void add_exact_values(threadgroup const T* exact_tile, thread const float2* weights, thread simdgroup_float8x8* acc,
                             Place place) {
  constexpr int V = X::V, NF = X::NF, NGS = X::NGS, VE = X::VE;
  const int part = place.part, row = place.row, column = place.column;
#pragma clang loop unroll(full)
  for (int f = 0; f < NF; f++) {
    simdgroup_float8x8 a, b;
    put(a, weights[f]);
    threadgroup const T* values = exact_tile + (8 * f + row) * VE + 32 * NGS * part + column;
#pragma clang loop unroll(full)
    for (int i = 0; i < 4 * NGS; i++) {
      if (32 * NGS * part + 8 * i >= V) continue;
      put(b, float2(float(values[8 * i]), float(values[8 * i + 1])));
      simdgroup_multiply_accumulate(acc[i], a, b, acc[i]);
    }
  }
}

// A row's part of a split context, for the combine kernel: the sums in the rotated space, their state.
template <typename X>
inline void write_prompt_part(device float* parts, device float* states, long at, float row_max, float row_sum,
                              thread simdgroup_float8x8* acc, Place place) {
  constexpr int V = X::V, NGS = X::NGS;
  const int part = place.part, column = place.column;
#pragma clang loop unroll(full)
  for (int i = 0; i < 4 * NGS; i++) {
    const int d = 32 * NGS * part + 8 * i + column;
    if (d >= V) continue;
    const float2 y = get(acc[i]);
    parts[at * V + d] = y.x;
    parts[at * V + d + 1] = y.y;
  }
  if (part == 0 && column == 0) {
    states[2 * at] = row_max;
    states[2 * at + 1] = row_sum;
  }
}

// A row of the output, divided by the sum of its weights. sink: a score without a value, or -inf.
template <typename T, typename X>
inline void write_prompt_row(device T* to, int value_dim, float row_max, float row_sum, float sink,
                             thread simdgroup_float8x8* acc, Place place) {
  constexpr int NGS = X::NGS;
  const int part = place.part, column = place.column;
  const float all_max = max(row_max, sink);
  const float factor = rescale(row_max, all_max);
  const float all_sum = row_sum * factor + (sink == -INFINITY ? 0.0f : rescale(sink, all_max));
  const float inverse = all_sum == 0.0f ? 0.0f : factor / all_sum;
#pragma clang loop unroll(full)
  for (int i = 0; i < 4 * NGS; i++) {
    const int d = 32 * NGS * part + 8 * i + column;
    const float2 y = get(acc[i]) * inverse;
    if (d < value_dim) to[d] = T(y.x);
    if (d + 1 < value_dim) to[d + 1] = T(y.y);
  }
}

template <typename T, int K, int V, int KB, int VB, int VC, int ROWS>
[[kernel, max_total_threads_per_threadgroup(256)]] void turboquant_attention_prompt(TQ_ATTENTION_ARGUMENTS) {
  typedef PromptShape<T, K, V, KB, VB, VC, ROWS> X;
  typedef typename X::KeyTile KeyTile;
  typedef typename X::ValueTile ValueTile;
  constexpr bool LLOYD = X::LLOYD, OWN_TABLE = X::OWN_TABLE;
  constexpr int S = X::S, NSG = X::NSG, NT = X::NT, TT = X::TT, NF = X::NF, NU = X::NU, NUS = X::NUS, NGS = X::NGS;
  constexpr int NP = X::NP, NG = X::NG, KL = X::KL, VL = X::VL, KE = X::KE, VE = X::VE, TILE = X::TILE;

  threadgroup float4 tile_memory[TILE / 16];
  threadgroup uint table[512];  // half2 per byte of key codes, twice: odd and even lanes use different banks
  threadgroup uint value_table[OWN_TABLE ? 512 : 1];
  threadgroup float norms[TT], tile_residual_norms[TT];
  threadgroup float tile_scales[TT * NP],
      tile_biases[LLOYD ? 1 : TT * NP];  // norms of the tile's values, or groups' parameters
  threadgroup uint sign_tile[TT * NU];
  threadgroup float2 partial[S == 2 ? NSG * NF * 32 : 1];
  threadgroup uint spoilt[NSG];
  static_assert(
      TILE + 2048 * (OWN_TABLE ? 2 : 1) + 8 * TT + 4 * TT * (2 * NP + NU) + (S == 2 ? NSG * NF * 256 : 8) + 4 * NSG <= 32768,
      "threadgroup memory");
  threadgroup half* tile = reinterpret_cast<threadgroup half*>(tile_memory);
  threadgroup T* exact_tile = reinterpret_cast<threadgroup T*>(tile_memory);
  threadgroup float* numbers = reinterpret_cast<threadgroup float*>(tile_memory);
  TQ_ATTENTION_HEAD
  const int n_rows = p.n_rows, n_exact = p.n_first + p.n_tail, thread_id = int(tid);
  const int part = int(sg) % S, first_row = ROWS * int(tg.z), simd_row = first_row + 8 * (int(sg) / S);
  const bool works = simd_row < n_rows;  // else the simdgroup only stages
  const int row = int(lane / 4 & 4u) + int(lane / 2 & 3u), column = int(lane / 4 & 2u) * 2 + int(lane & 1u) * 2;
  const Place place = {part, row, column, sg, lane};
  const int my_row = simd_row + row, my_head = kv_head * (n_rows / p.n_queries) + my_row / p.n_queries;
  const int my_query = my_row % p.n_queries;
  const bool has_row = my_row < n_rows;
  const device T* query = q + batch * p.q.batch + my_head * p.q.head + my_query * p.q.token;
  const long my_mask = mask_kind != kMaskNone && has_row ? mask_row(p, batch, kv_head, my_row) : 0;
  const bool skips = mask_kind != kMaskNone || is_causal;
  // The query that sees most of the block's.
  const int last_row = min(n_rows, first_row + ROWS) - 1;
  const int last_query = last_row / p.n_queries == first_row / p.n_queries ? last_row % p.n_queries : p.n_queries - 1;

  simdgroup_float8x8 queries[4 * NUS], residual_queries[4 * NUS], acc[4 * NGS];
  simdgroup_float8x8 bias_acc;                // a column per value group
  float row_max = -INFINITY, row_sum = 0.0f;  // of my_row; the sum is this lane's share
#pragma clang loop unroll(full)
  for (int i = 0; i < 4 * NGS; i++) put(acc[i], float2(0.0f));
  put(bias_acc, float2(0.0f));

  Range range = coded_range(p, bounds, is_direct ? 0 : int(tg.x));
  range.end = max(range.begin, coded_limit(p, range.end, last_query));
  if (p.n_coded == 0 || (!is_direct && int(tg.x) >= p.n_ranges)) range.end = range.begin;

  // --- coded tokens
  if (range.begin < range.end) {
    fill_tables<X>(p, table, value_table, thread_id);
    threadgroup float* scratch = numbers + int(sg) * K;
    keep_queries<T, X>(p, q, balance, batch, kv_head, simd_row, n_rows, scratch, queries, residual_queries, place);
    const uint bank = 4 * (lane & 1u);
    threadgroup const uchar* lookup = reinterpret_cast<threadgroup const uchar*>(table) + bank;
    threadgroup const uchar* value_lookup = OWN_TABLE ? reinterpret_cast<threadgroup const uchar*>(value_table) + bank : lookup;
    const long key_bytes = 4 * p.key_codes.token, value_bytes = 4 * p.value_codes.token;
    const int limit = has_row ? coded_limit(p, range.end, my_query) : 0;

    // What a thread holds of the next tile.
    const int start = range.begin / TT * TT;
    uint key_held[KeyTile::kHeld], value_held[ValueTile::kHeld], held_params = 0u;
    KeyTile::load(key_codes, key_bytes, start, range.begin, range.end, thread_id, key_held);
    KeySide held_side = load_key_side<NU, TT>(p, key_norms, residual_norms, key_signs, start, range, thread_id);
    float2 offsets = float2(0.0f);  // of blocks column and column + 1 of the eight from first_block on
    int first_block = -kStagedBlocks;
#pragma clang loop unroll(disable)
    for (int tile_begin = start; tile_begin < range.end; tile_begin += TT) {
      const int block = tile_begin / kBlockTokens;
      if (means_kind != kMeansNone && block >= first_block + kStagedBlocks) {
        first_block = block;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage_block_means<X>(p, means, block, range.end, tile, numbers, thread_id);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (works) offsets = mean_offsets<T, K>(p, query, has_row, tile, numbers, row, column);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      KeyTile::store(key_held, tile, KL, lookup, thread_id);
      if (thread_id < TT) {
        norms[thread_id] = held_side.norm;
        if (has_residual) tile_residual_norms[thread_id] = held_side.residual_norm;
      }
      if (has_residual && thread_id < TT * NU) sign_tile[thread_id] = held_side.signs;
      threadgroup_barrier(mem_flags::mem_threadgroup);

      ValueTile::load(value_codes, value_bytes, tile_begin, range.begin, range.end, thread_id, value_held);
      held_params = load_value_side<X>(p, value_params, tile_begin, range, thread_id);

      float2 weights[NF];
      for (int f = 0; f < NF; f++) weights[f] = float2(0.0f);
      if (works) {
        simdgroup_float8x8 scores[NF], residual_scores[NF];
        for (int f = 0; f < NF; f++) {
          put(scores[f], float2(0.0f));
          put(residual_scores[f], float2(0.0f));
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < 4 * NUS; i++) {
          const int d = 32 * NUS * part + 8 * i;
          if (d >= K) continue;
          simdgroup_barrier(mem_flags::mem_none);  // loads stay with their products: fewer registers
#pragma clang loop unroll(full)
          for (int f = 0; f < NF; f++) {
            simdgroup_float8x8 b;
            threadgroup const half* from = tile + (8 * f + column) * KL + d + row;
            put(b, float2(float(from[0]), float(from[KL])));
            simdgroup_multiply_accumulate(scores[f], queries[i], b, scores[f]);
            if (has_residual) {
              threadgroup const uint* words = sign_tile + (8 * f + column) * NU + d / 32;
              const uint bit = uint(d % 32 + row);
              put(b, float2((words[0] >> bit & 1u) ? 1.0f : -1.0f, (words[NU] >> bit & 1u) ? 1.0f : -1.0f));
              simdgroup_multiply_accumulate(residual_scores[f], residual_queries[i], b, residual_scores[f]);
            }
          }
        }
        for (int f = 0; f < NF; f++) {
          const int t = 8 * f + column;
          weights[f] = get(scores[f]) * float2(norms[t], norms[t + 1]);
          if (has_residual) {
            weights[f] = weights[f] + get(residual_scores[f]) * float2(tile_residual_norms[t], tile_residual_norms[t + 1]);
          }
          if (S == 2) partial[(int(sg) * NF + f) * 32 + int(lane)] = weights[f];
        }
      }
      // Keys are done with; the partner's scores are there.
      threadgroup_barrier(mem_flags::mem_threadgroup);
      ValueTile::store(value_held, tile, VL, value_lookup, thread_id);
      // As a function of its own this took 256 registers instead of 157 (clang for gfx1030, D = 128); the products of keys
      // above and the new maximum below took up to three more.
      if (thread_id < TT * NP) {
        const half2 params = as_type<half2>(held_params);
        if (LLOYD) {
          tile_scales[thread_id] = float(params.x);
        } else {
          // A bias that is not finite would reach every row by its product of matrices; a scale does not.
          const float bias = fma(CodeTile<VB, NG, TT, NT>::kMiddle, float(params.x), float(params.y));
          const bool finite = (as_type<uint>(bias) & 0x7f800000u) != 0x7f800000u;
          tile_scales[thread_id] = finite ? float(params.x) : NAN;
          tile_biases[thread_id] = finite ? bias : 0.0f;
        }
      }

      if (works) {
        float offset = 0.0f;
        if (means_kind != kMeansNone) {
          const int b = block - first_block;
          offset = simd_shuffle((b & 1) ? offsets.y : offsets.x, lane_of_column(lane, b));
        }
        const float tile_max = mask_coded<X>(p, mask, my_mask, partial, offset, tile_begin, range.begin, limit, weights, place);
        if (simd_any(tile_max > row_max)) {
          const float new_max = max(row_max, column_max(tile_max)), factor = rescale(row_max, new_max);
          row_max = new_max;
          row_sum *= factor;
#pragma clang loop unroll(full)
          for (int i = 0; i < 4 * NGS; i++) put(acc[i], get(acc[i]) * factor);
          if (!LLOYD) put(bias_acc, get(bias_acc) * factor);
        }
        weigh_scores<NF>(weights, row_max, row_sum);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (tile_begin + TT < range.end) {
        KeyTile::load(key_codes, key_bytes, tile_begin + TT, range.begin, range.end, thread_id, key_held);
        held_side = load_key_side<NU, TT>(p, key_norms, residual_norms, key_signs, tile_begin + TT, range, thread_id);
      }
      if (!works) continue;
      add_coded_values<X>(tile, tile_scales, tile_biases, weights, skips, acc, bias_acc, place);
    }

    finish_coded_values<X>(acc, bias_acc, place);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (is_direct && has_hadamard) rotate_sums_back<X>(p, numbers, acc, place);
  }

  // --- exact tokens: [begin, end) of first ++ tail
  const int last_column = p.n_first + p.n_coded + p.n_tail - (is_causal ? p.n_queries : 1);  // that query 0 sees
  const int exact_begin = is_direct ? 0 : (int(tg.x) - p.n_ranges) * p.range_tokens;
  int exact_end = is_direct ? n_exact : min(n_exact, exact_begin + p.range_tokens);
  if (is_causal) exact_end = min(exact_end, max(p.n_first, last_column + last_query - p.n_coded + 1));
  if (exact_begin >= 0 && exact_begin < exact_end) {
    keep_exact_queries<T, X>(p, query, has_row, queries, place);
    first_keys += batch * p.first_keys.batch + kv_head * p.first_keys.head;
    first_values += batch * p.first_values.batch + kv_head * p.first_values.head;
    tail_keys += batch * p.tail_keys.batch + kv_head * p.tail_keys.head;
    tail_values += batch * p.tail_values.batch + kv_head * p.tail_values.head;
    const int seen = is_causal ? last_column + my_query : last_column;  // the last column of my_row
#pragma clang loop unroll(disable)
    for (int tile_begin = exact_begin; tile_begin < exact_end; tile_begin += TT) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage_exact<T, K, KE, TT, NT>(first_keys, tail_keys, p.first_keys, p.tail_keys, p, bounds, p.head_dim, tile_begin,
                                    exact_end, exact_tile, thread_id);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float2 weights[NF];
      for (int f = 0; f < NF; f++) weights[f] = float2(0.0f);
      if (works) score_exact_keys<T, X>(exact_tile, queries, partial, weights, place);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      bool odd = stage_exact<T, V, VE, TT, NT>(first_values, tail_values, p.first_values, p.tail_values, p, bounds, p.value_dim,
                                               tile_begin, exact_end, exact_tile, thread_id);
      if (skips) {
        odd = simd_any(odd);
        if (lane == 0) spoilt[sg] = odd ? 1u : 0u;
      }

      if (works) {
        const float tile_max =
            mask_exact<X>(p, bounds, mask, my_mask, partial, tile_begin, exact_end, has_row ? seen : -1, weights, place);
        if (simd_any(tile_max > row_max)) {
          const float new_max = max(row_max, column_max(tile_max)), factor = rescale(row_max, new_max);
          row_max = new_max;
          row_sum *= factor;
#pragma clang loop unroll(full)
          for (int i = 0; i < 4 * NGS; i++) put(acc[i], get(acc[i]) * factor);
        }
        weigh_scores<NF>(weights, row_max, row_sum);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (!works) continue;
      if (skips && simd_any(int(lane) < NSG && spoilt[min(int(lane), NSG - 1)] != 0u)) {
        add_spoilt_values<T, X>(exact_tile, weights, acc, place);
        continue;
      }
      add_exact_values<T, X>(exact_tile, weights, acc, place);
    }
  }

  row_sum = column_sum(row_sum);
  if (!has_row) return;
  if (!is_direct) {
    const long at = (long(tg.y) * p.n_parts + int(tg.x)) * n_rows + my_row;
    write_prompt_part<X>(parts, states, at, row_max, row_sum, acc, place);
    return;
  }
  const float sink = has_sinks ? sinks[my_head] * kLog2e : -INFINITY;
  write_prompt_row<T, X>(out + (long(tg.y) * n_rows + my_row) * p.value_dim, p.value_dim, row_max, row_sum, sink, acc, place);
}

#define TQ_PROMPT(name, type, k, v, key_bits, value_bits, coding, rows)                 \
  template [[host_name(name)]] [[kernel]]                                               \
  decltype(turboquant_attention_prompt<type, k, v, key_bits, value_bits, coding, rows>) \
      turboquant_attention_prompt<type, k, v, key_bits, value_bits, coding, rows>;
