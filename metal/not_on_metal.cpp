// Operations without a Metal kernel: Python composes them of MLX's own.
#include <stdexcept>
#include <string>

#include "store_tokens.h"
#include "word_sum.h"

namespace tqext {

namespace {
[[noreturn]] void refuse(const std::string& name) {
  throw std::runtime_error("[" + name + "] stream: expected a CPU stream, got a GPU stream; Metal has no kernel for it");
}
}  // namespace

bool gpu_stores_tokens() { return false; }
bool gpu_sums_words() { return false; }
void StoreTokens::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) { refuse("store_tokens"); }
void WordSum::eval_gpu(const std::vector<mx::array>&, mx::array&) { refuse("word_sum"); }

}  // namespace tqext
