// Products of a few rows of x with ternary weights (format.h), of any strides: what the binary tensor cores do not take.
//
// A warp per row of the weight and kTernaryInputs rows of x; a lane takes every 32nd word.
//
// Compile-time: TYPE.
#include "device.cuh"

namespace tqext::cuda {

extern "C" __global__ void __launch_bounds__(32 * kQ1Warps) ternary_matmul(const __grid_constant__ Q1Params p) {
  constexpr int kType = TYPE, kWordColumns = 16;
  const int lane = threadIdx.x & 31, row = blockIdx.x * kQ1Warps + (threadIdx.x >> 5);
  const int input0 = blockIdx.y * kTernaryInputs, n = min(int(kTernaryInputs), p.n_inputs - input0);
  if (row >= p.n_rows) return;
  float sum[kTernaryInputs] = {};
  for (int word = lane; word < kTernaryWords * p.n_groups; word += 32) {
    const uint32_t codes = p.weight[row * p.weight_stride[0] + word * p.weight_stride[1]];
    const float scale = half_to_float(p.scales[row * p.scale_stride[0] + word / kTernaryWords * p.scale_stride[1]]);
#pragma unroll
    for (int i = 0; i < kTernaryInputs; i++) {
      if (i >= n) break;
      const int64_t at = (input0 + i) * p.x_stride[0] + int64_t(kWordColumns * word) * p.x_stride[1];
      float part = 0;
#pragma unroll
      for (int c = 0; c < kWordColumns; c++) {
        // A product, so that NaN in x meets codes of zero too.
        part = fmaf(float(int(codes >> 2 * c & 3) - 1), load_element<kType>(p.x, at + c * p.x_stride[1]), part);
      }
      sum[i] = fmaf(scale, part, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTernaryInputs; i++) {
    if (i >= n) break;
    float y = sum[i];
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) y += __shfl_xor_sync(kAllLanes, y, o);
    if (lane == 0) store_element<kType>(p.out, int64_t(input0 + i) * p.n_rows + row, y);
  }
}

}  // namespace tqext::cuda
