// What differs between the MLX releases that are supported (scripts/mlx_releases.py). Nothing else asks for a version.
#pragma once

#include <functional>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/version.h"

// As MLX_VERSION_NUMERIC is made.
#define TQ_MLX_AT_LEAST(major, minor, patch) (MLX_VERSION_NUMERIC >= 100000 * (major) + 1000 * (minor) + (patch))

namespace tqext {

namespace mx = mlx::core;

// Gives an array memory that is not from MLX's allocator. release is called with the buffer when no array holds it any more.
inline void set_foreign_data(mx::array& x, mx::allocator::Buffer buffer, std::function<void(mx::allocator::Buffer)> release) {
#if TQ_MLX_AT_LEAST(0, 32, 4)
  x.set_data(mx::allocator::Data(buffer, std::move(release)));
#else
  x.set_data(buffer, std::move(release));
#endif
}

// Whether MLX's CUDA library exports its command encoder, through which kernels are launched.
inline constexpr bool kHasCudaEncoder = TQ_MLX_AT_LEAST(0, 32, 4);

}  // namespace tqext
