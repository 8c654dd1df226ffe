// The instruction sets that kernels exist for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "core_api.h"

namespace tqext::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kNeon, kNeonDotprod };

TQ_CORE const char* isa_name(Isa isa);

// Those this machine can run, slowest first.
TQ_CORE std::vector<Isa> available_isas();

// The fastest one, or the one that the environment variable TQEXT_ISA names; decided at the first call.
// An unknown or unavailable name is an error.
TQ_CORE Isa active_isa();

}  // namespace tqext::cpu
