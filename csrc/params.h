// What crosses from the host to a Metal kernel: argument structs, buffer indices, ids of function constants.
#pragma once

#if !defined(__METAL_VERSION__)
#include <stdint.h>
namespace tqext {
#endif

// Elements between two batches, heads and tokens of a packed array; its last axis is contiguous. Value parameters count
// (scale, bias) pairs.
struct Strides3 {
  int64_t batch, head, token;
};

// Vectors and masks: the last axis may be strided too.
struct Strides4 {
  int64_t batch, head, token, last;
};

// Elements between two batches, heads and coordinates of the keys' mean.
struct MeanStrides {
  int64_t batch, head, last;
};

// turboquant_attention. "Rows" are the query rows of one KV head, n_rows = n_repeats * n_queries; row r is query
// r % n_queries of query head r / n_queries.
struct AttentionParams {
  Strides4 q, first_keys, first_values, tail_keys, tail_values, mask;
  Strides3 key_codes, key_norms, key_signs, residual_norms, value_codes, value_params;
  MeanStrides mean;
  int32_t n_kv_heads, n_rows, n_queries;
  int32_t head_dim, value_dim;  // as the model has them, not padded
  int32_t n_first, n_coded, n_tail;
  int32_t n_ranges, range_tokens;  // of coded tokens: partial results of a KV head, tokens of a threadgroup
  int32_t n_exact_ranges;          // kExactTokens each
  int32_t n_parts;                 // partial results of a KV head, coded ranges first
  int32_t row_blocks;              // matrix kernel: blocks of 8 rows that share a staged tile
  float score_scale;               // scale * log2(e)
  int8_t codebook[16];             // levels
};

enum : int {
  kExactTokens = 128,  // exact tokens per threadgroup: their scores fit the weights' threadgroup memory
};

enum AttentionBuffer : int {
  kAttentionQueries,
  kAttentionKeyCodes,
  kAttentionKeyNorms,
  kAttentionValueCodes,
  kAttentionValueParams,
  kAttentionMean,
  kAttentionKeySigns,
  kAttentionResidualNorms,
  kAttentionFirstKeys,
  kAttentionFirstValues,
  kAttentionTailKeys,
  kAttentionTailValues,
  kAttentionMask,
  kAttentionSinks,
  kAttentionLeftPadding,
  kAttentionLengths,
  kAttentionOut,
  kAttentionParts,   // fp32 [batch, n_kv_heads, n_parts, n_rows, padded value_dim]
  kAttentionStates,  // fp32 [batch, n_kv_heads, n_parts, n_rows, 2]: running maximum (base 2) and sum
  kAttentionParams,
};

// Function constants: features that a pipeline is specialised on.
enum FunctionConstant : int {
  kConstHadamard,     // bool: rotate inside
  kConstMean,         // bool
  kConstResidual,     // bool: residual signs
  kConstMask,         // int: MaskKind
  kConstSinks,        // bool
  kConstLeftPadding,  // bool
  kConstLengths,      // bool
  kConstCausal,       // bool
  kConstDirect,       // bool: one threadgroup per KV head writes the result
  kNumFunctionConstants,
};

enum MaskKind : int { kMaskNone, kMaskBool, kMaskFloat };

// quantize_keys, quantize_values, dequantize, rotate: one simdgroup per token.
struct EncodeParams {
  Strides4 in;         // vectors, or codes (last = 1)
  Strides3 in_params;  // norms or value parameters; dequantize only
  MeanStrides mean;
  int32_t n_heads, n_tokens, n_rows;  // n_rows = batch * n_heads * n_tokens
  int32_t head_dim;                   // of the vectors, not padded
  float codebook_scale;
  int32_t flags;  // EncodeFlag
  int8_t codebook[16];
};

enum EncodeFlag : int { kEncodeHadamard = 1, kEncodeMean = 2, kEncodeResidual = 4, kEncodeInverse = 8 };

enum EncodeBuffer : int {
  kEncodeIn,        // vectors; codes for dequantize
  kEncodeInParams,  // dequantize: norms or value parameters
  kEncodeMeanVector,
  kEncodeOut,        // codes; vectors for dequantize and rotate
  kEncodeOutParams,  // norms or value parameters
  kEncodeSigns,
  kEncodeResidualNorms,
  kEncodeParams,
};

#if !defined(__METAL_VERSION__)
static_assert(sizeof(Strides3) == 24 && sizeof(Strides4) == 32, "same layout on every backend");
static_assert(sizeof(AttentionParams) == 6 * 32 + 6 * 24 + 24 + 13 * 4 + 4 + 16, "same layout on every backend");
}  // namespace tqext
#endif
