#include "q1_matmul_kernels.h"

namespace tqext::cpu {

Q1MatmulKernel* q1_matmul_kernel_of([[maybe_unused]] Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return q1_matmul_avx2;
    case Isa::kAvx512:
      return q1_matmul_avx512;
#elif defined(__aarch64__)
    case Isa::kNeonDotprod:
      return q1_matmul_neon_dotprod;
#endif
    default:
      return q1_matmul_portable;
  }
}

Q1MatmulKernel* ternary_matmul_kernel_of([[maybe_unused]] Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return ternary_matmul_avx2;
    case Isa::kAvx512:
      return ternary_matmul_avx512;
#elif defined(__aarch64__)
    case Isa::kNeonDotprod:
      return ternary_matmul_neon_dotprod;
#endif
    default:
      return ternary_matmul_portable;
  }
}

}  // namespace tqext::cpu
