// The texts that NVRTC compiles.
#pragma once

#include <span>

#include "core_api.h"

namespace tqext::cuda {

struct Source {
  const char* name;
  const char* text;
};

TQ_CORE std::span<const Source> kernel_sources();

}  // namespace tqext::cuda
