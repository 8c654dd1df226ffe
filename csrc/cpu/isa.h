// The instruction sets that kernels exist for, and the one in use.
#pragma once

#include <string>
#include <vector>

namespace tqext::cpu {

enum class Isa { kPortable, kAvx2, kAvx512, kNeon, kNeonDotprod };

const char* isa_name(Isa isa);

// Those this machine can run, slowest first.
std::vector<Isa> available_isas();

// The fastest one, or the one that the environment variable TQEXT_ISA names; decided at the first call.
// An unknown or unavailable name is an error.
Isa active_isa();

}  // namespace tqext::cpu
