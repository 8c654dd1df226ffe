// Products of a few rows of x with 1-bit and with ternary weights (format.h) by binary tensor cores.
//
// The 128 bits of a group are one row of a binary product as they lie in memory: nothing is unpacked. Per row of x and group, x
// becomes fixed point of 16 bits (24 with fp32) below a power of two; each bit plane is one column of the product, whose AND
// and population count are exact. The planes of a group belong to the same scale, so that only their weighted sum meets a
// float.
//
// Codes of two bits are two columns of bits side by side: the low bits meet x, the high bits 2 x, and what they sum up to is
// the codes times x. A group below is 128 bits, then: 64 weights, two groups to a scale.
//
// One block per multiprocessor takes tiles of 16 rows of the weight; its warps share a tile's groups (p.shares of them work on
// one tile, each with a ring of its own in shared memory), and x is prepared while the first weights are on their way.
//
// Compile-time: TYPE, INPUTS (rows of x), WARPS, STAGES, WEIGHT_BITS.
#include "device.cuh"

namespace tqext::cuda {
namespace {

constexpr int kType = TYPE, kInputs = INPUTS, kStages = STAGES;
constexpr int kWarps = WARPS, kThreads = 32 * kWarps;
constexpr int kSets = kType == kTypeFloat32 ? 3 : 2;  // of eight bit planes
constexpr int kBits = 8 * kSets, kWeightBits = WEIGHT_BITS;
constexpr int kGroups = kMatvecGroups;  // of a stage
constexpr Q1MatvecLayout kLayout(kInputs, kType == kTypeFloat32, kWarps, kStages);

// Integers below 2^22 become floats by an addition to this (its bits: 3/2 * 2^23 in units of one).
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// Bit l of lane k becomes bit k of lane l.
TQ_DEVICE uint32_t transpose_bits(uint32_t x, int lane) {
  constexpr uint32_t kLow[5] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};
#pragma unroll
  for (int i = 4; i >= 0; i--) {
    const int step = 1 << i;
    const uint32_t low = kLow[i], y = __shfl_xor_sync(kAllLanes, x, step);
    x = (lane & step) ? (x & ~low) | (y >> step & low) : (x & low) | (y & low) << step;
  }
  return x;
}

// What the lanes multiply the weights of one group with.
struct Column {
  int start;     // completes the lane's sum
  float factor;  // of the lane's sum
};

// Several units (a row of x in one group) of a warp side by side: each is a chain of waiting.
constexpr int kBatch = 3;
struct Batch {
  float x[kBatch][4];

  // Units first, first + kWarps, ...; what does not exist is zero.
  TQ_DEVICE void load(const Q1MatvecParams& p, int first, int lane) {
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      const int unit = first + kWarps * u, group = unit / kInputs, input = unit % kInputs;
      const bool there = group < p.n_groups && input < p.n_inputs;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = (kQ1Group * group + 32 * i + lane) / kWeightBits;
        const int64_t at = input * p.x_stride[0] + int64_t(column) * p.x_stride[1];
        x[u][i] = there ? load_element<kType>(p.x, at) : 0.0f;
      }
    }
  }

  // Bit planes and factors into shared memory.
  TQ_DEVICE void store(const Q1MatvecParams& p, char* shared, int first, int lane) const {
    int q[kBatch][4], total[kBatch], exponent[kBatch];
    bool finite[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      uint32_t top = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) top = max(top, __float_as_uint(x[u][i]) & 0x7fffffffu);
      top = __reduce_max_sync(kAllLanes, top);
      finite[u] = top < 0x7f800000u;
      exponent[u] = min(max(int(top >> 23) - 126, -100), 128);  // below 2^exponent
      const float up = power_of_two(kBits - kWeightBits - exponent[u]);
      constexpr int kLimit = (1 << (kBits - kWeightBits)) - 1;
      total[u] = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        q[u][i] = min(__float2int_rn(x[u][i] * up), kLimit);
        total[u] += q[u][i];
        if (kWeightBits == 2 && lane % 2) q[u][i] *= 2;
      }
      total[u] = __reduce_add_sync(kAllLanes, total[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      // Fragment: lane 4 n + i holds word i of plane n of each set.
      uint32_t words[4];
      if constexpr (kSets == 2) {
        words[0] = transpose_bits((q[u][0] & 0xffff) | q[u][1] << 16, lane);
        words[1] = transpose_bits((q[u][2] & 0xffff) | q[u][3] << 16, lane);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = transpose_bits(q[u][i], lane);
      }
      const int unit = first + kWarps * u;
      if (unit / kInputs >= p.n_groups) break;
      char* record = shared + kLayout.x_at + unit * kLayout.record;
      uint32_t* to = reinterpret_cast<uint32_t*>(record) + 4 * (lane & 7) * kLayout.sets + (lane >> 3) % (kSets == 2 ? 2 : 4);
      if constexpr (kSets == 2) {
        to[(lane >> 4) * kLayout.sets] = words[0];
        to[(2 + (lane >> 4)) * kLayout.sets] = words[1];
      } else if (lane < kBits) {
#pragma unroll
        for (int i = 0; i < 4; i++) to[i * kLayout.sets] = words[i];
      }
      // The result is twice the sum where bits are set less the sum of all: of all x, and of x and x for the two bits of a
      // code. Lanes j of a quad count in units of 4^j: two of them share the total, so that it stays small.
      if (lane < 4) {
        Column column;
        column.start = lane == 0 ? -(total[u] & 3) : lane == 1 ? -(total[u] >> 2) : 0;
        if constexpr (kSets == 2) column.start += kMagicBits;
        // Not finite: no sum with it is.
        const int unit_bits = kSets == 2 ? 2 * lane : 0;
        column.factor = finite[u] ? power_of_two(exponent[u] - (kBits - 1) + unit_bits) : __int_as_float(0x7fc00000);
        reinterpret_cast<Column*>(record + 32 * kLayout.sets * 4)[lane] = column;
      }
    }
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) q1_matvec(const __grid_constant__ Q1MatvecParams p) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x >> 5, 0);
  const int share = warp % p.shares, seat = warp / p.shares, n_seats = kWarps / p.shares;
  const int n_tiles = (p.n_rows + 15) / 16, first_tile = blockIdx.x * n_seats + seat, tile_step = gridDim.x * n_seats;
  const int begin = min(share * p.share_groups, p.n_groups), end = min(begin + p.share_groups, p.n_groups);
  const int n_chunks = (end - begin + kGroups - 1) / kGroups;

  // The warp's ring. A stage: 16 rows of 8 groups of 16 bytes, the bytes of row r in places exchanged by r, so that one column
  // of eight rows lies in all banks; then 16 rows of 8 scales.
  char* ring = shared + warp * kStages * kLayout.stage;
  int tile = first_tile, chunk = 0, stage = 0;
  auto request = [&] {
    if (tile < n_tiles && n_chunks > 0) {
      const int group0 = begin + chunk * kGroups, n = min(kGroups, end - group0);
      const uint32_t to = shared_address(ring + stage * kLayout.stage);
      const int group = lane & 7;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int r = 4 * k + (lane >> 3), row = min(16 * tile + r, p.n_rows - 1);
        if (group < n) {
          copy_async(to + 128 * r + 16 * (group ^ (r & 7)), p.weight + row * p.weight_stride + kQ1Words * (group0 + group));
        }
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int r = 8 * k + (lane >> 2), row = min(16 * tile + r, p.n_rows - 1);
        if (2 * kWeightBits * j < n) {
          copy_async_word(to + 2048 + 16 * r + 4 * j, p.scales + row * p.scale_stride + group0 / kWeightBits + 2 * j, 4);
        }
      }
      if (++chunk == n_chunks) {
        chunk = 0;
        tile += tile_step;
      }
    }
    copy_async_commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  };
  Batch batch;
  batch.load(p, warp, lane);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) request();
#pragma unroll 1
  for (int unit = warp; unit < p.n_groups * kInputs; unit += kWarps * kBatch) {
    if (unit != warp) batch.load(p, unit, lane);
    batch.store(p, shared, unit, lane);
  }
  __syncthreads();

  const int top_factor = (j == 3 ? -4 : 4) << 8 * (kSets - 1);  // the last plane counts down: two's complement
  const uint32_t row_of_lane = (lane & 7) + (lane & 8), group_of_lane = lane >> 4;
  const uint32_t weights_at = 128 * row_of_lane + 16 * (group_of_lane ^ (lane & 7));
  const char* records = shared + kLayout.x_at;
  int used = 0;
#pragma unroll 1
  for (int mine = first_tile, round = 0; mine < n_tiles; mine += tile_step, round++) {
    float sum[kInputs][2] = {};
#pragma unroll 1
    for (int c = 0; c < n_chunks; c++) {
      copy_async_wait<kStages - 2>();
      __syncwarp();
      request();
      const char* data = ring + used * kLayout.stage;
      used = used + 1 == kStages ? 0 : used + 1;
      const int group0 = begin + c * kGroups, n = min(kGroups, end - group0);
      const uint4 scales[2] = {*reinterpret_cast<const uint4*>(data + 2048 + 16 * g),
                               *reinterpret_cast<const uint4*>(data + 2048 + 16 * (g + 8))};
#pragma unroll
      for (int t = 0; t < kGroups; t += 2) {
        if (t >= n) break;
        uint32_t w[2][2];
        load_matrices(w[0][0], w[0][1], w[1][0], w[1][1], shared_address(data) + (weights_at ^ (16 * t)));
        constexpr int kPerWord = 2 * kWeightBits;  // groups
        uint32_t pairs[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          pairs[r] = t / kPerWord == 0   ? scales[r].x
                     : t / kPerWord == 1 ? scales[r].y
                     : t / kPerWord == 2 ? scales[r].z
                                         : scales[r].w;
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int shift = 16 * ((t + k) / kWeightBits % 2);
          const float scale[2] = {half_to_float(uint16_t(pairs[0] >> shift)), half_to_float(uint16_t(pairs[1] >> shift))};
#pragma unroll
          for (int input = 0; input < kInputs; input++) {
            const char* record = records + ((group0 + t + k) * kInputs + input) * kLayout.record;
            uint32_t planes[kSets];
            if constexpr (kSets == 2) {
              const uint2 y = reinterpret_cast<const uint2*>(record)[lane];
              planes[0] = y.x, planes[1] = y.y;
            } else {
              const uint4 y = reinterpret_cast<const uint4*>(record)[lane];
              planes[0] = y.x, planes[1] = y.y, planes[2] = y.z;
            }
            const Column column = reinterpret_cast<const Column*>(record + 32 * kLayout.sets * 4)[j];
            int counts[kSets][4];  // columns 2 j, 2 j + 1 of row g, then of row g + 8
#pragma unroll
            for (int s = 0; s < kSets; s++) multiply_bits(counts[s], w[k][0], w[k][1], planes[s]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
              uint32_t value = column.start;
#pragma unroll
              for (int s = 0; s < kSets; s++) {
                value += counts[s][2 * r] << (8 * s + 1);
                value += counts[s][2 * r + 1] * (s == kSets - 1 ? top_factor : 4 << 8 * s);
              }
              float exact;
              if constexpr (kSets == 2) {
                exact = __uint_as_float(value) - kMagic;
              } else {
                // What the lanes count cancels in part: with fp32 that is added up before it is rounded.
                value <<= 2 * j;
                value += __shfl_xor_sync(kAllLanes, value, 1);
                value += __shfl_xor_sync(kAllLanes, value, 2);
                exact = float(int(value));
              }
              sum[input][r] = fmaf(exact * column.factor, scale[r], sum[input][r]);
            }
          }
        }
      }
    }
    // Add up the quad, then the shares of the tile.
    float* partial = reinterpret_cast<float*>(shared + kLayout.partial_at) + (round & 1) * kWarps * kInputs * 16;
#pragma unroll
    for (int input = 0; input < kInputs; input++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if constexpr (kSets == 3) break;  // every lane has all of it
        float y = sum[input][r];
        y += __shfl_xor_sync(kAllLanes, y, 1);
        y += __shfl_xor_sync(kAllLanes, y, 2);
        sum[input][r] = y;
      }
    }
    if (p.shares == 1) {
#pragma unroll
      for (int input = 0; input < kInputs; input++) {
        const int row = 16 * mine + 8 * (j & 1) + g;
        if (input < p.n_inputs && j < 2 && row < p.n_rows) {
          store_element<kType>(p.out, int64_t(input) * p.n_rows + row, j ? sum[input][1] : sum[input][0]);
        }
      }
    } else {
#pragma unroll
      for (int input = 0; input < kInputs; input++) {
        if (j < 2) partial[(warp * kInputs + input) * 16 + 8 * j + g] = j ? sum[input][1] : sum[input][0];
      }
      // Two halves of the buffer take turns: who writes one again has met its reader at the barrier between.
      barrier_of_threads(1 + seat, 32 * p.shares);
      for (int i = 32 * share + lane; i < 16 * kInputs; i += 32 * p.shares) {
        const int input = i / 16, row = 16 * mine + i % 16;
        if (input >= p.n_inputs || row >= p.n_rows) continue;
        float y = 0;
        for (int s = 0; s < p.shares; s++) y += partial[(seat * p.shares + s) * kInputs * 16 + i];
        store_element<kType>(p.out, int64_t(input) * p.n_rows + row, y);
      }
    }
  }
  copy_async_wait<0>();
}

}  // namespace tqext::cuda
