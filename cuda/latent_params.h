// Arguments of the attention over latents, host to kernel, by value.
#pragma once

#include "params.h"

namespace tqext::cuda {

// A tile is a block of coded tokens that share a mean, or as many exact tokens.
enum : int { kLatentTile = 64, kLatentWarps = 8, kMaxLatentSplits = 256, kLatentJoinThreads = 128 };

// Shared memory, in bytes. Rows of queries and of tiles are dim halves; the 16-byte columns of each run of 128 bytes are
// exchanged by the row's last three bits.
struct LatentLayout {
  int tile, weight_at, mean_at, max_at, factor_at, scale_at, total;

  constexpr LatentLayout(int dim, int rows, int buffers)
      : tile(rows * dim * 2),                               // the query rows come first
        weight_at(tile + buffers * kLatentTile * dim * 2),  // fp16 [rows][kLatentTile]
        mean_at(weight_at + rows * kLatentTile * 2),        // fp16 [dim]
        max_at(mean_at + dim * 2),                          // fp32 [column groups][rows]
        factor_at(max_at + kLatentWarps * 16 * 4),          // fp32 [rows]
        scale_at(factor_at + rows * 4),                     // fp32 [rows]
        total(scale_at + rows * 4) {}
};

// All in the rotated space. Strides in elements. Row r of a KV head is query r / n_repeats of query head r % n_repeats.
struct LatentParams {
  const float* q;             // [B, n_q_heads, L, dim]
  const uint32_t* codes;      // [B, n_kv_heads, n_coded, words]
  const uint16_t* norms;      // [B, n_kv_heads, n_coded, 1]
  const float* means;         // [B, n_kv_heads, n_blocks, dim], or null
  const float *first, *tail;  // [B, n_kv_heads, n, dim], or null
  const void* mask;           // [B, n_q_heads, L, n_keys] bool or fp32, or null
  float* out;                 // [B, n_q_heads, L, dim], contiguous
  float* partial_out;         // [heads, row tiles, splits, rows, dim]
  float* partial_state;       // [heads, row tiles, splits, rows, 2]: max, sum
  int64_t q_stride[4], code_stride[4], norm_stride[3], mean_stride[4], first_stride[4], tail_stride[4], mask_stride[4];
  int32_t n_kv_heads, n_repeats, n_queries, n_first, n_coded, n_tail, row_tiles, splits;
  int32_t causal, wide;  // wide: 16-byte loads of exact tokens are possible
  float scale;           // of scores, times log2(e)
  uint32_t levels[4];    // as PromptParams::key_levels
};

}  // namespace tqext::cuda
