// word_sum: the words of all arrays of a state, each mixed with its place, summed in one launch.
#include "device.cuh"

namespace tqext::cuda {
namespace {

TQ_DEVICE uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kSumThreads) word_sum(const __grid_constant__ WordSumParams p) {
  const WordSumArray& x = p.arrays[blockIdx.y];
  const int64_t n = x.n_rows * x.n_words;
  uint32_t sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kSumThreads) {
    const int64_t row = i / x.n_words;
    const uint32_t w = uint32_t(i - row * x.n_words);
    const int64_t at = row / x.heads * x.stride[0] + row % x.heads * x.stride[1];
    auto element = [&](uint32_t e) {
      const uint32_t token = e / uint32_t(x.columns);
      return at + int64_t(token) * x.stride[2] + int64_t(e - token * x.columns) * x.stride[3];
    };
    uint32_t word;
    if (x.kind == 0) {
      word = static_cast<const uint32_t*>(x.data)[element(w)];
    } else {
      const auto* halves = static_cast<const uint16_t*>(x.data);
      word = x.kind == 2 ? uint32_t(halves[element(w)])
             : x.aligned ? *reinterpret_cast<const uint32_t*>(halves + element(2 * w))
                         : uint32_t(halves[element(2 * w)]) | uint32_t(halves[element(2 * w + 1)]) << 16;
    }
    sum += mixed(word ^ (uint32_t(row) * 0x9E3779B1u + (x.start + w) * 0x85EBCA77u + x.place * 0xC2B2AE3Du));
  }
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
  if ((threadIdx.x & 31) == 0) atomicAdd(p.total, sum);
  __threadfence();
  __syncthreads();
  // The last block of all gives the result, and leaves zeros behind.
  if (threadIdx.x == 0 && atomicAdd(p.n_done, 1u) + 1 == gridDim.x * gridDim.y) {
    __threadfence();
    for (int i = 0; i < p.n_numbers; i++) p.out[i] = uint32_t(p.numbers[i]);
    p.out[p.n_numbers] = atomicExch(p.total, 0u) + p.constant + (p.previous ? *p.previous : 0u);
    *p.n_done = 0;
  }
}

}  // namespace tqext::cuda
