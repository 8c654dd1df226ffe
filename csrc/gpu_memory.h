// Device memory that a GPU backend keeps beside MLX's own.
#pragma once

#include <cstddef>

namespace tqext {

// Frees what is kept for later outputs; returns how many bytes.
size_t clear_gpu_memory();

}  // namespace tqext
