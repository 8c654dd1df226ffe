#include "q1_matmul_kernels.h"

namespace tqext::cpu {

Q1MatmulKernel* matmul_kernel_of([[maybe_unused]] Isa isa, int bits) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return bits == 1 ? q1_matmul_avx2 : ternary_matmul_avx2;
    case Isa::kAvx512:
      return bits == 1 ? q1_matmul_avx512 : ternary_matmul_avx512;
#elif defined(__aarch64__)
    case Isa::kNeonDotprod:
      return bits == 1 ? q1_matmul_neon_dotprod : ternary_matmul_neon_dotprod;
#endif
    default:
      return bits == 1 ? q1_matmul_portable : ternary_matmul_portable;
  }
}

}  // namespace tqext::cpu
