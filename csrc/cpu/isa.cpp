#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__) && defined(__aarch64__)
#include <sys/sysctl.h>
#endif

namespace tqext::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
    case Isa::kNeonDotprod:
      return "neon_dotprod";
    default:
      return "portable";
  }
}

#if defined(__aarch64__)
namespace {

bool has_dotprod() {
#if defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#elif defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::kPortable};
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  // clang 14 does not know "f16c". The other checks also cover what the system saves of the registers.
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (avx2) isas.push_back(Isa::kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    isas.push_back(Isa::kAvx512);
  }
#elif defined(__aarch64__)
  isas.push_back(Isa::kNeon);  // part of the baseline
  if (has_dotprod()) isas.push_back(Isa::kNeonDotprod);
#endif
  return isas;
}

Isa active_isa() {
  static const Isa isa = [] {
    const std::vector<Isa> isas = available_isas();
    const char* wanted = std::getenv("TQEXT_ISA");
    if (!wanted || !*wanted) return isas.back();
    std::string names;
    for (Isa candidate : isas) {
      if (std::string(wanted) == isa_name(candidate)) return candidate;
      names += names.empty() ? isa_name(candidate) : std::string(", ") + isa_name(candidate);
    }
    throw std::invalid_argument("[tqext] TQEXT_ISA: expected one of " + names + " on this machine, got " + wanted);
  }();
  return isa;
}

}  // namespace tqext::cpu
