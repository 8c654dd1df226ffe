// Arguments of the attention of many query rows, host to kernel, by value.
#pragma once

#include "params.h"

namespace tqext::cuda {

// A tile is a block of coded tokens that share a mean (format.h), or as many exact tokens. Producer warps decode tiles for the
// consumer warps, which take 16 query rows each. Scores of means are made for kPromptMeans tiles at a time, the columns of a
// tensor-core product.
enum : int { kPromptTile = 64, kProducerWarps = 4, kPromptMeans = 8, kMaxPromptSlots = 8, kMaxPromptSplits = 64 };

// Where tiles are decoded: by the blocks that multiply them, or by a launch before, into memory, from which those blocks copy.
enum : int { kTilesInBlock, kTilesCopied, kTilesMade };

// Producer warps work in teams of kProducerWarps. Two teams, one of keys and one of values, keep up with two warpgroups of
// consumers; one team copies decoded tiles.
constexpr int producer_teams(int rows, int type, bool warpgroups, int tiles) {
  return warpgroups && rows == 128 && type != kTypeFloat32 && tiles != kTilesCopied ? 2 : 1;
}

// Shared memory, in bytes; the host asks for `total`. Tiles of keys, of values and of query rows are runs of 64 dimensions one
// after the other: rows of 128 bytes whose 16-byte columns are exchanged by the row's last three bits (the 128-byte swizzle of
// tensor-core operands), from a multiple of 1024 on.
struct PromptLayout {
  int slot;                            // a decoded tile of keys or of values
  int query_at, query_low_at;          // fp16 rows as given; fp32: what rounding took off
  int rotated_at, rotated_low_at;      // the same, rotated
  int norm_at;                         // fp32 [slots][kPromptTile]: with fp32 rows, norms of coded keys
  int scale_at;                        // fp32 [2][rows]: of the rows as given, of the rotated ones
  int mean_row, mean_at, mean_low_at;  // fp16 rows of kPromptMeans blocks; of fp32 means, what rounding took off
  int scratch_at;                      // fp32 rows of the consumer warps, where the rotation needs them
  int filled_at, emptied_at, task_at, is_last_at, total;  // mbarriers of the slots; what the block is to do; a flag
  static constexpr int kAlignment = 1024, kTaskBytes = 128;

  constexpr PromptLayout(int key_dim, int value_dim, int rows, int type, int n_slots)
      : slot(larger(runs(key_dim), runs(value_dim)) * kPromptTile * 128),
        query_at(n_slots * slot),
        query_low_at(query_at + runs(key_dim) * rows * 128),
        rotated_at(query_low_at + (type == kTypeFloat32 ? runs(key_dim) * rows * 128 : 0)),
        rotated_low_at(rotated_at + runs(key_dim) * rows * 128),
        norm_at(rotated_low_at + (type == kTypeFloat32 ? runs(key_dim) * rows * 128 : 0)),
        scale_at(norm_at + (type == kTypeFloat32 ? n_slots * kPromptTile * 4 : 0)),
        mean_row(2 * key_dim + 16),
        mean_at(scale_at + 2 * rows * 4),
        mean_low_at(mean_at + kPromptMeans * mean_row),
        scratch_at(mean_low_at + kPromptMeans * mean_row),
        filled_at(scratch_at + ((key_dim & (key_dim - 1)) != 0 ? rows / 16 * key_dim * 4 : 0)),
        emptied_at(filled_at + 8 * n_slots),
        task_at(emptied_at + 8 * n_slots),
        is_last_at(task_at + kTaskBytes),
        total(is_last_at + 16 + kAlignment) {}

  static constexpr int runs(int dim) { return (dim + 63) / 64; }

 private:
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
};

// Strides in elements; pointers are at the first element of the array's view. Rows of a KV head: row r is query
// r / n_repeats of query head r % n_repeats, so that a tile of rows is a run of queries.
struct PromptParams {
  const void* q;                          // [B, n_q_heads, L, head_dim]
  const uint32_t* key_codes;              // [B, n_kv_heads, n_coded, words]
  const uint16_t* key_norms;              // [B, n_kv_heads, n_coded, 1]
  const uint32_t* value_codes;            // [B, n_kv_heads, n_coded, words]
  const uint16_t* value_params;           // [B, n_kv_heads, n_coded, 2 * groups], or norms [B, n_kv_heads, n_coded, 1]
  const void* means;                      // [B, n_kv_heads, n_blocks, head_dim], or null
  const float* balance;                   // [n_kv_heads, head_dim], or null
  const void *first_keys, *first_values;  // [B, n_kv_heads, n_first, head_dim], or null
  const void *tail_keys, *tail_values;    // [B, n_kv_heads, n_tail, head_dim], or null
  const void* mask;                       // [B, n_q_heads, L, n_keys] bool or fp32, or null
  const float* sinks;                     // [n_q_heads], or null
  const int32_t* left_padding;            // [B], or null
  const int32_t* lengths;                 // [B, 3], or null
  void* out;                              // [B, n_q_heads, L, value_dim], contiguous
  float* partial_out;                     // [heads, row tiles, splits, consumer warps, value_dim / 8, 32 lanes, 4]
  float* partial_state;                   // [heads, row tiles, splits, rows, 2]: max, sum
  uint32_t* counters;                     // [heads, row tiles], zero before and after
  char* tiles;                            // decoded, of heads from head0 on: [heads, n_tiles, keys and values], as in a slot
  int64_t q_stride[4], key_code_stride[4], key_norm_stride[3], value_code_stride[4], value_param_stride[4];
  int64_t mean_stride[4], balance_stride[2];
  int64_t first_key_stride[4], first_value_stride[4], tail_key_stride[4], tail_value_stride[4], mask_stride[4];
  int64_t sinks_stride, left_padding_stride, lengths_stride[2];
  int32_t n_kv_heads, n_repeats, n_queries, head_dim, value_dim, n_first, n_coded, n_tail;
  int32_t means_kind, causal, hadamard;
  int32_t head0, n_tiles;  // of this launch's heads the first; tiles of a head, the exact ones first
  // 16-byte loads are possible: of each array's rows.
  int32_t wide_keys, wide_values, wide_exact, wide_means;
  float scale;  // of scores, times log2(e), not negative
  float sign;   // of the scale; 0 with a scale of 0
  // Levels / 128. Up to 3 bits: fp16, the high bytes of the eight levels and their low bytes. 4 bits: the sixteen levels as
  // int8 plus 128.
  uint32_t key_levels[4], value_levels[4];
};

}  // namespace tqext::cuda
