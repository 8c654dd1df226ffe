#include "attention_kernels.h"

#include "isa.h"

namespace tqext::cpu {

const AttentionKernels& attention_kernels() {
  static const AttentionKernels kernels = [] {
    switch (active_isa()) {
      default:
        return AttentionKernels{attend_coded_portable, attend_exact_portable};
    }
  }();
  return kernels;
}

}  // namespace tqext::cpu
