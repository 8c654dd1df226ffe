// Attention of a step of up to 64 tokens over packed latents that are keys and values at once (latent_attention.h): one KV head
// serves all query heads. D = 256 or 512. A threadgroup of eight simdgroups takes 16 rows and a range of tokens.
//
//   S [16 rows x 16 tokens] = Q K^T, Out [16 rows x D] += P K. A simdgroup has an eighth of the dimensions of all 16 rows,
//   queries and sums in registers, so that an operand from threadgroup memory serves two products. The simdgroups leave their
//   shares of the scores; each makes the weights of two rows, a lane one weight; then all multiply the same tile again.
//
// Coded tokens are attended to in the rotated space, exact ones (first ones, tail) by threadgroups of their own in the space of
// the model. The combine kernel joins the parts.
//
// Bytes of a token, 3 bits, D = 512: 192 + 2 + 16 (its share of the block's mean, fp16) = 210, for each block of 16 rows; the
// mask, which holds the scores of the rotary part, is 4 bytes for each row. fp16 latents: 1024.
// Operations of a token and 16 rows, D = 512: 2 x 16 x 512 products, which are 32 products of matrices (17 cycles of a
// scheduler each: 136 core cycles); the same token's 210 bytes arrive in some 25 core cycles. So products are the limit, and
// reading the codes again for the next 16 rows is not. Not measured on a GPU.
//
// Threadgroup memory at D = 512, bytes; 32768 is the limit:
//   tile      16 tokens, levels as halves (exact there), lines of 1040 bytes: 16640. Exact tokens: 8 of them, fp32 16512.
//   shares    of scores, then weights: 16 rows x 132 floats: 8448
//   mean      before and after its rotation: 4096
//   table     2048
//   the rest  factors, sums of a block's weights, shares of its mean's scores: 776
// Registers of a lane: 32 for queries, 32 for sums, 8 for scores, 12 for the codes of the next tile; docs/metal.md has what a
// compiler makes of it.
//
// - Norms go into scores and weights, in fp32. A block's mean is rotated once, by all simdgroups; it adds to the scores of its
//   64 tokens, and once to the sums, times the sum of their weights.
// - A latent that a row does not attend to must not reach it, NaN or not: norms are on the side of the weights, a mean is added
//   where the sum of weights is not 0, and an exact latent that is not finite is zeros with a score of NaN.
#include "attention.h"

constant constexpr int kLatentSimdgroups = 8, kLatentBlocks = kLatentRows / 8;  // 8x8 matrices one above the other
constant constexpr int kLatentExactTile = 8;                                    // exact tokens: one for each simdgroup
constant constexpr int kShareLine = kLatentSimdgroups * kLatentTile + 4;        // of a row; 4 more for the banks
static_assert(2 * kLatentTile == 32 && kLatentRows == 2 * kLatentSimdgroups, "a lane for each weight of a simdgroup's rows");

// What a lane keeps of the row whose weights it makes: the running maximum, its share of the sum and of the block's weights.
struct LatentRow {
  float max, sum, block_sum;
};

// A simdgroup's share of the scores of N tokens.
template <typename E, int D, int LINE, int N>
inline void leave_shares(threadgroup const E* tile, thread simdgroup_float8x8* queries, threadgroup float* shares, int sg,
                         int row, int column) {
  constexpr int M = D / 8 / kLatentSimdgroups, NF = N / 8;
  simdgroup_float8x8 scores[kLatentBlocks * NF];
#pragma clang loop unroll(full)
  for (int i = 0; i < kLatentBlocks * NF; i++) put(scores[i], float2(0.0f));
#pragma clang loop unroll(full)
  for (int i = 0; i < M; i++) {
    simdgroup_barrier(mem_flags::mem_none);  // loads stay with their products: fewer registers
#pragma clang loop unroll(full)
    for (int f = 0; f < NF; f++) {
      simdgroup_float8x8 b;
      threadgroup const E* from = tile + (8 * f + column) * LINE + 8 * (M * sg + i) + row;
      put(b, float2(float(from[0]), float(from[LINE])));
      for (int k = 0; k < kLatentBlocks; k++) {
        simdgroup_multiply_accumulate(scores[k * NF + f], queries[k * M + i], b, scores[k * NF + f]);
      }
    }
  }
#pragma clang loop unroll(full)
  for (int k = 0; k < kLatentBlocks; k++) {
    for (int f = 0; f < NF; f++) {
      threadgroup float* to = shares + (8 * k + row) * kShareLine + N * sg + 8 * f + column;
      *reinterpret_cast<threadgroup float2*>(to) = get(scores[k * NF + f]);
    }
  }
}

// The score of this lane's row and token from the simdgroups' shares.
template <int N>
inline float join_shares(threadgroup const float* row_shares, int token) {
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int i = 0; i < kLatentSimdgroups; i++) sum += row_shares[N * i + token];
  return sum;
}

// The weight of this lane's token, relative to the row's new maximum; score: -inf is "not attended". factor: of earlier sums.
template <int N>
inline float weigh(thread LatentRow& state, float score, thread float& factor) {
  float tile_max = score;
#pragma clang loop unroll(full)
  for (ushort h = 1; h < N; h *= 2) tile_max = max(tile_max, simd_shuffle_xor(tile_max, h));
  const float new_max = max(state.max, tile_max);
  factor = rescale(state.max, new_max);
  state.max = new_max;
  const float weight = score == -INFINITY ? 0.0f : fast::exp2(score - new_max);
  state.sum = fma(state.sum, factor, weight);
  state.block_sum = fma(state.block_sum, factor, weight);
  return weight;
}

// Sums over the lanes of a row.
template <int N>
inline float sum_tokens(float x) {
#pragma clang loop unroll(full)
  for (ushort h = 1; h < N; h *= 2) x += simd_shuffle_xor(x, h);
  return x;
}

// Adds the tile's latents times the weights to the sums of this simdgroup's dimensions.
template <typename E, int D, int LINE, int N>
inline void add_latents(threadgroup const E* tile, threadgroup const float* weights, threadgroup const float* factors,
                        thread simdgroup_float8x8* acc, int sg, int row, int column) {
  constexpr int M = D / 8 / kLatentSimdgroups, NF = N / 8;
  float factor[kLatentBlocks];
  bool moved = false;
  for (int k = 0; k < kLatentBlocks; k++) {
    factor[k] = factors[8 * k + row];
    moved = moved || factor[k] != 1.0f;
  }
  if (simd_any(moved)) {
#pragma clang loop unroll(full)
    for (int i = 0; i < kLatentBlocks * M; i++) put(acc[i], get(acc[i]) * factor[i / M]);
  }
#pragma clang loop unroll(full)
  for (int f = 0; f < NF; f++) {
    simdgroup_float8x8 a[kLatentBlocks], b;
    for (int k = 0; k < kLatentBlocks; k++) {
      put(a[k], *reinterpret_cast<threadgroup const float2*>(weights + (8 * k + row) * kShareLine + 8 * f + column));
    }
    threadgroup const E* from = tile + (8 * f + row) * LINE + 8 * M * sg + column;
#pragma clang loop unroll(full)
    for (int i = 0; i < M; i++) {
      simdgroup_barrier(mem_flags::mem_none);
      put(b, float2(float(from[8 * i]), float(from[8 * i + 1])));
      for (int k = 0; k < kLatentBlocks; k++) simdgroup_multiply_accumulate(acc[k * M + i], a[k], b, acc[k * M + i]);
    }
  }
}

// The mean of a block for coded latents: times the balance, rotated. Element 32 (M sg + i) + lane is x[i], of M = D / 256. The
// butterflies within a simdgroup come first; those between simdgroups follow. signs: of the rotation, times its scale.
template <int D>
inline void start_mean(constant AttentionParams& p, const device uchar* means, const device float* balance, int kv_head,
                       int block, thread const float* signs, thread float* x, uint sg, uint lane) {
  constexpr int M = D / 32 / kLatentSimdgroups;
  for (int i = 0; i < M; i++) {
    const int d = 32 * (M * int(sg) + i) + int(lane);
    x[i] = d < p.head_dim ? mean_at(means, block * p.means.token + d * p.means.last) : 0.0f;
    if (has_balance && d < p.head_dim) x[i] *= balance[kv_head * p.balance.head + d * p.balance.last];
    if (has_hadamard) x[i] *= signs[i];
  }
  if (!has_hadamard) return;
#pragma clang loop unroll(full)
  for (ushort h = 1; h < 32; h *= 2) {
    for (int i = 0; i < M; i++) {
      const float y = simd_shuffle_xor(x[i], h);
      x[i] = (lane & h) ? y - x[i] : x[i] + y;
    }
  }
  if (M == 2) {
    const float a = x[0], b = x[M - 1];
    x[0] = a + b;
    x[M - 1] = a - b;
  }
}
// all: what every simdgroup has made. mean: this simdgroup's dimensions of the result.
template <int D>
inline void finish_mean(threadgroup const float* all, threadgroup float* mean, uint sg, uint lane) {
  constexpr int M = D / 32 / kLatentSimdgroups, STEP = 32 * M;
  const float s1 = (sg & 1u) ? -1.0f : 1.0f, s2 = (sg & 2u) ? -1.0f : 1.0f, s4 = (sg & 4u) ? -1.0f : 1.0f;
  for (int i = 0; i < M; i++) {
    const int own = STEP * int(sg) + 32 * i + int(lane);
    if (!has_hadamard) {
      mean[own] = all[own];
      continue;
    }
    threadgroup const float* x = all + 32 * i + int(lane);
    const float low = fma(s2, fma(s1, x[3 * STEP], x[2 * STEP]), fma(s1, x[STEP], x[0]));
    const float high = fma(s2, fma(s1, x[7 * STEP], x[6 * STEP]), fma(s1, x[5 * STEP], x[4 * STEP]));
    mean[own] = fma(s4, high, low);
  }
}

template <typename T, int D, int BITS>
[[kernel, max_total_threads_per_threadgroup(256)]] void latent_attention(TQ_ATTENTION_ARGUMENTS) {
  constexpr bool LLOYD = true;
  constexpr int NSG = kLatentSimdgroups, NT = 32 * NSG, TT = kLatentTile, TE = kLatentExactTile;
  constexpr int NU = D / 32, M = D / 8 / NSG;                                     // matrices of a row in a simdgroup
  constexpr int LINE = D + 8, EXACT_LINE = D + 16 / int(sizeof(T));               // in elements
  constexpr int TILE = largest(2 * TT * LINE, int(sizeof(T)) * TE * EXACT_LINE);  // bytes; 8 rotated queries as well
  typedef LevelTile<BITS, NU, TT, NT> Tile;
  static_assert(D % (32 * NSG) == 0 && TILE >= 32 * D, "a unit of every simdgroup; 8 rows of queries");

  threadgroup float4 tile_memory[TILE / 16];
  threadgroup float shares[kLatentRows * kShareLine];
  threadgroup float all_means[D], mean[D];
  threadgroup uint table[512];  // half2 per byte of codes, twice: odd and even lanes use different banks
  threadgroup float norms[TT], factors[kLatentRows], block_sums[kLatentRows], offsets[NSG * kLatentRows];
  threadgroup uint spoilt[TE];
  static_assert(TILE + 4 * kLatentRows * kShareLine + 8 * D + 2048 + 4 * (TT + (2 + NSG) * kLatentRows + TE) <= 32768,
                "threadgroup memory");
  threadgroup half* tile = reinterpret_cast<threadgroup half*>(tile_memory);
  threadgroup T* exact_tile = reinterpret_cast<threadgroup T*>(tile_memory);
  threadgroup float* numbers = reinterpret_cast<threadgroup float*>(tile_memory);
  TQ_ATTENTION_HEAD
  const int n_rows = p.n_rows, n_repeats = n_rows / p.n_queries, first_row = kLatentRows * int(tg.z);
  const int row = int(lane / 4 & 4u) + int(lane / 2 & 3u), column = int(lane / 4 & 2u) * 2 + int(lane & 1u) * 2;
  const bool skips = mask_kind != kMaskNone || is_causal;

  simdgroup_float8x8 queries[kLatentBlocks * M], acc[kLatentBlocks * M];
#pragma clang loop unroll(full)
  for (int i = 0; i < kLatentBlocks * M; i++) put(acc[i], float2(0.0f));
  LatentRow state = {-INFINITY, 0.0f, 0.0f};
  const bool is_exact = int(tg.x) >= p.n_ranges;
  // The row and the token whose weight a lane makes; of exact tokens half of the lanes have one.
  const int n_tokens = is_exact ? TE : TT, token = int(lane) % n_tokens;
  const bool has_weight = int(lane) < 2 * n_tokens;
  const int weight_row = 2 * int(sg) + (has_weight ? int(lane) / n_tokens : 0), my_row = first_row + weight_row;
  const bool has_row = has_weight && my_row < n_rows;
  const long my_mask = mask_kind != kMaskNone && has_row ? mask_row(p, batch, kv_head, my_row) : 0;
  threadgroup float* row_shares = shares + weight_row * kShareLine;

  if (!is_exact) {
    for (int b = int(tid); b < 256; b += NT) {
      const uint entry = as_type<uint>(half2(level_pair<BITS>(p.codebook, uint(b))));
      table[2 * b] = entry;
      table[2 * b + 1] = entry;
    }
#pragma clang loop unroll(full)
    for (int k = 0; k < kLatentBlocks; k++) {
      const int r = first_row + 8 * k + int(sg);
      float x[NU];
      for (int i = 0; i < NU; i++) x[i] = 0.0f;
      if (r < n_rows) {
        load_query<T, D>(p, q, batch, kv_head, r, x, lane);
        for (int i = 0; has_balance && i < NU; i++) {
          const int d = 32 * i + int(lane);
          if (d < p.head_dim) x[i] /= balance[kv_head * p.balance.head + d * p.balance.last];
        }
        if (has_hadamard) rotate_row<D>(x, TQ_ROTATION_SEED, p.key_rotation_scale, numbers, lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = 0; i < NU; i++) numbers[int(sg) * D + 32 * i + int(lane)] = x[i] * p.score_scale;
      threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
      for (int i = 0; i < M; i++) {
        put(queries[k * M + i],
            *reinterpret_cast<threadgroup const float2*>(numbers + row * D + 8 * (M * int(sg) + i) + column));
      }
    }

    const Range range = coded_range(p, bounds, int(tg.x));
    const int limit = has_row ? coded_limit(p, range.end, my_row % p.n_queries) : 0;
    const long token_bytes = 4 * p.key_codes.token;
    threadgroup const uchar* lookup = reinterpret_cast<threadgroup const uchar*>(table) + 4 * (lane & 1u);
    const int start = range.begin / TT * TT;
    uint held[Tile::kHeld];
    float held_norm = 0.0f, held_mean[NU / NSG], mean_signs[NU / NSG], offset = 0.0f;
    int held_block = -1, block = -1;  // whose mean is held; whose mean is in threadgroup memory
    for (int i = 0; i < NU / NSG; i++) {
      const bool negative = sign_word(TQ_ROTATION_SEED, NU / NSG * int(sg) + i) >> lane & 1u;
      mean_signs[i] = negative ? -p.key_rotation_scale : p.key_rotation_scale;
      held_mean[i] = 0.0f;
    }
#pragma clang loop unroll(disable)
    for (int tile_begin = start - TT; tile_begin < range.end; tile_begin += TT) {
      const int next = tile_begin + TT;
      const bool has_tile = tile_begin >= start && range.begin < range.end;
      if (has_tile) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        Tile::store(held, tile, LINE, lookup, int(tid));
        if (int(tid) < TT) norms[tid] = held_norm * (1.0f / float(kCodebookTop));
        const bool new_block = means_kind != kMeansNone && held_block != block;
        if (new_block) {
          for (int i = 0; i < NU / NSG; i++) all_means[32 * (NU / NSG * int(sg) + i) + int(lane)] = held_mean[i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (new_block) {
          block = held_block;
          finish_mean<D>(all_means, mean, sg, lane);
          simdgroup_barrier(mem_flags::mem_threadgroup);
          // The simdgroup's share of what the mean adds to the scores.
          for (int k = 0; k < kLatentBlocks; k++) {
            float sum = 0.0f;
#pragma clang loop unroll(full)
            for (int i = 0; i < M; i++) {
              const float2 x = *reinterpret_cast<threadgroup const float2*>(mean + 8 * (M * int(sg) + i) + column);
              const float2 y = get(queries[k * M + i]);
              sum = fma(x.x, y.x, fma(x.y, y.y, sum));
            }
            sum += simd_shuffle_xor(sum, ushort(1));
            sum += simd_shuffle_xor(sum, ushort(8));
            if (column == 0) offsets[int(sg) * kLatentRows + 8 * k + row] = sum;
          }
        }
        leave_shares<half, D, LINE, TT>(tile, queries, shares, int(sg), row, column);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (new_block) {
          offset = 0.0f;
          for (int i = 0; i < NSG; i++) offset += offsets[i * kLatentRows + weight_row];
        }
        const int t = tile_begin + token;
        const float norm = norms[token];
        float score = fma(join_shares<TT>(row_shares, token), norm, offset);
        score = fma(score, 0.0f, score);  // NaN of an infinite one: minus infinity would be a token that is not attended
        bool live = has_row && t >= range.begin && t < limit;
        if (mask_kind != kMaskNone && live) {
          const float bias = mask_bias(mask, my_mask + (p.n_first + t) * p.mask.last);
          live = bias != -INFINITY;
          score += bias;
        }
        float factor;
        const float weight = weigh<TT>(state, live ? score : -INFINITY, factor);
        // In the place of a share that no other lane reads.
        row_shares[token] = skips && weight == 0.0f ? 0.0f : weight * norm;
        const bool ends_block = next % kBlockTokens == 0 || next >= range.end;
        if (means_kind != kMeansNone && ends_block) {
          const float block_sum = sum_tokens<TT>(state.block_sum);
          if (token == 0) block_sums[weight_row] = block_sum;
          state.block_sum = 0.0f;
        }
        if (token == 0) factors[weight_row] = factor;
      }
      // While the weights are on their way: the bytes of the next tile.
      if (next < range.end) {
        Tile::load(key_codes, token_bytes, next, range.begin, range.end, int(tid), held);
        const int t = next + int(tid);
        held_norm = int(tid) < TT && t >= range.begin && t < range.end ? float(key_norms[t * p.key_norms.token]) : 0.0f;
        if (means_kind != kMeansNone && next / kBlockTokens != held_block) {
          held_block = next / kBlockTokens;
          start_mean<D>(p, means, balance, kv_head, held_block, mean_signs, held_mean, sg, lane);
        }
      }
      if (!has_tile) continue;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      add_latents<half, D, LINE, TT>(tile, shares, factors, acc, int(sg), row, column);
      if (means_kind != kMeansNone && (next % kBlockTokens == 0 || next >= range.end)) {
        for (int k = 0; k < kLatentBlocks; k++) {
          const float weight = block_sums[8 * k + row];
#pragma clang loop unroll(full)
          for (int i = 0; i < M; i++) {
            const float2 x = *reinterpret_cast<threadgroup const float2*>(mean + 8 * (M * int(sg) + i) + column);
            if (weight != 0.0f) put(acc[k * M + i], get(acc[k * M + i]) + weight * x);
          }
        }
      }
    }
  } else {
#pragma clang loop unroll(full)
    for (int k = 0; k < kLatentBlocks; k++) {
      const int r = first_row + 8 * k + row, head = kv_head * n_repeats + r / p.n_queries;
      const device T* from = q + batch * p.q.batch + head * p.q.head + r % p.n_queries * p.q.token;
#pragma clang loop unroll(full)
      for (int i = 0; i < M; i++) {
        const int d = 8 * (M * int(sg) + i) + column;
        const float2 x = float2(r < n_rows && d < p.head_dim ? float(from[d * p.q.last]) : 0.0f,
                                r < n_rows && d + 1 < p.head_dim ? float(from[(d + 1) * p.q.last]) : 0.0f);
        put(queries[k * M + i], x * p.score_scale);
      }
    }
    first_keys += batch * p.first_keys.batch + kv_head * p.first_keys.head;
    tail_keys += batch * p.tail_keys.batch + kv_head * p.tail_keys.head;
    const int n_exact = p.n_first + p.n_tail, tiles = (n_exact + TE - 1) / TE;
    const int each = (tiles + p.n_exact_ranges - 1) / p.n_exact_ranges * TE;
    const int begin = (int(tg.x) - p.n_ranges) * each, end = min(n_exact, begin + each);
    const int n_keys = n_exact + p.n_coded, seen = is_causal ? n_keys - p.n_queries + my_row % p.n_queries : n_keys - 1;
#pragma clang loop unroll(disable)
    for (int tile_begin = begin; tile_begin < end; tile_begin += TE) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int mine = tile_begin + int(sg);
      const bool stored = mine < end && is_stored(p, bounds, mine);
      const bool is_first = mine < p.n_first;
      const device T* from =
          is_first ? first_keys + mine * p.first_keys.token : tail_keys + (mine - p.n_first) * p.tail_keys.token;
      const long step = is_first ? p.first_keys.last : p.tail_keys.last;
      bool odd = false;
      for (int i = 0; i < NU; i++) {
        const int d = 32 * i + int(lane);
        const T x = stored && d < p.head_dim ? from[d * step] : T(0.0f);
        const bool finite = (as_type<uint>(float(x)) & 0x7f800000u) != 0x7f800000u;
        exact_tile[int(sg) * EXACT_LINE + d] = finite ? x : T(0.0f);
        odd = odd || !finite;
      }
      odd = simd_any(odd);
      if (lane == 0) spoilt[sg] = odd ? 1u : 0u;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      leave_shares<T, D, EXACT_LINE, TE>(exact_tile, queries, shares, int(sg), row, column);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int e = tile_begin + token, at = e < p.n_first ? e : p.n_coded + e;
      float score = has_weight ? join_shares<TE>(row_shares, token) : 0.0f;
      if (spoilt[token] != 0u) score = NAN;
      bool live = has_row && e < end && at <= seen && is_stored(p, bounds, e);
      if (mask_kind != kMaskNone && live) {
        const float bias = mask_bias(mask, my_mask + at * p.mask.last);
        live = bias != -INFINITY;
        score += bias;
      }
      float factor;
      const float weight = weigh<TE>(state, live ? score : -INFINITY, factor);
      if (has_weight) row_shares[token] = weight;
      if (has_weight && token == 0) factors[weight_row] = factor;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      add_latents<T, D, EXACT_LINE, TE>(exact_tile, shares, factors, acc, int(sg), row, column);
    }
  }

  const long part = (long(tg.y) * p.n_parts + int(tg.x)) * n_rows;
#pragma clang loop unroll(full)
  for (int k = 0; k < kLatentBlocks; k++) {
    const int r = first_row + 8 * k + row;
#pragma clang loop unroll(full)
    for (int i = 0; i < M; i++) {
      if (r < n_rows) {
        *reinterpret_cast<device float2*>(parts + (part + r) * D + 8 * (M * int(sg) + i) + column) = get(acc[k * M + i]);
      }
    }
  }
  const float sum = is_exact ? sum_tokens<TE>(state.sum) : sum_tokens<TT>(state.sum);
  if (has_row && token == 0) {
    states[(part + my_row) * 2] = state.max;
    states[(part + my_row) * 2 + 1] = sum;
  }
}

// Joins the parts of a row on one simdgroup.
template <typename T, int D>
[[kernel]] void latent_attention_combine(const device float* parts [[buffer(kAttentionParts)]],
                                         const device float* states [[buffer(kAttentionStates)]],
                                         const device float* balance [[buffer(kAttentionBalance)]],
                                         const device float* sinks [[buffer(kAttentionSinks)]],
                                         device T* out [[buffer(kAttentionOut)]],
                                         constant AttentionParams& p [[buffer(kAttentionParams)]],
                                         uint3 tg [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float scratch[1];  // powers of two need none
  const int row = int(tg.x), n_repeats = p.n_rows / p.n_queries, kv_head = int(tg.y) % p.n_kv_heads;
  const long part = long(tg.y) * p.n_parts * p.n_rows;
  combine_row<T, D, true>(p, parts + part * D, states + part * 2, p.n_parts, p.n_ranges, p.n_rows, row, sinks,
                          kv_head * n_repeats + row / p.n_queries, out + (long(tg.y) * p.n_rows + row) * p.value_dim, scratch,
                          lane, balance + kv_head * p.balance.head);
}

#define TQ_LATENT(name, type, d, bits) \
  template [[host_name(name)]] [[kernel]] decltype(latent_attention<type, d, bits>) latent_attention<type, d, bits>;
#define TQ_LATENT_COMBINE(name, type, d) \
  template [[host_name(name)]] [[kernel]] decltype(latent_attention_combine<type, d>) latent_attention_combine<type, d>;
