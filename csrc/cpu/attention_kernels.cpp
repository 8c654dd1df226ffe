#include "attention_kernels.h"

namespace tqext::cpu {

AttentionKernels attention_kernels_of([[maybe_unused]] Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return {attend_coded_avx2, attend_exact_avx2, score_means_avx2};
    case Isa::kAvx512:
      return {attend_coded_avx512, attend_exact_avx512, score_means_avx512};
#elif defined(__aarch64__)
    case Isa::kNeon:
      return {attend_coded_neon, attend_exact_neon, score_means_neon};
    case Isa::kNeonDotprod:
      return {attend_coded_neon_dotprod, attend_exact_neon, score_means_neon};
#endif
    default:
      return {attend_coded_portable, attend_exact_portable, score_means_portable};
  }
}

const AttentionKernels& attention_kernels() {
  static const AttentionKernels kernels = attention_kernels_of(active_isa());
  return kernels;
}

}  // namespace tqext::cpu
