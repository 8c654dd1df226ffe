// What crosses from the host to a Metal kernel: argument structs, buffer indices, ids of function constants.
#pragma once

#if !defined(__METAL_VERSION__)
#include <stdint.h>
namespace tqext {
#endif

// Elements between two batches, heads and tokens of a packed array; its last axis is contiguous. Parameters of value groups
// count (scale, bias) pairs.
struct Strides3 {
  int64_t batch, head, token;
};

// Vectors, means and masks: the last axis may be strided too. A token of the means is a block.
struct Strides4 {
  int64_t batch, head, token, last;
};

// The balance of the keys' channels.
struct BalanceStrides {
  int64_t head, last;
};

// turboquant_attention and latent_attention. "Rows" are the query rows of one KV head, n_rows = n_repeats * n_queries; row r is
// query r % n_queries of query head r / n_queries.
struct AttentionParams {
  Strides4 q, means, first_keys, first_values, tail_keys, tail_values, mask, indices;
  Strides3 key_codes, key_norms, key_signs, residual_norms, value_codes, value_params;
  BalanceStrides balance;
  int32_t n_kv_heads, n_rows, n_queries;
  int32_t head_dim, value_dim;  // as the model has them, not padded
  int32_t n_first, n_coded, n_tail;
  int32_t n_ranges, range_tokens;  // of coded tokens: partial results of a KV head, tokens of a threadgroup
  int32_t n_exact_ranges;          // kExactRange each, or all
  int32_t n_listed, n_lists;       // tokens of a list, of which ranges are then; lists of a KV head: 1 or n_queries
  int32_t n_parts;                 // partial results of a KV head, coded ranges first
  int32_t row_blocks;              // matrix kernel: blocks of 8 rows that share a staged tile
  int32_t group_words;             // matrix kernel: threadgroup memory of the simdgroups that share a tile
  float score_scale;               // scale * log2(e)
  float residual_scale;            // score_scale * sqrt(pi / 2) / sqrt(padded head_dim)
  float key_rotation_scale;        // 1 / sqrt(padded head_dim)
  float value_rotation_scale;      // 1 / sqrt(padded value_dim)
  int8_t codebook[16];             // levels
  int8_t value_codebook[16];       // kValueLloyd
};

enum : int {
  kExactTokens = 128,  // most exact tokens of a threadgroup that attends to coded ones too
  kExactRange = 32,    // exact tokens of a threadgroup with no others: four for each of eight simdgroups
  kStagedBlocks = 8,   // matrix and prompt kernels: means that are multiplied with the queries at once
  kPromptDim = 128,    // prompt kernel: above it two simdgroups share eight rows
  kLatentRows = 16,    // latent kernel: rows of a threadgroup
  kLatentTile = 16,    // coded tokens of a tile
};

enum AttentionBuffer : int {
  kAttentionQueries,
  kAttentionKeyCodes,
  kAttentionKeyNorms,
  kAttentionValueCodes,
  kAttentionValueParams,
  kAttentionMeans,
  kAttentionBalance,
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
  kAttentionIndices,
  kAttentionOut,
  kAttentionParts,   // fp32 [batch, n_kv_heads, n_parts, n_rows, padded value_dim]
  kAttentionStates,  // fp32 [batch, n_kv_heads, n_parts, n_rows, 2]: running maximum (base 2) and sum
  kAttentionParams,
};

// Function constants: features that a pipeline is specialised on.
enum FunctionConstant : int {
  kConstHadamard,     // bool: rotate inside
  kConstMeans,        // int: MeansKind
  kConstBalance,      // bool
  kConstResidual,     // bool: residual signs
  kConstMask,         // int: MaskKind
  kConstSinks,        // bool
  kConstLeftPadding,  // bool
  kConstLengths,      // bool
  kConstCausal,       // bool
  kConstIndices,      // bool: coded tokens are those of a list
  kConstDirect,       // bool: one threadgroup per KV head writes the result
  kNumFunctionConstants,
};

enum MaskKind : int { kMaskNone, kMaskBool, kMaskFloat };
enum MeansKind : int { kMeansNone, kMeansHalf, kMeansFloat };

// quantize_keys, quantize_values, dequantize, rotate: one simdgroup per token.
struct EncodeParams {
  Strides4 in;  // vectors, or codes (last = 1)
  Strides4 means;
  Strides3 in_params;  // norms or value parameters; dequantize only
  BalanceStrides balance;
  int32_t n_heads, n_tokens, n_rows;  // n_rows = batch * n_heads * n_tokens
  int32_t head_dim;                   // of the vectors, not padded
  int32_t flags;                      // EncodeFlag
  float rotation_scale;               // 1 / sqrt(padded head_dim)
  float boundaries[16];               // between the levels of a unit vector; the last one is not used
  int8_t codebook[16];                // levels
};

enum EncodeFlag : int {
  kEncodeHadamard = 1,
  kEncodeMeans = 2,
  kEncodeFloatMeans = 4,  // with kEncodeMeans: fp32, else fp16
  kEncodeBalance = 8,
  kEncodeResidual = 16,
  kEncodeInverse = 32,
};

enum EncodeBuffer : int {
  kEncodeIn,        // vectors; codes for dequantize
  kEncodeInParams,  // dequantize: norms or value parameters
  kEncodeMeanVectors,
  kEncodeBalanceVectors,
  kEncodeOut,        // codes; vectors for dequantize and rotate
  kEncodeOutParams,  // norms or value parameters
  kEncodeSigns,
  kEncodeResidualNorms,
  kEncodeParams,
};

#if !defined(__METAL_VERSION__)
static_assert(sizeof(Strides3) == 24 && sizeof(Strides4) == 32, "same layout on every backend");
static_assert(sizeof(AttentionParams) == 8 * 32 + 6 * 24 + 16 + 16 * 4 + 4 * 4 + 2 * 16, "same layout on every backend");
static_assert(sizeof(EncodeParams) == 2 * 32 + 24 + 16 + 6 * 4 + 16 * 4 + 16, "same layout on every backend");
}  // namespace tqext
#endif
