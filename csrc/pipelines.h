// What a GPU backend says of the kernels that it has compiled in this process, for `tqext doctor --prove`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mlx/dtype.h"

namespace tqext {

namespace mx = mlx::core;

struct Pipeline {
  std::string name;      // of the kernel, with its constants
  double milliseconds;   // from the request to the pipeline: compiling, unless the system had it in its cache
  uint32_t max_threads;  // per threadgroup: fewer than the device's limit when a thread needs many registers
  uint32_t threads;      // per threadgroup, as first launched
  uint32_t simd_width;
  uint32_t threadgroup_bytes;  // static, without what a launch adds
};

// In the order of first use; empty but on Metal.
std::vector<Pipeline> pipelines();

// What a layer of a model asks of its cache.
struct LayerShapes {
  int n_q_heads, n_kv_heads, head_dim, value_dim;
  mx::Dtype query_dtype, token_dtype;
  int key_bits, value_bits, value_coding;
  std::string rotation;
  bool has_means, has_balance, has_residual, has_sinks, has_window;
  bool latent;  // its values are its keys
};

// Compiles what the generations of one sequence will launch, before the first of them; returns the number of pipelines. 0, and
// nothing is done, unless Metal is the default device. A rotation that is no Hadamard's is left to the first use.
int prepare_pipelines(const LayerShapes& layer);

}  // namespace tqext
