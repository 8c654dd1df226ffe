// What a GPU backend says of the kernels that it has compiled in this process, for `tqext doctor --prove`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tqext {

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

}  // namespace tqext
