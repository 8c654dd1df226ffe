// word_sum on Metal: composed of MLX's operations (tqext.state).
#include "word_sum.h"

#include <stdexcept>

namespace tqext {

bool gpu_sums_words() { return false; }

void WordSum::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::runtime_error("[word_sum] stream: expected a CPU stream, got a GPU stream; Metal has no kernel for it");
}

}  // namespace tqext
