// store_tokens: all arrays of a cache in one launch.
#include "device.cuh"

namespace tqext::cuda {
namespace {

template <class Unit>
TQ_DEVICE void copy(const TokenStoreParams& p) {
  const uint32_t n = uint32_t(p.room) * uint32_t(p.columns);
  for (int64_t head = blockIdx.z; head < p.n_heads_in_all; head += gridDim.z) {
    const int64_t b = head / p.n_heads, h = head % p.n_heads;
    Unit* out = static_cast<Unit*>(p.out) + head * p.room * p.columns;
    for (uint32_t i = blockIdx.x * kStoreThreads + threadIdx.x; i < n; i += gridDim.x * kStoreThreads) {
      const uint32_t token = i / uint32_t(p.columns), c = i - token * uint32_t(p.columns);
      const int64_t t = token;
      Unit x{};
      if (t < p.kept) {
        x = static_cast<const Unit*>(p.buffer)[b * p.stride[0] + h * p.stride[1] + t * p.stride[2] + c * p.stride[3]];
      } else if (t < p.kept + p.n_added) {
        x = static_cast<const Unit*>(
            p.added)[b * p.added_stride[0] + h * p.added_stride[1] + (t - p.kept) * p.added_stride[2] + c * p.added_stride[3]];
      }
      out[i] = x;
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kStoreThreads) store_tokens(const __grid_constant__ TokenStoresParams all) {
  const TokenStoreParams& p = all.stores[blockIdx.y];
  if (p.unit == 16) {
    copy<uint4>(p);
  } else if (p.unit == 4) {
    copy<uint32_t>(p);
  } else {
    copy<uint16_t>(p);
  }
}

}  // namespace tqext::cuda
