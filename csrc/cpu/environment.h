// The environment variables of the CPU kernels.
#pragma once

#include "isa.h"
#include "log.h"
#include "mlx/stream.h"
#include "parallel.h"

namespace tqext::cpu {

// Throws if TQEXT_LOG is wrong, or TQEXT_ISA or TQEXT_NUM_THREADS is and the stream's kernels would read them. For the
// operators' checks: an error on the stream's own thread would come out of a later call, as another type.
inline void check_environment(const mlx::core::Stream& stream) {
  logs_kernels();
  if (stream.device != mlx::core::Device::cpu) return;
  active_isa();
  num_threads();
}

}  // namespace tqext::cpu
