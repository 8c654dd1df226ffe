// Attention over packed latents that are keys and values at once, all in the rotated space (latent_attention.h): one KV head
// serves all query heads, whose rows are the rows of tensor-core products.
//
// Grid: (splits, row tiles, batch * n_kv_heads). A block takes kRows query rows and a share of the tiles of 64 tokens: exact
// tokens, first ++ tail, then coded ones. A tile is decoded once, to fp16 with its block's mean added, into shared memory; it
// is the keys of one product and the values of the next. A warp makes the scores of 16 rows and some of the tile's tokens, and
// the weighted sums of all rows and an eighth of the dimensions. With two buffers a tile is decoded between the two products of
// the one before. Each block leaves its unnormalised sums; latent_join adds those of a row's blocks.
//
// A row is scaled by a power of two and rounded to fp16; its scores and sums are fp32.
// Compile-time: DIM (256 or 512), BITS, ROWS (16, 32 or 64), MASK, BUFFERS.
#include "device.cuh"
#include "latent_params.h"
#include "levels.cuh"
#include "warpgroup.cuh"

namespace tqext::cuda {
namespace {

constexpr int kDim = DIM, kBits = BITS, kRows = ROWS, kMask = MASK, kBuffers = BUFFERS;
constexpr int kRowGroups = kRows / 16, kColumnGroups = kLatentWarps / kRowGroups;
constexpr int kTokens = kLatentTile / kColumnGroups, kTokenTiles = kTokens / 8;  // of a warp's scores
constexpr int kSteps = kDim / 16, kOutTiles = kDim / 8 / kLatentWarps, kUnits = kDim / kUnit / 4;
constexpr int kRowBytes = kDim * 2;
constexpr LatentLayout kLayout(kDim, kRows, kBuffers);
static_assert(kLatentTile == kBlockTokens, "a tile's tokens share a mean");
static_assert(kTokenTiles >= 1 && kOutTiles % 2 == 0 && kSteps % 2 == 0);

// A weight may grow by 2^kGrowth before the running maximum is renewed.
constexpr float kGrowth = 8.0f;
// What levels / 128 lack.
constexpr float kLevelFactor = 128.0f / 127.0f;

// Byte of 16-byte column c of a row.
TQ_DEVICE uint32_t column(int row, int c) { return uint32_t((c ^ (row & 7)) << 4); }

// A tile of tokens: `begin` counts exact tokens, first ++ tail, or coded ones.
struct Tile {
  bool exact;
  int begin, n;

  TQ_DEVICE Tile(const LatentParams& p, int index) {
    const int n_exact = p.n_first + p.n_tail, exact_tiles = (n_exact + kLatentTile - 1) / kLatentTile;
    exact = index < exact_tiles;
    begin = (exact ? index : index - exact_tiles) * kLatentTile;
    n = min(kLatentTile, (exact ? n_exact : p.n_coded) - begin);
  }
  // Place of its token t among all.
  TQ_DEVICE int key(const LatentParams& p, int t) const {
    const int i = begin + t;
    return exact ? (i < p.n_first ? i : i + p.n_coded) : p.n_first + i;
  }
};

// A thread's part of a coded tile on its way to shared memory: of token tid / 4 the units tid % 4 + 4 j, and two numbers of the
// mean.
struct Codes {
  uint32_t words[kUnits * kBits];
  uint16_t norm;
  float mean[2];

  TQ_DEVICE void load(const LatentParams& p, const Tile& tile, int b, int h, int tid) {
    if (tile.exact) return;
    const int token = tid / 4, quarter = tid % 4;
    const bool there = token < tile.n;
    const uint32_t* row =
        p.codes + b * p.code_stride[0] + h * p.code_stride[1] + int64_t(tile.begin + token) * p.code_stride[2];
#pragma unroll
    for (int j = 0; j < kUnits; j++) {
#pragma unroll
      for (int i = 0; i < kBits; i++) {
        words[j * kBits + i] = there ? row[((quarter + 4 * j) * kBits + i) * p.code_stride[3]] : 0;
      }
    }
    norm = there ? p.norms[b * p.norm_stride[0] + h * p.norm_stride[1] + int64_t(tile.begin + token) * p.norm_stride[2]]
                 : uint16_t(0);
    mean[0] = mean[1] = 0;
    if (p.means && 2 * tid < kDim) {
      const float* x = p.means + b * p.mean_stride[0] + h * p.mean_stride[1] +
                       int64_t(tile.begin / kBlockTokens) * p.mean_stride[2] + 2 * tid * p.mean_stride[3];
      mean[0] = x[0], mean[1] = x[p.mean_stride[3]];
    }
  }

  TQ_DEVICE void store_mean(const Tile& tile, uint32_t base, int tid) const {
    if (!tile.exact && 2 * tid < kDim) store_shared_word(base + kLayout.mean_at + 4 * tid, pack_halves(mean[0], mean[1]));
  }

  // Once the mean is there. Of the four threads of a token two exchange the order of their columns: eight neighbours then store
  // to all banks.
  TQ_DEVICE void decode(const LatentParams& p, uint32_t base, uint32_t to, int tid) const {
    const int token = tid / 4, quarter = tid % 4, other = quarter & 2;
    const uint32_t factor = both(float_to_half(fminf(half_to_float(norm) * kLevelFactor, TQ_HALF_MAX)));
#pragma unroll
    for (int j = 0; j < kUnits; j++) {
      uint32_t select[4], top[4];
      split_codes<kBits>(words + j * kBits, select, top);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int c = 4 * (quarter + 4 * j) + (s ^ other);
        const uint32_t codes = other ? select[s ^ 2] : select[s], tops = other ? top[s ^ 2] : top[s];
        const uint2 x = find_levels<kBits>(p.levels, codes, tops, factor);
        const uint2 y = find_levels<kBits>(p.levels, codes >> 16, tops >> 16, factor);
        uint4 mean;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(mean.x), "=r"(mean.y), "=r"(mean.z), "=r"(mean.w)
                     : "r"(base + kLayout.mean_at + 16 * c)
                     : "memory");
        store_shared(to + token * kRowBytes + column(token, c), make_uint4(add_halves(x.x, mean.x), add_halves(x.y, mean.y),
                                                                           add_halves(y.x, mean.z), add_halves(y.y, mean.w)));
      }
    }
  }
};

TQ_DEVICE void copy_exact(const LatentParams& p, const Tile& tile, int b, int h, uint32_t to, int tid) {
  const int token = tid / 4, quarter = tid % 4, i = tile.begin + token;
  const bool there = token < tile.n, is_first = i < p.n_first;
  const int64_t (&stride)[4] = is_first ? p.first_stride : p.tail_stride;
  const float* row =
      (is_first ? p.first : p.tail) + b * stride[0] + h * stride[1] + int64_t(is_first ? i : i - p.n_first) * stride[2];
#pragma unroll 4
  for (int j = 0; j < 4 * kUnits; j++) {
    const int c = quarter + 4 * j;
    float x[8] = {};
    if (there && p.wide) {
      const float4 a = reinterpret_cast<const float4*>(row)[2 * c], e = reinterpret_cast<const float4*>(row)[2 * c + 1];
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = e.x, x[5] = e.y, x[6] = e.z, x[7] = e.w;
    } else if (there) {
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] = row[(8 * c + k) * stride[3]];
    }
    store_shared(to + token * kRowBytes + column(token, c), make_uint4(pack_halves(x[0], x[1]), pack_halves(x[2], x[3]),
                                                                       pack_halves(x[4], x[5]), pack_halves(x[6], x[7])));
  }
}

// The tile's latents to `to`; the mean of a coded one is there.
TQ_DEVICE void fill(const LatentParams& p, const Tile& tile, const Codes& codes, int b, int h, uint32_t base, uint32_t to,
                    int tid) {
  if (tile.exact) {
    copy_exact(p, tile, b, h, to, tid);
  } else {
    codes.decode(p, base, to, tid);
  }
}

// Query rows as fp16, each times a power of two; scale: of the scores of such a row.
TQ_DEVICE void prepare_rows(const LatentParams& p, uint32_t base, int row0, int n_rows, int b, int h, int warp, int lane) {
  for (int r = warp; r < kRows; r += kLatentWarps) {
    const int row = row0 + r;
    float x[kDim / 32] = {};
    if (row < n_rows) {
      const float* q =
          p.q + b * p.q_stride[0] + (h * p.n_repeats + row % p.n_repeats) * p.q_stride[1] + (row / p.n_repeats) * p.q_stride[2];
#pragma unroll
      for (int k = 0; k < kDim / 64; k++) {
        x[2 * k] = q[(64 * k + 2 * lane) * p.q_stride[3]];
        x[2 * k + 1] = q[(64 * k + 2 * lane + 1) * p.q_stride[3]];
      }
    }
    float largest = 0;
#pragma unroll
    for (int k = 0; k < kDim / 32; k++) largest = fmaxf(largest, fabsf(x[k]));
#pragma unroll
    for (int half = 16; half > 0; half /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, half));
    const int e = min(max(int(__float_as_uint(largest) >> 23) - 127, -100), 100);
    const float factor = power_of_two(-e);
#pragma unroll
    for (int k = 0; k < kDim / 64; k++) {
      const int c = (64 * k + 2 * lane) / 8;
      store_shared_word(base + r * kRowBytes + column(r, c) + 4 * (lane % 4),
                        pack_halves(x[2 * k] * factor, x[2 * k + 1] * factor));
    }
    if (lane == 0) store_shared_float(base + kLayout.scale_at + 4 * r, p.scale * power_of_two(e));
  }
}

TQ_DEVICE float load_float(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

// Products of a warp's 16 rows and kTokens tokens of a tile.
TQ_DEVICE void multiply_keys(float (&scores)[kTokenTiles][4], uint32_t base, uint32_t tile, int row_group, int column_group,
                             int lane) {
  const int row = 16 * row_group + lane % 16, from = lane / 16;
  const uint32_t query = base + row * kRowBytes;
  if constexpr (kTokenTiles == 1) {
    const int token = 8 * column_group + lane % 8;
    const uint32_t key = tile + token * kRowBytes;
#pragma unroll 4
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t a[4], k[4];
      load_matrices_shared(k, key + column(token, 2 * step + lane / 8));
      load_matrices_shared(a, query + column(row, 2 * step + from));
      multiply_half(scores[0], a[0], a[1], a[2], a[3], k[0], k[1]);
      load_matrices_shared(a, query + column(row, 2 * step + 2 + from));
      multiply_half(scores[0], a[0], a[1], a[2], a[3], k[2], k[3]);
    }
  } else {
    const int token = kTokens * column_group + lane % 8 + 8 * (lane / 16), key_from = lane / 8 % 2;
    const uint32_t key = tile + token * kRowBytes;
#pragma unroll 4
    for (int step = 0; step < kSteps; step++) {
      uint32_t a[4];
      load_matrices_shared(a, query + column(row, 2 * step + from));
#pragma unroll
      for (int pair = 0; pair < kTokenTiles / 2; pair++) {
        uint32_t k[4];
        load_matrices_shared(k, key + 16 * pair * kRowBytes + column(token, 2 * step + key_from));
        multiply_half(scores[2 * pair], a[0], a[1], a[2], a[3], k[0], k[1]);
        multiply_half(scores[2 * pair + 1], a[0], a[1], a[2], a[3], k[2], k[3]);
      }
    }
  }
}

// Adds the weighted latents of a tile to all rows' sums of the warp's dimensions.
TQ_DEVICE void multiply_values(float (&sums)[kRowGroups][kOutTiles][4], uint32_t base, uint32_t tile, int warp, int lane) {
#pragma unroll
  for (int step = 0; step < kLatentTile / 16; step++) {
    const int token = 16 * step + lane % 16;
    uint32_t v[kOutTiles / 2][4];
#pragma unroll
    for (int pair = 0; pair < kOutTiles / 2; pair++) {
      load_matrices_transposed(v[pair], tile + token * kRowBytes + column(token, warp * kOutTiles + 2 * pair + lane / 16));
    }
#pragma unroll
    for (int group = 0; group < kRowGroups; group++) {
      const int row = 16 * group + lane % 16;
      uint32_t a[4];
      load_matrices_shared(a, base + kLayout.weight_at + row * (2 * kLatentTile) + column(row, 2 * step + lane / 16));
#pragma unroll
      for (int pair = 0; pair < kOutTiles / 2; pair++) {
        multiply_half(sums[group][2 * pair], a[0], a[1], a[2], a[3], v[pair][0], v[pair][1]);
        multiply_half(sums[group][2 * pair + 1], a[0], a[1], a[2], a[3], v[pair][2], v[pair][3]);
      }
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * kLatentWarps, 1) latent_attention(const __grid_constant__ LatentParams p) {
  extern __shared__ char shared[];
  const uint32_t base = shared_address(shared);
  const int tid = threadIdx.x, warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32;
  const int split = blockIdx.x, row_tile = blockIdx.y, head = blockIdx.z, b = head / p.n_kv_heads, h = head % p.n_kv_heads;
  const int n_rows = p.n_repeats * p.n_queries, row0 = row_tile * kRows, n_keys = p.n_first + p.n_coded + p.n_tail;
  const int n_tiles = (p.n_first + p.n_tail + kLatentTile - 1) / kLatentTile + (p.n_coded + kLatentTile - 1) / kLatentTile;
  const int begin = int(int64_t(n_tiles) * split / p.splits), end = int(int64_t(n_tiles) * (split + 1) / p.splits);
  const int row_group = warp / kColumnGroups, column_group = warp % kColumnGroups;
  const int own_row = 16 * row_group + lane / 4;  // and the one 8 below

  prepare_rows(p, base, row0, n_rows, b, h, warp, lane);
  float sums[kRowGroups][kOutTiles][4] = {};
  float row_max[2] = {kEmptyMax, kEmptyMax}, row_sum[2] = {};
  const char* mask[2] = {};
  int last_key[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = min(row0 + own_row + 8 * i, n_rows - 1), query = row / p.n_repeats;
    last_key[i] = p.causal ? n_keys - p.n_queries + query : n_keys - 1;
    if constexpr (kMask != kMaskNone) {
      const int64_t at =
          b * p.mask_stride[0] + (h * p.n_repeats + row % p.n_repeats) * p.mask_stride[1] + query * p.mask_stride[2];
      mask[i] = static_cast<const char*>(p.mask) + at * (kMask == kMaskFloat ? 4 : 1);
    }
  }

  Codes codes;
  if (begin < end) {
    const Tile tile(p, begin);
    codes.load(p, tile, b, h, tid);
    codes.store_mean(tile, base, tid);
    __syncthreads();
    fill(p, tile, codes, b, h, base, base + kLayout.tile, tid);
  }
  __syncthreads();
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; i++) scale[i] = load_float(base + kLayout.scale_at + 4 * (own_row + 8 * i));

  for (int index = begin; index < end; index++) {
    const Tile tile(p, index), next(p, min(index + 1, end - 1));
    const int buffer = kBuffers == 2 ? (index - begin) % 2 : 0;
    const uint32_t here = base + kLayout.tile + buffer * (kLatentTile * kRowBytes);
    const uint32_t there = base + kLayout.tile + (kBuffers == 2 ? 1 - buffer : 0) * (kLatentTile * kRowBytes);
    const bool more = index + 1 < end;
    if (more) codes.load(p, next, b, h, tid);

    float scores[kTokenTiles][4] = {};
    multiply_keys(scores, base, here, row_group, column_group, lane);
    float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int t = 0; t < kTokenTiles; t++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = e / 2, token = kTokens * column_group + 8 * t + 2 * (lane % 4) + e % 2, key = tile.key(p, token);
        float x = scores[t][e] * scale[i];
        const bool seen = token < tile.n && key <= last_key[i];
        if constexpr (kMask == kMaskFloat) {
          if (seen) x += *reinterpret_cast<const float*>(mask[i] + 4 * (key * p.mask_stride[3])) * kLog2e;
        } else if constexpr (kMask == kMaskBool) {
          if (seen && !mask[i][key * p.mask_stride[3]]) x = -INFINITY;
        }
        scores[t][e] = seen ? x : -INFINITY;
        tile_max[i] = fmaxf(tile_max[i], scores[t][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      tile_max[i] = fmaxf(tile_max[i], __shfl_xor_sync(kAllLanes, tile_max[i], 1));
      tile_max[i] = fmaxf(tile_max[i], __shfl_xor_sync(kAllLanes, tile_max[i], 2));
      if (lane % 4 == 0) {
        store_shared_float(base + kLayout.max_at + 4 * (column_group * kRows + own_row + 8 * i), tile_max[i]);
      }
    }
    if (more) codes.store_mean(next, base, tid);
    __syncthreads();  // maxima and the next mean are there; all have multiplied the values of the tile before

    if (kBuffers == 2 && more) fill(p, next, codes, b, h, base, there, tid);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float largest = -INFINITY;
#pragma unroll
      for (int group = 0; group < kColumnGroups; group++) {
        largest = fmaxf(largest, load_float(base + kLayout.max_at + 4 * (group * kRows + own_row + 8 * i)));
      }
      const float before = row_max[i];
      if (largest > before + kGrowth) row_max[i] = largest;
      const float factor = exp2_fast(before - row_max[i]);
      row_sum[i] *= factor;
      if (column_group == 0 && lane % 4 == 0) store_shared_float(base + kLayout.factor_at + 4 * (own_row + 8 * i), factor);
      const uint32_t weights = base + kLayout.weight_at + (own_row + 8 * i) * (2 * kLatentTile);
#pragma unroll
      for (int t = 0; t < kTokenTiles; t++) {
        const float x = exp2_fast(scores[t][2 * i] - row_max[i]), y = exp2_fast(scores[t][2 * i + 1] - row_max[i]);
        row_sum[i] += x + y;
        const int c = kTokenTiles * column_group + t;
        store_shared_word(weights + column(own_row + 8 * i, c) + 4 * (lane % 4), pack_halves(x, y));
      }
    }
    __syncthreads();

#pragma unroll
    for (int group = 0; group < kRowGroups; group++) {
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; i++) factor[i] = load_float(base + kLayout.factor_at + 4 * (16 * group + lane / 4 + 8 * i));
      if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int t = 0; t < kOutTiles; t++) {
#pragma unroll
          for (int e = 0; e < 4; e++) sums[group][t][e] *= factor[e / 2];
        }
      }
    }
    multiply_values(sums, base, here, warp, lane);
    if constexpr (kBuffers == 1) {
      __syncthreads();
      if (more) fill(p, next, codes, b, h, base, there, tid);
      __syncthreads();
    }
  }

  const int64_t first_row = (int64_t(head * p.row_tiles + row_tile) * p.splits + split) * kRows;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], 1);
    row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], 2);
    if (lane % 4 == 0) {
      store_shared_float(base + kLayout.max_at + 4 * (column_group * kRows + own_row + 8 * i), row_sum[i]);
      if (column_group == 0) p.partial_state[2 * (first_row + own_row + 8 * i)] = row_max[i];
    }
  }
  __syncthreads();
  if (tid < kRows) {
    float sum = 0;
    for (int group = 0; group < kColumnGroups; group++) sum += load_float(base + kLayout.max_at + 4 * (group * kRows + tid));
    p.partial_state[2 * (first_row + tid) + 1] = sum;
  }
#pragma unroll
  for (int group = 0; group < kRowGroups; group++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = 16 * group + lane / 4 + 8 * i;
      if (row0 + row >= n_rows) continue;
      float* out = p.partial_out + (first_row + row) * kDim + 8 * kOutTiles * warp + 2 * (lane % 4);
#pragma unroll
      for (int t = 0; t < kOutTiles; t++) {
        *reinterpret_cast<float2*>(out + 8 * t) = make_float2(sums[group][t][2 * i], sums[group][t][2 * i + 1]);
      }
    }
  }
}

// Grid: (rows of a head, heads). Adds the sums of a row's blocks.
extern "C" __global__ void __launch_bounds__(kLatentJoinThreads) latent_join(const __grid_constant__ LatentParams p) {
  __shared__ float weights[kMaxLatentSplits];
  const int row = blockIdx.x, head = blockIdx.y, b = head / p.n_kv_heads, h = head % p.n_kv_heads, tid = threadIdx.x;
  const int64_t first_row = int64_t(head * p.row_tiles + row / kRows) * p.splits * kRows + row % kRows;
  float largest = kEmptyMax, sum = 0;
  for (int s = 0; s < p.splits; s++) largest = fmaxf(largest, p.partial_state[2 * (first_row + int64_t(s) * kRows)]);
  for (int s = 0; s < p.splits; s++) {
    const float* state = p.partial_state + 2 * (first_row + int64_t(s) * kRows);
    const float weight = exp2_fast(state[0] - largest);
    sum += weight * state[1];
    if (tid == s % kLatentJoinThreads) weights[s] = weight;
  }
  __syncthreads();
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
  float x[kDim / kLatentJoinThreads] = {};
  for (int s = 0; s < p.splits; s++) {
    const float* out = p.partial_out + (first_row + int64_t(s) * kRows) * kDim;
#pragma unroll
    for (int k = 0; k < kDim / kLatentJoinThreads; k++) x[k] += weights[s] * out[k * kLatentJoinThreads + tid];
  }
  const int64_t q_head = int64_t(b) * p.n_kv_heads * p.n_repeats + h * p.n_repeats + row % p.n_repeats;
  float* to = p.out + (q_head * p.n_queries + row / p.n_repeats) * kDim;
#pragma unroll
  for (int k = 0; k < kDim / kLatentJoinThreads; k++) to[k * kLatentJoinThreads + tid] = x[k] * inverse;
}

}  // namespace tqext::cuda
