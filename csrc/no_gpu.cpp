// eval_gpu of every operation in a build without a GPU backend.
#include <stdexcept>
#include <string>

#include "gpu_memory.h"
#include "pipelines.h"
#include "q1_matmul.h"
#include "q1_quantize.h"
#include "rotate.h"
#include "store_tokens.h"
#include "ternary_matmul.h"
#include "turboquant_attention.h"
#include "turboquant_encode.h"
#include "word_sum.h"

namespace tqext {

namespace {
[[noreturn]] void no_gpu(const std::string& name) {
  throw std::runtime_error("[" + name +
                           "] stream: expected a CPU stream, got a GPU stream; this build of tqext has no GPU backend");
}
}  // namespace

void Rotate::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("rotate"); }
void QuantizeKeys::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) { no_gpu("quantize_keys"); }
void QuantizeValues::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) { no_gpu("quantize_values"); }
void Dequantize::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("dequantize"); }
void TurboQuantAttention::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("turboquant_attention"); }
void StoreTokens::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) { no_gpu("store_tokens"); }
void WordSum::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("word_sum"); }
void Q1Quantize::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) { no_gpu("q1_quantize"); }
void Q1Dequantize::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("q1_dequantize"); }
void Q1Matmul::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("q1_matmul"); }
void TernaryMatmul::eval_gpu(const std::vector<mx::array>&, mx::array&) { no_gpu("ternary_matmul"); }

bool gpu_has_kernel(const TurboQuantAttention::State&, const mx::array&) { return true; }
bool gpu_has_latent_kernel(int, int, int, mx::Stream) { return false; }
bool gpu_stores_tokens() { return false; }
bool gpu_sums_words() { return false; }
bool gpu_codes_blocks() { return false; }
bool gpu_multiplies_bits(const mx::array&, mx::Stream) { return true; }
size_t clear_gpu_memory() { return 0; }
std::vector<Pipeline> pipelines() { return {}; }
int prepare_pipelines(const LayerShapes&) { return 0; }

}  // namespace tqext
