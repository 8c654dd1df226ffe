// How much scratch memory a stream gets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace tqext::cuda {

// Rows of the array that stands for it; MLX counts an axis in 32 bits, and scratch memory may have more words than that.
constexpr size_t kWorkspaceRow = size_t(1) << 16;

// Bytes of both parts, whole rows: at least those asked for. Doubled, so that they grow rarely; beyond 1 GiB in steps of it.
constexpr std::pair<size_t, size_t> workspace_sizes(size_t zeroed, size_t bytes) {
  constexpr size_t kStep = size_t(1) << 30;
  size_t zeros = kWorkspaceRow, size = size_t(1) << 22;
  while (zeros < zeroed) zeros *= 2;
  while (size < bytes && size < kStep) size *= 2;
  if (size < bytes) size = (bytes + kStep - 1) / kStep * kStep;
  return {zeros, size};
}

// Shape of an array of 32-bit words.
inline std::vector<int32_t> workspace_rows(size_t zeros, size_t size) {
  return {int32_t((zeros + size) / kWorkspaceRow), int32_t(kWorkspaceRow / 4)};
}

}  // namespace tqext::cuda
