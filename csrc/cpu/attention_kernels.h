// Attention of a few query rows over one KV head's tokens: what every instruction set implements. Scores are in base 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core_api.h"
#include "format.h"
#include "isa.h"

namespace tqext::cpu {

// One KV head's packed bytes: token t is at pointer + t * stride, strides in elements; a token's words are contiguous.
struct CodedHead {
  const uint32_t* key_codes;
  const uint16_t* key_norms;
  const uint32_t* key_signs;  // null: no residual signs
  const uint16_t* residual_norms;
  const uint32_t* value_codes;
  const uint16_t* value_params;  // of groups, or one norm
  ptrdiff_t key_stride, norm_stride, sign_stride, residual_stride, value_stride, param_stride;
};

struct CodecShape {
  int key_dim, value_dim;  // padded
  int key_bits, value_bits;
  ValueCoding value_coding;
  int8_t codebook[kMaxKeyLevels];
  int8_t value_codebook[kMaxKeyLevels];  // kValueLloyd
  bool half_query;                       // the query came as fp16 or bf16: 16 bits of it are enough
};

enum class ExactType { kFloat32, kFloat16, kBFloat16 };

// One KV head's exact tokens, unrotated.
struct ExactHead {
  const void *keys, *values;
  ExactType type;
  int key_dim, value_dim;
  ptrdiff_t key_stride, value_stride;  // elements between tokens
};

struct QueryRows {
  int n_rows;
  const float* q;           // [n_rows][key_dim], times scale * log2(e); for coded tokens rotated (1 / 127 not included)
  const float* residual_q;  // [n_rows][key_dim] or null: rotate'(rotated q), times sqrt(pi / 2) / sqrt(key_dim)
  // Null, or [n_rows][offset_stride]: offset[r * offset_stride + t / kBlockTokens - first_block] is added to the score of token
  // t. Calls with offsets begin with a block, or stay within one.
  const float* offset;
  ptrdiff_t offset_stride;
  int first_block;
  const int* end;            // [n_rows]: row r attends to tokens below end[r]
  const float* const* bias;  // null, or per row: bias[r][t] is added to the score of token t; -inf: not attended
};

// Softmax state of one row over a range of tokens; nothing attended: max = -inf, sum = 0, out = 0.
struct Partial {
  float max, sum;
  float* out;  // [value_dim], for coded tokens in the rotated space; not divided by sum
};

// Sums of n fp32 terms may be off by n * 2^-25 of themselves, where all terms are alike. Kernels add up 64 or 128 tokens, then
// those sums, so a call's error is below 1e-5 up to this many tokens; the caller joins calls.
constexpr int kMostTokens = 8192;

// Tokens [begin, end). partials: [n_rows]; what they held is overwritten.
using AttendCoded = void (*)(const CodedHead&, const CodecShape&, const QueryRows&, int begin, int end, Partial* partials);
using AttendExact = void (*)(const ExactHead&, const QueryRows&, int begin, int end, Partial* partials);

// One KV head's means of blocks: block i at data + i * stride (elements), its numbers contiguous.
struct BlockMeans {
  const void* data;
  bool half;  // fp16, else fp32
  int dim;
  ptrdiff_t stride;
};
// offset [n_rows][n]: products of the rows q [n_rows][dim] with the means of blocks first ... first + n - 1.
using ScoreMeans = void (*)(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset);

struct AttentionKernels {
  AttendCoded attend_coded;
  AttendExact attend_exact;
  ScoreMeans score_means;
};

TQ_CORE AttentionKernels attention_kernels_of(Isa isa);  // isa must be one of available_isas()
TQ_CORE const AttentionKernels& attention_kernels();     // of active_isa()

void attend_coded_portable(const CodedHead&, const CodecShape&, const QueryRows&, int begin, int end, Partial* partials);
void attend_exact_portable(const ExactHead&, const QueryRows&, int begin, int end, Partial* partials);
void score_means_portable(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset);
#if defined(__x86_64__)
void attend_coded_avx2(const CodedHead&, const CodecShape&, const QueryRows&, int begin, int end, Partial* partials);
void attend_exact_avx2(const ExactHead&, const QueryRows&, int begin, int end, Partial* partials);
void score_means_avx2(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset);
void attend_coded_avx512(const CodedHead&, const CodecShape&, const QueryRows&, int begin, int end, Partial* partials);
void attend_exact_avx512(const ExactHead&, const QueryRows&, int begin, int end, Partial* partials);
void score_means_avx512(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset);
#elif defined(__aarch64__)
void attend_coded_neon(const CodedHead&, const CodecShape&, const QueryRows&, int begin, int end, Partial* partials);
void attend_exact_neon(const ExactHead&, const QueryRows&, int begin, int end, Partial* partials);
void score_means_neon(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset);
void attend_coded_neon_dotprod(const CodedHead&, const CodecShape&, const QueryRows&, int begin, int end, Partial* partials);
#endif

}  // namespace tqext::cpu
