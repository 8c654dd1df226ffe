// Arguments that cross from the CUDA host code to its kernels, by value.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <stdint.h>
#endif

namespace tqext::cuda {

enum : int { kTypeFloat32, kTypeFloat16, kTypeBFloat16 };
enum : int { kMeansNone, kMeansFloat16, kMeansFloat32 };
enum : int { kMaskNone, kMaskBool, kMaskFloat };

// Threads per block of the decode attention are 32 * kAttentionWarps; a warp takes tiles of kTileTokens coded tokens, a stage
// of the block's copy pipeline holds one tile for each warp. At most kMaxSlots partial results per head and row tile: one for
// each of kMaxSplits shares, and of each warp for each of kMaxExactBlocks chunks of exact tokens. Scores of block means are
// made for kMeanSteps tiles of a warp at a time, the columns of a tensor-core product.
enum : int { kAttentionWarps = 4, kTileTokens = 32, kMeanSteps = 8, kMaxSplits = 256, kMaxExactBlocks = 64 };
enum : int { kMaxSlots = kMaxSplits + kMaxExactBlocks * kAttentionWarps };
// Exact tokens of a block at a time, eight for each warp.
enum : int { kExactStep = 8 * kAttentionWarps };

// Warps, and so tokens, per block of the encoding kernels.
enum : int { kEncodeWarps = 4 };
enum : int {  // OPERATION
  kQuantizeKeys,
  kQuantizeValues,
  kDequantizeLevels,
  kDequantizeGroups,
  kRotate,
  kQuantizeValuesLloyd,
  kQuantizeBlocks,
};
// Warps of a block that codes a block of keys, and tokens of each.
enum : int { kBlockWarps = 16, kWarpTokens = 4 };

// Shared memory of the decode attention, in bytes; the host asks for `total`.
struct AttentionLayout {
  // One stage of the copy pipeline. Each array's part starts at a multiple of 16 bytes at or below its first byte, so
  // rows that are no multiple of 16 bytes need 16 more.
  int key_row, value_row, param_row, sign_row;  // bytes per token
  int value_at, param_at, norm_at, sign_at, residual_at, id_at, stage;
  // Over the last stage, which the prologue's prefetch leaves free: what only the prologue needs.
  int query_stride;  // floats between rows; no multiple of 32 banks
  int half_stride;   // bytes between rows of 16 bits; an odd multiple of half the banks
  int rotated_at, exact_query_at;
  // Behind all that: what the main loop needs. mean_query: fp16 rows for the products with means; with fp32 queries, then as
  // many rows of what rounding took off; mean: of kMeanSteps blocks, for each warp, where they are not too large for it.
  bool means_copied;
  int int8_at, residual_int8_at, row_scale_at, mean_scale_at, residual_scale_at, state_at, mean_query_at, mean_at;
  int mean_score_at, barrier_at, total;

  constexpr AttentionLayout(int key_dim, int value_dim, int key_bits, int value_bits, bool lloyd, int rows, int type,
                            bool signs, bool listed, int n_stages)
      : key_row(key_dim / 8 * key_bits),
        value_row(value_dim / 8 * value_bits),
        param_row(lloyd ? 2 : value_dim / 8),
        sign_row(key_dim / 8),
        value_at(tile(key_row)),
        param_at(value_at + tile(value_row)),
        norm_at(param_at + tile(param_row)),
        sign_at(norm_at + tile(2)),
        residual_at(sign_at + (signs ? tile(sign_row) : 0)),
        id_at(residual_at + (signs ? tile(2) : 0)),
        stage(id_at + (listed ? tile(4) : 0)),
        query_stride(key_dim + 4),
        half_stride(2 * key_dim + (key_dim % 64 ? 0 : 64)),
        rotated_at((n_stages - 1) * stage),
        exact_query_at(rotated_at + rows * query_stride * 4),
        means_copied(key_dim <= 128),
        int8_at(larger(larger(n_stages * stage, exact_query_at + rows * query_stride * 4),
                       larger(kAttentionWarps * rows * (value_dim + 4) * 4,              // the warps' sums, joined
                              (rows * (value_dim + 4) + (kMaxSlots + 2) * rows) * 4))),  // the blocks' sums and factors
        residual_int8_at(int8_at + rows * 2 * key_dim),
        row_scale_at(residual_int8_at + (signs ? rows * 2 * key_dim : 0)),
        mean_scale_at(row_scale_at + rows * 4),
        residual_scale_at(mean_scale_at + rows * 4),
        state_at(residual_scale_at + rows * 4),
        mean_query_at(state_at + kAttentionWarps * rows * 2 * 4),
        mean_at(mean_query_at + rows * half_stride * (type == kTypeFloat32 ? 2 : 1)),
        mean_score_at(mean_at + (means_copied ? kAttentionWarps * kMeanSteps * 2 * key_dim : 0)),
        barrier_at(mean_score_at + kAttentionWarps * kMeanSteps * rows * 4),
        total(barrier_at + 2 * n_stages * 8) {}

 private:
  static constexpr int tile(int row) { return kAttentionWarps * kTileTokens * row + (row % 16 ? 16 : 0); }
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
};

// Strides in elements; pointers are at the first element of the array's view.
struct AttentionParams {
  const void* q;                          // [B, n_q_heads, L, head_dim]
  const uint32_t* key_codes;              // [B, n_kv_heads, n_coded, words]
  const uint16_t* key_norms;              // [B, n_kv_heads, n_coded, 1]
  const uint32_t* value_codes;            // [B, n_kv_heads, n_coded, words]
  const uint16_t* value_params;           // [B, n_kv_heads, n_coded, 2 * groups], or norms [B, n_kv_heads, n_coded, 1]
  const uint32_t* signs;                  // [B, n_kv_heads, n_coded, words]
  const uint16_t* residual_norms;         // [B, n_kv_heads, n_coded, 1]
  const void* means;                      // [B, n_kv_heads, n_blocks, head_dim], or null
  const float* balance;                   // [n_kv_heads, head_dim], or null
  const void *first_keys, *first_values;  // [B, n_kv_heads, n_first, head_dim], or null
  const void *tail_keys, *tail_values;    // [B, n_kv_heads, n_tail, head_dim], or null
  const void* mask;                       // [B, n_q_heads, L, n_keys] bool or fp32, or null
  const float* sinks;                     // [n_q_heads], or null
  const int32_t* left_padding;            // [B], or null
  const int32_t* lengths;                 // [B, 3], or null
  const int32_t* indices;                 // [B, n_kv_heads, L, n_listed], or null
  void* out;                              // [B, n_q_heads, L, value_dim], contiguous
  float* partial_out;                     // [heads, row tiles, slots, rows, padded value_dim]
  float* partial_state;                   // [heads, row tiles, slots, rows, 2]: max, sum
  uint32_t* counters;                     // [heads, row tiles], zero before and after
  int64_t q_stride[4], key_code_stride[4], key_norm_stride[3], value_code_stride[4], value_param_stride[4];
  int64_t sign_stride[4], residual_norm_stride[3], mean_stride[4], balance_stride[2];
  int64_t first_key_stride[4], first_value_stride[4], tail_key_stride[4], tail_value_stride[4], mask_stride[4];
  int64_t sinks_stride, left_padding_stride, lengths_stride[2], index_stride[4];
  int32_t n_kv_heads, n_repeats, n_queries, head_dim, value_dim, n_first, n_coded, n_tail;
  // kMeansNone, ...; means_aligned: fp16 that can be loaded 16 bytes at a time.
  int32_t means_kind, means_aligned;
  // Blocks 0 ... n_exact_blocks - 1 of a head take a chunk of exact_tokens first; each warp has its own result. Such a block
  // takes exact_tiles less of the coded tiles, about as many as take as long.
  int32_t n_exact_blocks, exact_tokens, exact_tiles;
  int32_t causal, hadamard, exact_aligned;  // exact_aligned: 16-byte loads of the exact tokens are possible
  float scale;                              // times log2(e)
  uint32_t codebook[4];                     // 16 int8 levels; with 4 bits the first eight are lower by one (find_levels)
  uint32_t value_codebook[4];               // the same of values
  // 2^16 and 2^(32 - shift of value codes): shifts as multiplications, for which the compiler may not know the factor. They
  // run beside the logic and permutations that bound the kernel.
  uint32_t two_16, two_up;
  // Slots of a list; lists of a head, one or one for each query; row tiles of a list.
  int32_t n_listed, n_lists, row_tiles;
  // The output is fp32, with one column more: the log of the row's sum of weights.
  int32_t lse;
};

// word_sum. Arrays and numbers of a call at most; threads of a block.
enum : int { kMostSumArrays = 16, kMostSumNumbers = 32, kSumThreads = 256 };

struct WordSumArray {
  const void* data;
  int64_t n_rows, n_words, stride[4];
  int32_t heads, columns, kind, aligned;  // kind: SumRows::Kind; aligned: pairs can be loaded as words
  uint32_t start, place;
};

struct WordSumParams {
  WordSumArray arrays[kMostSumArrays];
  uint32_t *total, *n_done, *out;
  const uint32_t* previous;  // or null
  uint32_t constant;
  int32_t n_numbers, numbers[kMostSumNumbers];
};

// store_tokens. Arrays of a call at most; threads of a block.
enum : int { kMostStores = 12, kStoreThreads = 256 };

// Strides and columns in units of `unit` bytes: 16, 4 or 2.
struct TokenStoreParams {
  void* out;                   // [n_heads_in_all, room, columns]
  const void *buffer, *added;  // from the first token that is kept, or added
  int64_t stride[4], added_stride[4];
  int64_t n_heads_in_all;  // of all sequences
  int32_t n_heads, room, kept, n_added, columns, unit;
};

struct TokenStoresParams {
  TokenStoreParams stores[kMostStores];
};

// 1-bit weights. Warps per block, and groups at a time, of the matrix product; what OPERATION means in q1_matmul.cu
// and q1_gemm.cu.
enum : int { kQ1Warps = 8, kQ1Chunk = 8 };
enum : int { kQ1Multiply, kQ1Quantize, kQ1Dequantize, kQ1Prepare, kQ1GemmPrepare, kQ1Gemm };

// Rows of x that a warp of ternary_matmul.cu takes.
enum : int { kTernaryInputs = 8 };

struct Q1Params {
  const void* x;           // [n_inputs, 128 * n_groups]
  const uint32_t* weight;  // [n_rows, 4 * n_groups], of ternary weights 8 * n_groups
  const uint16_t* scales;  // [n_rows, n_groups]
  void* out;               // [n_inputs, n_rows], contiguous
  void* prepared;          // x as the product wants it: [blocks of columns][chunks of groups] of q1_prepared_bytes
  int64_t x_stride[2], weight_stride[2], scale_stride[2];
  int32_t n_inputs, n_rows, n_groups;
};

// x of 8 * column_tiles columns and kQ1Chunk groups: fragments, and two numbers per column and group. Also the shared memory of
// the matrix product.
constexpr int q1_prepared_bytes(int column_tiles) { return column_tiles * kQ1Chunk * (8 * 32 * 8 + 8 * 2 * 4); }

// Few rows of x: groups per stage of a warp's ring, rows of x at most.
enum : int { kMatvecGroups = 8, kMatvecInputs = 8 };

struct Q1MatvecParams {
  const void* x;           // [n_inputs, 128 * n_groups]
  const uint32_t* weight;  // [n_rows, 4 * n_groups], groups at multiples of 16 bytes
  const uint16_t* scales;  // [n_rows, n_groups], rows at multiples of 4 bytes
  void* out;               // [n_inputs, n_rows], contiguous
  int64_t x_stride[2], weight_stride, scale_stride;
  int32_t n_inputs, n_rows, n_groups;  // n_groups: even
  int32_t shares, share_groups;        // warps of a tile (a power of two); groups of each, even
};

// Shared memory, in bytes: the warps' rings, two halves of the shares' sums, and for each group and row of x its bit planes and
// the lanes' start and factor.
struct Q1MatvecLayout {
  int stage, sets, partial_at, x_at, record;

  constexpr Q1MatvecLayout(int inputs, bool is_float32, int warps, int stages)
      : stage(16 * kMatvecGroups * (16 + 2)),
        sets(is_float32 ? 4 : 2),  // three lie in four words
        partial_at(warps * stages * stage),
        x_at(partial_at + 2 * warps * inputs * 16 * 4),
        record(32 * sets * 4 + 4 * 8) {}
  constexpr int total(int n_groups, int inputs) const { return x_at + n_groups * inputs * record; }
};

// Many rows of x (q1_gemm.cu): groups of four warps of a block, threads, groups of a span, bytes of 64 results and what keeps
// the next ones off their banks.
enum : int { kGemmGroups = 4, kGemmThreads = 128 * (kGemmGroups + 1), kGemmSpan = 4, kGemmResultRow = 144 };
enum : int { kGemmPrepareThreads = 512 };

struct Q1GemmParams {
  const void* x;           // [n_inputs, 128 * n_groups]
  const uint32_t* weight;  // [n_rows, 4 * n_groups], groups at multiples of 16 bytes
  const uint16_t* scales;  // [n_rows, n_groups]
  void* out;               // [n_inputs, n_rows], contiguous
  void* prepared;          // fp16 [column_tiles][n_spans][kGemmSpan][2][columns][64]
  float* factors;          // [column_tiles * columns]; bf16
  int64_t x_stride[2], weight_stride, scale_stride;
  int32_t n_inputs, n_rows, n_groups;
  int32_t columns;                  // rows of x in a tile
  int32_t n_spans;                  // a multiple of shares
  int32_t row_tiles, column_tiles;  // of 64 * kGemmGroups / shares rows of the weight, of `columns` rows of x
  int32_t shares, n_stages;
};

// Shared memory of the product, in bytes: the ring of stages, the results of a tile, the sums of all shares but one (of at most
// kPartialColumns columns at a time), barriers.
struct Q1GemmLayout {
  int result_at, partial_at, barrier_at, total;
  static constexpr int kAlignment = 1024, kPartialColumns = 64;

  constexpr Q1GemmLayout(int columns, int shares, int n_stages)
      : result_at(n_stages * columns * 2 * 128),
        partial_at(result_at + kGemmGroups / shares * columns * kGemmResultRow),
        barrier_at(partial_at +
                   (kGemmGroups - kGemmGroups / shares) * (columns < kPartialColumns ? columns : kPartialColumns) * 64 * 4),
        total(barrier_at + 2 * n_stages * 8 + kAlignment) {}
};

}  // namespace tqext::cuda
