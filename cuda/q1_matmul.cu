// 1-bit weights (format.h): q1_matmul, q1_quantize, q1_dequantize.
//
// q1_matmul, in two launches: q1_prepare turns x into fragments of tensor-core products, which every block of q1_matmul then
// copies. A block takes 16 * ROW_TILES rows of the weight and 8 * COLUMN_TILES columns; its eight warps share them as ROW_TILES
// tiles of rows times 8 / ROW_TILES shares of the groups. A weight bit in place in a 16-bit half is an fp16 subnormal, a power
// of two, and the factor of its place goes into x: one AND makes two fp16 factors of a tensor-core product, nothing is
// unpacked. Per row and group of 128, x is scaled by a power of two; an fp32 row takes two columns, its fp16 part and the rest.
//
// Compile-time: OPERATION, TYPE, ROW_TILES, COLUMN_TILES.
#include "device.cuh"

namespace tqext::cuda {
namespace {

constexpr int kType = TYPE;

}  // namespace

#if OPERATION == 0 || OPERATION == 3
namespace {

constexpr int kWarps = kQ1Warps, kThreads = 32 * kWarps, kRowTiles = ROW_TILES, kShares = kWarps / ROW_TILES;
constexpr int kColumnTiles = COLUMN_TILES, kColumns = 8 * kColumnTiles;
constexpr int kParts = kType == kTypeFloat32 ? 2 : 1;  // columns of a row of x
constexpr int kChunk = kQ1Chunk;                       // groups in shared memory at a time
constexpr int kShareGroups = kChunk / kShares;         // of one warp
// Rows of x are scaled to at most 2^6; times at most 2^9 for the place they stay in fp16.
constexpr int kTop = 6, kPlaceTop = 9, kRestShift = 11;

// Where bit b of a half goes: bits beyond fp16's ten fraction bits are shifted down by 6.
constexpr int place_of(int bit) { return bit < 10 ? bit : bit - 6; }

// x of kColumns columns and kChunk groups, as the blocks want it.
struct Prepared {
  uint2 fragments[kColumnTiles][kChunk][8][32];  // [step]: what lane 4 * column + j multiplies with
  float start[kColumns][kChunk];                 // minus half the sum of x, in the products' units
  float factor[kColumns][kChunk];
};
static_assert(sizeof(Prepared) == q1_prepared_bytes(kColumnTiles), "the host allocates it");

}  // namespace
#endif

#if OPERATION == 3
// A warp per row of x and group; rows that fill up the last columns are zero.
extern "C" __global__ void __launch_bounds__(kThreads) q1_prepare(const __grid_constant__ Q1Params p) {
  constexpr int kInputs = kColumns / kParts;
  const int lane = threadIdx.x & 31, k = lane >> 3, t = lane & 7;
  const int unit = blockIdx.x * kWarps + (threadIdx.x >> 5), input = unit / p.n_groups, group = unit % p.n_groups;
  const int n_chunks = (p.n_groups + kChunk - 1) / kChunk;
  if (input >= (p.n_inputs + kInputs - 1) / kInputs * kInputs) return;
  Prepared& to = static_cast<Prepared*>(p.prepared)[int64_t(input / kInputs) * n_chunks + group / kChunk];
  // Lane 8 k + t takes columns 32 k + 2 t, + 1, + 16, + 17 of the group: step t of lane k.
  const int64_t at = int64_t(input) * p.x_stride[0] + int64_t(kQ1Group * group + 32 * k + 2 * t) * p.x_stride[1];
  const int offsets[4] = {0, 1, 16, 17};
  float x[4], top = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[i] = input < p.n_inputs ? load_element<kType>(p.x, at + offsets[i] * p.x_stride[1]) : 0.0f;
    top = max_nan(top, fabsf(x[i]));
  }
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) top = max_nan(top, __shfl_xor_sync(kAllLanes, top, o));
  const int exponent = min(max(int(__float_as_uint(top) >> 23) - 126, -100), 128);  // top <= 2^exponent
  const bool finite = top < INFINITY;
  const float down = power_of_two(kTop - exponent);
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    float y[4], total = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float scaled = part == 0 ? x[i] * down : x[i];
      y[i] = half_to_float(float_to_half(scaled));
      x[i] = (scaled - y[i]) * power_of_two(kRestShift);
      total += y[i];
    }
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) total += __shfl_xor_sync(kAllLanes, total, o);
    const int column = kParts * (input % kInputs) + part;
    const float low = power_of_two(kPlaceTop - place_of(2 * t)), high = low * 0.5f;
    // A lane of the product is 4 * column + k.
    to.fragments[column / 8][group % kChunk][t][column % 8 * 4 + k] =
        make_uint2(pack_halves(y[0] * low, y[2] * low), pack_halves(y[1] * high, y[3] * high));
    if (lane == 0) {
      to.start[column][group % kChunk] = -total * power_of_two(-16);
      // Not finite: the whole row is.
      to.factor[column][group % kChunk] =
          finite ? power_of_two(16 - part * kRestShift) * power_of_two(exponent - kTop) : __int_as_float(0x7fc00000);
    }
  }
}
#endif

#if OPERATION == 0
extern "C" __global__ void __launch_bounds__(kThreads) q1_matmul(const __grid_constant__ Q1Params p) {
  extern __shared__ __align__(16) char memory[];
  const Prepared& shared = *reinterpret_cast<const Prepared*>(memory);
  const int lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x >> 5, 0), tile = warp % kRowTiles, share = warp / kRowTiles;
  const int row0 = (blockIdx.x * kRowTiles + tile) * 16, input0 = blockIdx.y * (kColumns / kParts);
  const int n_inputs = min(kColumns / kParts, p.n_inputs - input0), n_chunks = (p.n_groups + kChunk - 1) / kChunk;
  const bool there[2] = {row0 + g < p.n_rows, row0 + 8 + g < p.n_rows};
  const uint32_t* weight[2];
  const uint16_t* scales[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int64_t row = there[r] ? row0 + 8 * r + g : 0;
    weight[r] = p.weight + row * p.weight_stride[0] + j * p.weight_stride[1];
    scales[r] = p.scales + row * p.scale_stride[0];
  }

  float sum[kColumnTiles][4] = {};
  for (int first = 0; first < p.n_groups; first += kChunk) {
    const int n = min(kChunk, p.n_groups - first);
    // Ask for the weights before x is copied.
    uint32_t words[kShareGroups][2];
    float scale[kShareGroups][2];
#pragma unroll
    for (int i = 0; i < kShareGroups; i++) {
      const int group = first + share + kShares * i;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const bool mine = there[r] && share + kShares * i < n;
        words[i][r] = mine ? weight[r][int64_t(4 * group) * p.weight_stride[1]] : 0;
        scale[i][r] = mine ? half_to_float(scales[r][group * p.scale_stride[1]]) : 0.0f;
      }
    }
    __syncthreads();
    const char* from =
        static_cast<const char*>(p.prepared) + (int64_t(blockIdx.y) * n_chunks + first / kChunk) * int64_t(sizeof(Prepared));
#pragma unroll 4
    for (int i = threadIdx.x; i < int(sizeof(Prepared) / 16); i += kThreads) {
      copy_async(shared_address(memory) + 16 * i, from + 16 * i);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kShareGroups; i++) {
      const int group = share + kShares * i;
      if (group >= n) break;
      float c[kColumnTiles][4];
      float factor[kColumnTiles][2];
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          c[t][k] = c[t][2 + k] = shared.start[8 * t + 2 * j + k][group];
          factor[t][k] = shared.factor[8 * t + 2 * j + k][group];
        }
      }
      const uint32_t shifted[2] = {words[i][0] >> 6, words[i][1] >> 6};
#pragma unroll
      for (int step = 0; step < 8; step++) {
        const int bit = 2 * step, place = place_of(bit);
        const uint32_t a = bit < 10 ? words[i][0] : shifted[0], b = bit < 10 ? words[i][1] : shifted[1];
        const uint32_t low = 0x00010001u << place, high = 0x00020002u << place;
#pragma unroll
        for (int t = 0; t < kColumnTiles; t++) {
          const uint2 y = shared.fragments[t][group][step][lane];
          multiply_half(c[t], a & low, b & low, a & high, b & high, y.x, y.y);
        }
      }
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          sum[t][k] = fmaf(c[t][k], scale[i][0] * factor[t][k], sum[t][k]);
          sum[t][2 + k] = fmaf(c[t][2 + k], scale[i][1] * factor[t][k], sum[t][2 + k]);
        }
      }
    }
  }

  // Add up the shares.
  if constexpr (kShares > 1) {
    __syncthreads();
    float* partial = reinterpret_cast<float*>(memory);  // [warp][column tile][4][lane]
#pragma unroll
    for (int t = 0; t < kColumnTiles; t++) {
#pragma unroll
      for (int k = 0; k < 4; k++) partial[((warp * kColumnTiles + t) * 4 + k) * 32 + lane] = sum[t][k];
    }
    __syncthreads();
    if (share != 0) return;
#pragma unroll
    for (int s = 1; s < kShares; s++) {
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++) {
#pragma unroll
        for (int k = 0; k < 4; k++) sum[t][k] += partial[(((s * kRowTiles + tile) * kColumnTiles + t) * 4 + k) * 32 + lane];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kColumnTiles; t++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!there[r]) continue;
      const int row = row0 + 8 * r + g;
      if constexpr (kParts == 2) {
        const int input = 4 * t + j;
        if (input < n_inputs) {
          store_element<kType>(p.out, int64_t(input0 + input) * p.n_rows + row, sum[t][2 * r] + sum[t][2 * r + 1]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int input = 8 * t + 2 * j + k;
          if (input < n_inputs) store_element<kType>(p.out, int64_t(input0 + input) * p.n_rows + row, sum[t][2 * r + k]);
        }
      }
    }
  }
}
#endif

// A warp per group of 128 weights: lane l holds columns 32 i + l.
#if OPERATION == 1
extern "C" __global__ void q1_quantize(const void* w, uint32_t* weight, uint16_t* scales, int n_rows, int n_groups, int s0,
                                       int s1) {
  const int lane = threadIdx.x & 31;
  const int64_t unit = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (unit >= int64_t(n_rows) * n_groups) return;
  const int64_t row = unit / n_groups, group = unit % n_groups;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kQ1Words; i++) {
    const float x = load_element<kType>(w, row * s0 + (kQ1Group * group + 32 * i + lane) * s1);
    const uint32_t bits = __ballot_sync(kAllLanes, x >= 0);
    if (lane == 0) weight[unit * kQ1Words + i] = bits;
    sum += double(fabsf(x));
  }
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
  const double scale = sum / kQ1Group;
  if (lane == 0) scales[unit] = float_to_half(float(scale > TQ_HALF_MAX ? double(TQ_HALF_MAX) : scale));  // NaN passes
}
#endif

// A thread per eight weights.
#if OPERATION == 2
extern "C" __global__ void q1_dequantize(const uint32_t* weight, const uint16_t* scales, void* out, int n_rows, int n_groups,
                                         int w0, int w1, int s0, int s1) {
  constexpr int kParts = kQ1Group / 8;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int unit = int(i / kParts), part = int(i % kParts);
  if (i >= int64_t(n_rows) * n_groups * kParts) return;
  const int64_t row = unit / n_groups, group = unit % n_groups;
  const float scale = half_to_float(scales[row * s0 + group * s1]);
  const uint32_t bits = weight[row * w0 + (kQ1Words * group + part / 4) * w1] >> 8 * (part % 4);
  float y[8];
#pragma unroll
  for (int k = 0; k < 8; k++) y[k] = bits >> k & 1 ? scale : -scale;
  if constexpr (kType == kTypeFloat32) {
    float4* to = static_cast<float4*>(out) + 2 * i;
    to[0] = make_float4(y[0], y[1], y[2], y[3]);
    to[1] = make_float4(y[4], y[5], y[6], y[7]);
  } else {
    static_cast<uint4*>(out)[i] = make_uint4(pack_16bit<kType>(y[0], y[1]), pack_16bit<kType>(y[2], y[3]),
                                             pack_16bit<kType>(y[4], y[5]), pack_16bit<kType>(y[6], y[7]));
  }
}
#endif

}  // namespace tqext::cuda
