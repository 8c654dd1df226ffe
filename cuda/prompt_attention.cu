// Attention of many query rows over packed keys and values (format.h), exact first tokens and an exact tail, in one launch.
//
// Grid: (row tiles, splits, batch * n_kv_heads). A block takes kRows rows of a KV head, its query heads' rows side by side, so
// that each byte is decoded once for all of them. Its tiles of 64 tokens are the exact ones, first ++ tail, then the coded
// ones; with several splits each block takes a share of them, and the last block of a row tile (atomic counter) joins the
// shares.
//
// Producer warps load a tile's codes and decode them to fp16, factors included, into a ring of slots in shared memory: keys,
// then values. Each consumer warp multiplies its 16 rows by the slots on tensor cores, with scores, weights and sums in
// registers (FlashAttention, Dao et al. 2022; the roles of warps and the order of products as in FlashAttention-3, Shah et al.
// 2024): the scores of a tile and the weighted values of the tile before are in flight together. With WGMMA four consumer warps
// multiply as one warpgroup.
//
// Rows, as given and rotated, are scaled by a power of two each and rounded to fp16. With fp32 rows what rounding took off is
// multiplied as well, exact keys are split likewise, and coded keys are levels, with the norms in the scores.
// Coded keys lack their block's mean: it is the same for a tile and a row, an offset of the row's scores. The offsets of eight
// tiles are one run of products with the rows as given.
// The exact tiles' sum is rotated once before the coded tiles are added to it, and all of it back at the end.
//
// Compile-time: KEY_DIM, VALUE_DIM (padded), KEY_BITS, VALUE_BITS, LLOYD, ROWS (a multiple of 16; WGMMA: of 64), TYPE, MASK,
// SLOTS, BLOCKS_PER_SM, WGMMA, TILES (prompt_params.h).
//
// With many row tiles each tile of tokens would be decoded by as many blocks. Then a launch before (TILES = 2) decodes all of
// some heads into memory, as tiles lie in a slot, and the producers copy them with the copy engine (TILES = 1).
#include "device.cuh"
#include "levels.cuh"
#include "prompt_params.h"
#include "warpgroup.cuh"

namespace tqext::cuda {
namespace {

constexpr int kKeyDim = KEY_DIM, kValueDim = VALUE_DIM, kKeyBits = KEY_BITS, kValueBits = VALUE_BITS;
constexpr int kRows = ROWS, kType = TYPE, kMask = MASK, kSlots = SLOTS;
constexpr bool kLloyd = LLOYD, kGroups = WGMMA;
constexpr int kConsumerWarps = kRows / 16, kProducers = 32 * kProducerWarps;
constexpr int kTeams = producer_teams(kRows, kType, kGroups, TILES);
constexpr int kThreads = kTeams * kProducers + 32 * kConsumerWarps;
constexpr int kKeyUnits = kKeyDim / kUnit, kValueUnits = kValueDim / kUnit, kValueWords = kValueUnits * kValueBits;
constexpr int kKeySteps = kKeyDim / 16, kValueTiles = kValueDim / 8, kTokenTiles = kPromptTile / 8;
constexpr bool kFloat32 = kType == kTypeFloat32;
// Query fragments stay in registers where these suffice.
constexpr bool kQueryInRegisters = kKeyDim <= 128 && !kFloat32 && BLOCKS_PER_SM == 1 && (kGroups || kRows <= 64);
// With several blocks in a multiprocessor or two warpgroups of consumers, producers give registers to consumers.
constexpr bool kMoveRegisters = kGroups && (kRows == 128 || BLOCKS_PER_SM > 1);
constexpr int kProducerRegisters = TILES == kTilesCopied ? 40 : kTeams == 2 ? 56 : 88;
constexpr int kConsumerRegisters = TILES == kTilesCopied ? 232 : kTeams == 2 ? 200 : kRows == 128 ? 208 : 168;

// A weight may grow by 2^kGrowth before the running maximum is renewed, which is rare after the first tile. kMostSum: so much
// can the weights of 16 tokens sum up to then.
constexpr float kGrowth = 8.0f, kMostSum = 16 * 256.0f;
// Registers hold the weights of two tiles beside the scores.
constexpr bool kBeside = kGroups && kValueDim <= 128;
// What levels / 128 lack.
constexpr float kLevelFactor = 128.0f / 127.0f;
constexpr int kRun = kPromptTile * 128;  // bytes of 64 dimensions of a tile

constexpr PromptLayout kLayout(kKeyDim, kValueDim, kRows, kType, kSlots);

TQ_DEVICE int clamp(int x, int low, int high) { return min(max(x, low), high); }

// ---- Who attends to what ----

constexpr int kNever = 0x7fffffff;

struct Sequence {
  int b, h, n_keys, n_exact, n_rows;
  int padding;     // columns below are not attended to
  int lengths[3];  // tokens stored of each part; of the tail, without the rows' own
  bool own;        // the last n_queries tail tokens are the rows' own
  bool causal;     // by columns

  TQ_DEVICE Sequence(const PromptParams& p, int head)
      : b(head / p.n_kv_heads),
        h(head % p.n_kv_heads),
        n_keys(p.n_first + p.n_coded + p.n_tail),
        n_exact(p.n_first + p.n_tail),
        n_rows(p.n_repeats * p.n_queries),
        padding(p.left_padding ? max(0, p.left_padding[b * p.left_padding_stride]) : 0),
        lengths{p.n_first, p.n_coded, p.n_tail},
        own(p.lengths && p.causal),
        causal(p.causal && !own) {
    if (own) lengths[2] -= p.n_queries;
    if (p.lengths) {
#pragma unroll
      for (int part = 0; part < 3; part++) {
        lengths[part] = clamp(p.lengths[b * p.lengths_stride[0] + part * p.lengths_stride[1]], 0, lengths[part]);
      }
    }
  }

  // The first query that attends to a column, as far as the order of columns says.
  TQ_DEVICE int column_seen_from(const PromptParams& p, int column) const {
    return causal ? column - (n_keys - p.n_queries) : -1;
  }
  // Column that query i sees last, plus one.
  TQ_DEVICE int column_end(const PromptParams& p, int i) const { return causal ? n_keys - p.n_queries + i + 1 : n_keys; }
  TQ_DEVICE int coded_seen_from(const PromptParams& p, int token) const {
    return token >= first_token(p) && token < lengths[1] ? column_seen_from(p, p.n_first + token) : kNever;
  }
  // Coded tokens first_token ... coded_end - 1 are attended to by query i.
  TQ_DEVICE int first_token(const PromptParams& p) const { return clamp(padding - p.n_first, 0, lengths[1]); }
  TQ_DEVICE int coded_end(const PromptParams& p, int i) const { return min(lengths[1], column_end(p, i) - p.n_first); }
};

// An exact token, first ++ tail.
struct ExactToken {
  bool is_first, there;
  int index, column, own_index;  // own_index: of the rows' own tokens; -1: older than them

  TQ_DEVICE ExactToken(const PromptParams& p, const Sequence& sequence, int e) {
    is_first = e < p.n_first;
    index = is_first ? e : e - p.n_first;
    column = is_first ? e : e + p.n_coded;
    const int place = index - (p.n_tail - p.n_queries);
    own_index = sequence.own && !is_first && place >= 0 ? place : -1;
    there = e < sequence.n_exact && column >= sequence.padding &&
            (own_index >= 0 || index < (is_first ? sequence.lengths[0] : sequence.lengths[2]));
  }
  // The first query that attends to it; kNever: none.
  TQ_DEVICE int seen_from(const PromptParams& p, const Sequence& sequence) const {
    if (!there) return kNever;
    return max(own_index, sequence.column_seen_from(p, column));
  }
};

// The tiles of a block.
struct Range {
  int exact_begin, exact_end, coded_begin, coded_end;
  int first_query, last_query;  // of the row tile
  int token_begin, token_end;   // coded tokens that some row attends to

  Range() = default;
  TQ_DEVICE Range(const PromptParams& p, const Sequence& sequence, int row0, int split, int n_splits) {
    first_query = row0 / p.n_repeats;
    last_query = (min(row0 + kRows, sequence.n_rows) - 1) / p.n_repeats;
    // Exact tokens that the last query sees lie before the others.
    int n_seen = sequence.n_exact;
    if (sequence.own) n_seen -= p.n_queries - 1 - last_query;
    if (sequence.causal) n_seen = clamp(sequence.column_end(p, last_query) - p.n_coded, min(p.n_first, n_seen), n_seen);
    const int n_exact = (n_seen + kPromptTile - 1) / kPromptTile;
    token_begin = sequence.first_token(p);
    // Rows of padding may see fewer tokens than are padding.
    token_end = max(token_begin, sequence.coded_end(p, last_query));
    const int tile0 = token_begin / kPromptTile;
    const int n_coded = token_end > token_begin ? (token_end + kPromptTile - 1) / kPromptTile - tile0 : 0;
    // At most 2^25 tiles and 2^6 splits.
    const uint32_t n = n_exact + n_coded;
    const int begin = int(n * split / n_splits), end = int(n * (split + 1) / n_splits);
    exact_begin = min(begin, n_exact);
    exact_end = min(end, n_exact);
    coded_begin = tile0 + max(0, begin - n_exact);
    coded_end = tile0 + max(0, end - n_exact);
  }
};

struct Task {
  Sequence sequence;
  Range range;
};
static_assert(sizeof(Task) <= PromptLayout::kTaskBytes, "room in shared memory");

// A place in the ring of slots.
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;
  TQ_DEVICE void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// The shared memory of the block.
struct Memory {
  uint32_t base;
  TQ_DEVICE uint32_t slot(const Cursor& c) const { return base + c.slot * kLayout.slot; }
  TQ_DEVICE uint32_t filled(const Cursor& c) const { return base + kLayout.filled_at + 8 * c.slot; }
  TQ_DEVICE uint32_t emptied(const Cursor& c) const { return base + kLayout.emptied_at + 8 * c.slot; }
  TQ_DEVICE uint32_t norms(const Cursor& c) const { return base + kLayout.norm_at + c.slot * kPromptTile * 4; }
};

// Byte of column c (16 bytes) of a row of 128 bytes that starts at a multiple of 128.
TQ_DEVICE uint32_t swizzle(uint32_t row_address, int row, int c) { return (row_address ^ (row & 7) << 4) ^ c << 4; }

// ---- Producers: a thread decodes half of the dimensions of one token of a tile ----

// Halves [0] and [1] of a row are units 0 ... first_units - 1 and the others.
constexpr int first_units(int units) { return (units + 1) / 2; }

// Words `first` ... of a row, in loads as wide as kAlign bytes allow.
template <int n, int kAlign>
TQ_DEVICE void load_words(uint32_t (&to)[n], const uint32_t* row, int64_t stride, bool wide) {
  if (wide) {
    if constexpr (n % 4 == 0 && kAlign % 16 == 0) {
#pragma unroll
      for (int i = 0; i < n; i += 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(row + i);
        to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
      }
    } else if constexpr (n % 2 == 0 && kAlign % 8 == 0) {
#pragma unroll
      for (int i = 0; i < n; i += 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(row + i);
        to[i] = x.x, to[i + 1] = x.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; i++) to[i] = row[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = row[i * stride];
  }
}

constexpr int common_alignment(int row, int half) {
  int align = 16;
  while (row % align || half % align) align /= 2;
  return align;
}

// Codes of keys, or of Lloyd-Max values, in the units of one half, and the token's norm.
template <int kUnits, int kBits>
struct LevelCodes {
  static constexpr int kFirst = first_units(kUnits), kWords = kFirst * kBits;
  uint32_t words[kWords];
  uint16_t norm;

  // row: of the token, from the words of this half on.
  TQ_DEVICE void load(const uint32_t* row, int64_t stride, const uint16_t* norm_of_token, bool wide, int half) {
    if constexpr (kUnits % 2 == 0) {
      // Both halves are as long.
      load_words<kWords, common_alignment(4 * kUnits * kBits, 4 * kWords)>(words, row, stride, wide);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i++) words[i] = half * kWords + i < kUnits * kBits ? row[i * stride] : 0;
    }
    norm = *norm_of_token;
  }
  TQ_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kWords; i++) words[i] = 0;
    norm = 0;
  }
};

// Levels times a factor, an fp16 number, of the units of one half into the row of a slot.
template <int kUnits, int kBits>
TQ_DEVICE void decode_levels(const LevelCodes<kUnits, kBits>& codes, const uint32_t (&levels)[4], uint16_t half_factor,
                             uint32_t slot, int token, int half) {
  constexpr int kFirst = first_units(kUnits);
  const uint32_t factor = both(half_factor);
  const uint32_t row = slot + token * 128;
#pragma unroll
  for (int u = 0; u < kFirst; u++) {
    const int unit = u + half * kFirst;
    if (kUnits % 2 != 0 && unit >= kUnits) break;
    const uint32_t* w = codes.words + u * kBits;
    uint32_t select[4], top[4];
    split_codes<kBits>(w, select, top);
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const uint2 x = find_levels<kBits>(levels, select[s], top[s], factor);
      const uint2 y = find_levels<kBits>(levels, select[s] >> 16, top[s] >> 16, factor);
      const int d = 32 * unit + 8 * s;
      store_shared(swizzle(row, token, d % 64 / 8) + d / 64 * kRun, make_uint4(x.x, x.y, y.x, y.y));
    }
  }
}

// Codes of values in groups, the whole row, and scales and biases of the groups of one half.
struct GroupCodes {
  static constexpr int kFirst = first_units(kValueUnits);
  uint32_t words[kValueWords];
  uint32_t params[kFirst];  // scale, bias

  // row, params_of_token: of the token.
  TQ_DEVICE void load(const uint32_t* row, int64_t stride, const uint16_t* params_of_token, int64_t param_stride, bool wide,
                      int half) {
    load_words<kValueWords, common_alignment(4 * kValueWords, 16)>(words, row, stride, wide);
#pragma unroll
    for (int u = 0; u < kFirst; u++) {
      const int unit = u + half * kFirst;
      params[u] = 0;
      if (kValueUnits % 2 != 0 && unit >= kValueUnits) continue;
      if (wide) {
        params[u] = reinterpret_cast<const uint32_t*>(params_of_token)[unit];
      } else {
        params[u] = params_of_token[2 * unit * param_stride] | uint32_t(params_of_token[(2 * unit + 1) * param_stride]) << 16;
      }
    }
  }
  TQ_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kValueWords; i++) words[i] = 0;
#pragma unroll
    for (int u = 0; u < kFirst; u++) params[u] = 0;
  }
};

// Code * scale + bias of the groups of one half into the row of a slot. Dimension d: word d % W, bit kValueBits * (d / W); two
// neighbours lie in two words at the same bit. A code in place in a half's fraction, with 1024 added, is an fp16 number; one
// multiplication and subtraction gives the code.
template <int kHalf>
TQ_DEVICE void decode_groups(const GroupCodes& codes, uint32_t slot, int token) {
  constexpr int kFirst = first_units(kValueUnits), kMaskBits = (1 << kValueBits) - 1;
  const uint32_t row = slot + token * 128;
#pragma unroll
  for (int u = 0; u < kFirst; u++) {
    const int unit = u + kHalf * kFirst;
    if (unit >= kValueUnits) break;
    const uint32_t scale = permute(codes.params[u], 0u, 0x1010), bias = permute(codes.params[u], 0u, 0x3232);
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int d = 32 * unit + 8 * s + 2 * k, word = d % kValueWords, bit = kValueBits * (d / kValueWords);
        uint32_t pair = permute(codes.words[word], codes.words[word + 1], bit < 16 ? 0x5410 : 0x7632);
        // Of ten fraction bits.
        const int in_half = bit % 16, shift = in_half + kValueBits <= 10 ? 0 : 8, place = in_half - shift;
        pair = (shift ? pair >> shift : pair) & both(uint32_t(kMaskBits) << place);
        // 2^-place, and 1024 * 2^-place.
        const uint32_t code =
            multiply_add_halves(pair | 0x64006400u, both(0x3c00u - 0x400u * place), both(0xe400u - 0x400u * place));
        x[k] = multiply_add_halves(code, scale, bias);
      }
      const int d = 32 * unit + 8 * s;
      store_shared(swizzle(row, token, d % 64 / 8) + d / 64 * kRun, make_uint4(x[0], x[1], x[2], x[3]));
    }
  }
}

// Eight elements of an exact row as fp16; what: 0 the rounded ones, 1 what rounding took off.
TQ_DEVICE uint4 load_eight(const Element<kType>* row, int64_t stride, bool wide, int what) {
  if constexpr (kType == kTypeFloat16) {
    if (wide) return *reinterpret_cast<const uint4*>(row);
  }
  float x[8];
  if (wide && kType == kTypeBFloat16) {
    const uint4 y = *reinterpret_cast<const uint4*>(row);
    const uint32_t words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = low_16bit<kTypeBFloat16>(words[i]);
      x[2 * i + 1] = high_16bit<kTypeBFloat16>(words[i]);
    }
  } else if (wide && kFloat32) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 y = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(row) + i);
      x[i] = y.x, x[i + 1] = y.y, x[i + 2] = y.z, x[i + 3] = y.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = load_element<kType>(row, i * stride);
  }
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (what == 1) {
#pragma unroll
      for (int k = 2 * i; k < 2 * i + 2; k++) x[k] -= half_to_float(float_to_half(x[k]));
    }
    y[i] = pack_halves(x[2 * i], x[2 * i + 1]);
  }
  return make_uint4(y[0], y[1], y[2], y[3]);
}

// Exact keys or values of one token, one half of the row. dim: of the model. Loads in batches, all before the first store.
template <int kUnits, class Acquire>
TQ_DEVICE void copy_exact(const Element<kType>* row, int64_t stride, bool there, int dim, bool wide, int what, int token,
                          int half, Acquire acquire) {
  constexpr int kFirst = first_units(kUnits), kBatch = kFirst < 2 ? kFirst : 2;  // units
  uint32_t slot = 0;
#pragma unroll
  for (int u0 = 0; u0 < kFirst; u0 += kBatch) {
    uint4 x[kBatch][4];
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int d = 32 * (u0 + u + half * kFirst) + 8 * s;
        x[u][s] = make_uint4(0, 0, 0, 0);
        if (there && u0 + u < kFirst && d < dim) x[u][s] = load_eight(row + d * stride, stride, wide, what);
      }
    }
    if (u0 == 0) slot = acquire();
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      const int unit = u0 + u + half * kFirst;
      if (u0 + u >= kFirst || unit >= kUnits) continue;
#pragma unroll
      for (int s = 0; s < 4; s++) {
        const int d = 32 * unit + 8 * s;
        store_shared(swizzle(slot + token * 128, token, d % 64 / 8) + d / 64 * kRun, x[u][s]);
      }
    }
  }
}

// Where an exact token lies, in the first tokens or in the tail.
TQ_DEVICE const Element<kType>* exact_row(const Sequence& sequence, const ExactToken& t, const void* first,
                                          const int64_t (&first_stride)[4], const void* tail, const int64_t (&tail_stride)[4]) {
  const int64_t* stride = t.is_first ? first_stride : tail_stride;
  return static_cast<const Element<kType>*>(t.is_first ? first : tail) + sequence.b * stride[0] + sequence.h * stride[1] +
         t.index * stride[2];
}

// Means of blocks block ... block + kPromptMeans - 1 on their way to rows of shared memory: a thread's runs of eight halves.
// For fp16 means whose rows 16-byte loads can read.
struct WideMeans {
  static constexpr int kRuns = (kPromptMeans * kKeyDim / 8 + kProducers - 1) / kProducers;
  uint4 runs[kRuns];

  static TQ_DEVICE int row_of(int run) { return run / (kKeyDim / 8); }
  static TQ_DEVICE int dim_of(int run) { return run % (kKeyDim / 8) * 8; }
  TQ_DEVICE void load(const PromptParams& p, const Sequence& sequence, int block, int tid) {
    const int n_blocks = (p.n_coded + kBlockTokens - 1) / kBlockTokens;
    const uint16_t* head =
        static_cast<const uint16_t*>(p.means) + sequence.b * p.mean_stride[0] + sequence.h * p.mean_stride[1];
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      const int run = tid + kProducers * i, row = block + row_of(run), d = dim_of(run);
      runs[i] = make_uint4(0, 0, 0, 0);
      if (row_of(run) < kPromptMeans && row < n_blocks && d < p.head_dim) {
        runs[i] = *reinterpret_cast<const uint4*>(head + row * p.mean_stride[2] + d);
      }
    }
  }
  TQ_DEVICE void store(const Memory& memory, int tid) const {
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      const int run = tid + kProducers * i;
      if (row_of(run) < kPromptMeans) {
        store_shared(memory.base + kLayout.mean_at + row_of(run) * kLayout.mean_row + 2 * dim_of(run), runs[i]);
      }
    }
  }
};

// The same of any means, a pair of dimensions after the other.
TQ_DEVICE void copy_means(const PromptParams& p, const Sequence& sequence, const Memory& memory, int block, int tid) {
  const int n_blocks = (p.n_coded + kBlockTokens - 1) / kBlockTokens;
  const int64_t head = sequence.b * p.mean_stride[0] + sequence.h * p.mean_stride[1];
#pragma unroll 1
  for (int e = 2 * tid; e < kPromptMeans * kKeyDim; e += 2 * kProducers) {
    const int row = e / kKeyDim, d = e % kKeyDim;
    const bool there = block + row < n_blocks && d < p.head_dim;
    const int64_t at = head + (block + row) * p.mean_stride[2] + d * p.mean_stride[3];
    const uint32_t to = memory.base + kLayout.mean_at + row * kLayout.mean_row + 2 * d;
    if (p.means_kind == kMeansFloat32) {
      const float* x = static_cast<const float*>(p.means) + at;
      const float a = there ? x[0] : 0.0f, b = there ? x[p.mean_stride[3]] : 0.0f;
      const uint32_t high = pack_halves(a, b);
      store_shared_word(to, high);
      store_shared_word(to + kPromptMeans * kLayout.mean_row,
                        pack_halves(a - low_16bit<kTypeFloat16>(high), b - high_16bit<kTypeFloat16>(high)));
    } else {
      const uint16_t* x = static_cast<const uint16_t*>(p.means) + at;
      store_shared_word(to, there ? x[0] | uint32_t(x[p.mean_stride[3]]) << 16 : 0u);
    }
  }
}

// A thread's token of one tile after the other. What no row attends to is not read: weight zero times whatever lies there must
// be zero.
struct Tokens {
  int at;
  uint32_t n;
  TQ_DEVICE Tokens(const Range& range, int token)
      : at(range.coded_begin * kPromptTile + token - range.token_begin), n(range.token_end - range.token_begin) {}
  TQ_DEVICE bool attended() const { return uint32_t(at) < n; }
};

// Registers suffice for the codes of two tiles: those of the next are on their way while those of a tile are decoded.
template <class Codes>
constexpr bool kEarly = sizeof(Codes) <= 40;

struct KeySide {
  Tokens tokens;
  const uint32_t* row;
  const uint16_t* norm;
  LevelCodes<kKeyUnits, kKeyBits> next;
  WideMeans means;
  int token, half, tid;

  TQ_DEVICE KeySide(const PromptParams& p, const Sequence& sequence, const Range& range, int token, int half, int tid)
      : tokens(range, token), token(token), half(half), tid(tid) {
    const int64_t first = range.coded_begin * kPromptTile + token;
    row = p.key_codes + sequence.b * p.key_code_stride[0] + sequence.h * p.key_code_stride[1] + first * p.key_code_stride[2] +
          half * decltype(next)::kWords * p.key_code_stride[3];
    norm = p.key_norms + sequence.b * p.key_norm_stride[0] + sequence.h * p.key_norm_stride[1] + first * p.key_norm_stride[2];
    if (p.wide_means) means.load(p, sequence, range.coded_begin, tid);
    load(p);
  }
  TQ_DEVICE void load(const PromptParams& p) {
    if (tokens.attended()) {
      next.load(row, p.key_code_stride[3], norm, p.wide_keys, half);
    } else {
      next.clear();
    }
    tokens.at += kPromptTile;
    row += kPromptTile * p.key_code_stride[2];
    norm += kPromptTile * p.key_norm_stride[2];
  }
  template <class Acquire, class Publish>
  TQ_DEVICE void put(const PromptParams& p, const Sequence& sequence, const Memory& memory, int tile, int begin, int end,
                     const Cursor& cursor, Acquire acquire, Publish publish) {
    const auto codes = next;
    if (kEarly<decltype(next)> && tile + 1 < end) load(p);
    const uint32_t slot = acquire();
    if (kFloat32 && half == 0) store_shared_float(memory.norms(cursor) + 4 * token, half_to_float(codes.norm));
    decode_levels<kKeyUnits, kKeyBits>(codes, p.key_levels, kFloat32 ? uint16_t(0x3c00) : codes.norm, slot, token, half);
    if (p.means && (tile - begin) % kPromptMeans == 0) {
      // The consumers have read the means before: they released the first keys that came with them.
      if (p.wide_means) {
        means.store(memory, tid);
      } else {
        copy_means(p, sequence, memory, tile, tid);
      }
    }
    publish();
    if (!kEarly<decltype(next)> && tile + 1 < end) load(p);
    if (p.wide_means && (tile + 1 - begin) % kPromptMeans == 0) means.load(p, sequence, tile + 1, tid);
  }
};

struct ValueSide {
  Tokens tokens;
  const uint32_t* row;
  const uint16_t* params;
#if LLOYD
  LevelCodes<kValueUnits, kValueBits> next;
#else
  GroupCodes next;
#endif
  int token, half;

  TQ_DEVICE ValueSide(const PromptParams& p, const Sequence& sequence, const Range& range, int token, int half)
      : tokens(range, token), token(token), half(half) {
    const int64_t first = range.coded_begin * kPromptTile + token;
    row = p.value_codes + sequence.b * p.value_code_stride[0] + sequence.h * p.value_code_stride[1] +
          first * p.value_code_stride[2];
#if LLOYD
    row += half * decltype(next)::kWords * p.value_code_stride[3];
#endif
    params = p.value_params + sequence.b * p.value_param_stride[0] + sequence.h * p.value_param_stride[1] +
             first * p.value_param_stride[2];
    load(p);
  }
  TQ_DEVICE void load(const PromptParams& p) {
    if (tokens.attended()) {
#if LLOYD
      next.load(row, p.value_code_stride[3], params, p.wide_values, half);
#else
      next.load(row, p.value_code_stride[3], params, p.value_param_stride[3], p.wide_values, half);
#endif
    } else {
      next.clear();
    }
    tokens.at += kPromptTile;
    row += kPromptTile * p.value_code_stride[2];
    params += kPromptTile * p.value_param_stride[2];
  }
  template <class Acquire, class Publish>
  TQ_DEVICE void put(const PromptParams& p, int tile, int end, Acquire acquire, Publish publish) {
    const auto codes = next;
    if (kEarly<decltype(next)> && tile + 1 < end) load(p);
    const uint32_t slot = acquire();
#if LLOYD
    decode_levels<kValueUnits, kValueBits>(codes, p.value_levels, codes.norm, slot, token, half);
#else
    if (half == 0) {
      decode_groups<0>(codes, slot, token);
    } else {
      decode_groups<1>(codes, slot, token);
    }
#endif
    publish();
    if (!kEarly<decltype(next)> && tile + 1 < end) load(p);
  }
};

TQ_DEVICE void produce(const PromptParams& p, const Sequence& sequence, const Range& range, const Memory& memory, int thread) {
  const int team = __shfl_sync(kAllLanes, thread / kProducers, 0), tid = thread % kProducers;
  const bool has_keys = kTeams == 1 || team == 0, has_values = kTeams == 1 || team == 1;
  const int token = tid % kPromptTile, half = __shfl_sync(kAllLanes, tid / kPromptTile, 0);
  Cursor cursor;
  auto acquire = [&] {
    slot_barrier_wait(memory.emptied(cursor), cursor.parity ^ 1);
    return memory.slot(cursor);
  };
  auto publish = [&] {
    operand_fence();
    __syncwarp();
    if (tid % 32 == 0) slot_barrier_arrive(memory.filled(cursor));
    cursor.next();
  };

#pragma unroll 1
  for (int tile = range.exact_begin; tile < range.exact_end; tile++) {
    const ExactToken t(p, sequence, tile * kPromptTile + token);
#pragma unroll 1
    for (int what = 0; what < (kFloat32 ? 2 : 1); what++) {
      if (!has_keys) {
        cursor.next();
        continue;
      }
      copy_exact<kKeyUnits>(exact_row(sequence, t, p.first_keys, p.first_key_stride, p.tail_keys, p.tail_key_stride),
                            t.is_first ? p.first_key_stride[3] : p.tail_key_stride[3], t.there, p.head_dim, p.wide_exact, what,
                            token, half, acquire);
      publish();
    }
    if (!has_values) {
      cursor.next();
      continue;
    }
    copy_exact<kValueUnits>(exact_row(sequence, t, p.first_values, p.first_value_stride, p.tail_values, p.tail_value_stride),
                            t.is_first ? p.first_value_stride[3] : p.tail_value_stride[3], t.there, p.value_dim, p.wide_exact,
                            0, token, half, acquire);
    publish();
  }

  if (range.coded_begin >= range.coded_end) return;
  const int begin = range.coded_begin, end = range.coded_end;
  if constexpr (kTeams == 1) {
    KeySide keys(p, sequence, range, token, half, tid);
    ValueSide values(p, sequence, range, token, half);
#pragma unroll 1
    for (int tile = begin; tile < end; tile++) {
      keys.put(p, sequence, memory, tile, begin, end, cursor, acquire, publish);
      values.put(p, tile, end, acquire, publish);
    }
  } else if (team == 0) {
    KeySide keys(p, sequence, range, token, half, tid);
#pragma unroll 1
    for (int tile = begin; tile < end; tile++) {
      keys.put(p, sequence, memory, tile, begin, end, cursor, acquire, publish);
      cursor.next();
    }
  } else {
    ValueSide values(p, sequence, range, token, half);
#pragma unroll 1
    for (int tile = begin; tile < end; tile++) {
      cursor.next();
      values.put(p, tile, end, acquire, publish);
    }
  }
}

#if TILES == 1
// The producers where tiles are decoded already: one thread starts the copies, all bring the means.
TQ_DEVICE void copy_tiles(const PromptParams& p, const Sequence& sequence, const Range& range, const Memory& memory, int tid) {
  const char* tiles = p.tiles + int64_t(blockIdx.z) * p.n_tiles * (2 * kLayout.slot);
  const int n_exact = (sequence.n_exact + kPromptTile - 1) / kPromptTile;
  Cursor cursor;
  auto wait = [&] { slot_barrier_wait(memory.emptied(cursor), cursor.parity ^ 1); };
  auto copy = [&](int64_t at) {
    __syncwarp();
    if (tid == 0) {
      barrier_expect(memory.filled(cursor), kLayout.slot);
      copy_bulk(memory.slot(cursor), tiles + at * kLayout.slot, kLayout.slot, memory.filled(cursor));
    } else if (tid % 32 == 0) {
      slot_barrier_arrive(memory.filled(cursor));
    }
    cursor.next();
  };
#pragma unroll 1
  for (int tile = range.exact_begin; tile < range.exact_end; tile++) {
    wait();
    copy(2 * tile);
    wait();
    copy(2 * tile + 1);
  }
  const int begin = range.coded_begin;
  WideMeans means;
  if (p.wide_means && begin < range.coded_end) means.load(p, sequence, begin, tid);
#pragma unroll 1
  for (int tile = begin; tile < range.coded_end; tile++) {
    wait();
    if (p.means && (tile - begin) % kPromptMeans == 0) {
      // The consumers have read the means before: they released the first keys that came with them.
      if (p.wide_means) {
        means.store(memory, tid);
      } else {
        copy_means(p, sequence, memory, tile, tid);
      }
    }
    copy(2 * int64_t(n_exact + tile));
    if (p.wide_means && (tile + 1 - begin) % kPromptMeans == 0) means.load(p, sequence, tile + 1, tid);
    wait();
    copy(2 * int64_t(n_exact + tile) + 1);
  }
}
#endif

// ---- Consumers: 16 query rows of each warp ----

// Fragment of rows row0 ... row0 + 15, dimensions 16 step ... of a tile of query rows.
TQ_DEVICE void load_query(uint32_t (&a)[4], uint32_t tile, int row0, int step, int lane) {
  const int row = row0 + lane % 16, c = step % 4 * 2 + lane / 16;
  load_matrices_shared(a, swizzle(tile + step / 4 * kRows * 128 + row * 128, row, c));
}

// What a consumer warp has of its rows; rows are g and g + 8 of its 16, dimensions 8 i + 2 j, 8 i + 2 j + 1.
struct Rows {
  float acc[kValueTiles][4];
  float max[2], sum[2];
};

// Rotation of the rows of acc across a warp (format.h), with the factor of the levels.
template <bool kBack>
TQ_DEVICE void rotate_rows(float (&x)[kValueTiles][4], int j, float scale) {
  using H = Hadamard<kValueDim>;
  auto signs = [&] {
#pragma unroll
    for (int i = 0; i < kValueTiles; i++) {
      const uint32_t word = sign_word(TQ_ROTATION_SEED, i / 4) >> (8 * (i % 4) + 2 * j);
      const uint32_t even = word << 31, odd = word >> 1 << 31;
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        x[i][r] = __uint_as_float(__float_as_uint(x[i][r] * scale) ^ even);
        x[i][r + 1] = __uint_as_float(__float_as_uint(x[i][r + 1] * scale) ^ odd);
      }
    }
  };
  auto sylvester = [&] {
#pragma unroll
    for (int i = 0; i < kValueTiles; i++) {
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const float a = x[i][r], b = x[i][r + 1];
        x[i][r] = a + b;
        x[i][r + 1] = a - b;
      }
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float other = __shfl_xor_sync(kAllLanes, x[i][r], bit);
          x[i][r] = (j & bit) ? other - x[i][r] : x[i][r] + other;
        }
      }
    }
#pragma unroll
    for (int half = 1; half < H::kSize / 8; half *= 2) {
#pragma unroll
      for (int i = 0; i < kValueTiles; i++) {
        if (i & half) continue;
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float a = x[i][r], b = x[i + half][r];
          x[i][r] = a + b;
          x[i + half][r] = a - b;
        }
      }
    }
  };
  auto factor = [&] {
    if constexpr (H::kFactor > 1) {
      constexpr int kInner = H::kSize / 8;
#pragma unroll
      for (int inner = 0; inner < kInner; inner++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float y[H::kFactor];
#pragma unroll
          for (int i = 0; i < H::kFactor; i++) y[i] = x[i * kInner + inner][r];
#pragma unroll
          for (int i = 0; i < H::kFactor; i++) {
            float sum = 0;
#pragma unroll
            for (int t = 0; t < H::kFactor; t++)
              sum += ((kBack ? H::row_bits(t) >> i : H::row_bits(i) >> t) & 1) ? -y[t] : y[t];
            x[i * kInner + inner][r] = sum;
          }
        }
      }
    }
  };
  if constexpr (H::kFactor > 0) {
    if constexpr (kBack) {
      factor();
      sylvester();
      signs();
    } else {
      signs();
      sylvester();
      factor();
    }
  }
}

// The warp's rows into shared memory, as given and rotated, with their scales.
TQ_DEVICE void prepare_rows(const PromptParams& p, char* shared, const Memory& memory, const Sequence& sequence, int tile_row0,
                            int warp_row0, int lane) {
  constexpr int kSlotsOfLane = kKeyDim / 32;
  float balance[kSlotsOfLane];
#pragma unroll
  for (int k = 0; k < kSlotsOfLane; k++) {
    const int d = lane + 32 * k;
    balance[k] =
        p.balance && d < p.head_dim ? 1.0f / p.balance[sequence.h * p.balance_stride[0] + d * p.balance_stride[1]] : 1.0f;
  }
  float* scales = reinterpret_cast<float*>(shared + kLayout.scale_at);
  // Rows at a time: loads and exchanges of several are in flight together.
  constexpr int kBatch = !kGroups ? 1 : kKeyDim <= 128 ? 4 : 2;
#pragma unroll 1
  for (int i = 0; i < 16; i += kBatch) {
    const int r0 = warp_row0 + i;
    float x[kBatch][kSlotsOfLane];
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int row = tile_row0 + r0 + b;
      const int64_t at = sequence.b * p.q_stride[0] + (sequence.h * p.n_repeats + row % p.n_repeats) * p.q_stride[1] +
                         row / p.n_repeats * p.q_stride[2];
#pragma unroll
      for (int k = 0; k < kSlotsOfLane; k++) {
        const int d = lane + 32 * k;
        x[b][k] = row < sequence.n_rows && d < p.head_dim ? p.sign * load_element<kType>(p.q, at + d * p.q_stride[3]) : 0.0f;
      }
    }
    // A row times 2^up, its largest element below 2^15, as what it meets may be as large.
    auto store = [&](int part, int to, int rest_to) {
      float top[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        top[b] = 0;
#pragma unroll
        for (int k = 0; k < kSlotsOfLane; k++) top[b] = fmaxf(top[b], fabsf(x[b][k]));
      }
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
#pragma unroll
        for (int b = 0; b < kBatch; b++) top[b] = fmaxf(top[b], __shfl_xor_sync(kAllLanes, top[b], o));
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const int r = r0 + b, up = clamp(14 - (int(__float_as_uint(top[b]) >> 23) - 127), -120, 60);
#pragma unroll
        for (int k = 0; k < kSlotsOfLane; k++) {
          const int d = lane + 32 * k;
          const float y = x[b][k] * power_of_two(up);
          const uint16_t high = float_to_half(y);
          const uint32_t place = swizzle(d / 64 * kRows * 128 + r * 128, r, d % 64 / 8) + 2 * (d % 8);
          store_shared_half(memory.base + to + place, high);
          if (rest_to) store_shared_half(memory.base + rest_to + place, float_to_half(y - half_to_float(high)));
        }
        if (lane == 0) {
          // Not zero, so that a masked score times it is not NaN.
          scales[part * kRows + r] = fmaxf((part == 1 ? p.scale * kLevelFactor : p.scale) * power_of_two(-up), 1e-36f);
        }
      }
    };
    store(0, kLayout.query_at, kFloat32 ? kLayout.query_low_at : 0);
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
#pragma unroll
      for (int k = 0; k < kSlotsOfLane; k++) x[b][k] *= balance[k];
      if constexpr (Hadamard<kKeyDim>::kFactor > 0) {
        float* scratch = reinterpret_cast<float*>(shared + kLayout.scratch_at) + warp_row0 / 16 * kKeyDim;
        if (p.hadamard) Hadamard<kKeyDim>::template rotate<TQ_ROTATION_SEED>(x[b], lane, scratch);
      }
    }
    store(1, kLayout.rotated_at, kFloat32 ? kLayout.rotated_low_at : 0);
  }
}

// scores (of a tile of 64 tokens, rows g and g + 8 with tokens 8 i + 2 j, 8 i + 2 j + 1) += rows times the keys of a slot.
template <int n>
TQ_DEVICE void multiply_keys(float (&scores)[kTokenTiles][4], const uint32_t (&query)[n][4], uint32_t tile, uint32_t slot,
                             bool add, int warp, int lane) {
#if WGMMA
  const uint32_t place = slot >> 4, rows_place = (tile + warp / 4 * 64 * 128) >> 4;
#pragma unroll
  for (int step = 0; step < kKeySteps; step++) {
    const uint64_t keys = operand_at(place + (step / 4 * kRun + step % 4 * 32) / 16);
    if constexpr (n > 1) {
      multiply_group_64<0, true>(scores, query[step], keys, add || step > 0);
    } else {
      const uint32_t rows = rows_place + (step / 4 * kRows * 128 + step % 4 * 32) / 16;
      multiply_group_shared(scores, operand_at(rows), keys, add || step > 0);
    }
  }
#else
  if (!add) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) scores[i][k] = 0;
    }
  }
  const int token = lane % 8 + lane / 16 * 8, column = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kKeySteps; step++) {
    uint32_t a[4];
    if constexpr (n > 1) {
#pragma unroll
      for (int k = 0; k < 4; k++) a[k] = query[step][k];
    } else {
      load_query(a, tile, 16 * warp, step, lane);
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; i += 2) {
      uint32_t b[4];
      load_matrices_shared(b, swizzle(slot + step / 4 * kRun + (8 * i + token) * 128, token, step % 4 * 2 + column));
      multiply_half(scores[i], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply_half(scores[i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
#endif
}

#if WGMMA
template <int kAt>
TQ_DEVICE void multiply_values_from(float (&acc)[kValueTiles][4], const uint32_t (&weights)[4], uint32_t tokens) {
  if constexpr (kAt + 16 <= kValueTiles) {
    multiply_group_128<kAt, kRun>(acc, weights, tokens + kAt / 8 * kRun / 16);
    multiply_values_from<kAt + 16>(acc, weights, tokens);
  } else if constexpr (kAt + 8 <= kValueTiles) {
    multiply_group_64<kAt, false>(acc, weights, operand_at(tokens + kAt / 8 * kRun / 16), true);
    multiply_values_from<kAt + 8>(acc, weights, tokens);
  } else if constexpr (kAt < kValueTiles) {
    multiply_group_32<kAt, false>(acc, weights, operand_at(tokens + kAt / 8 * kRun / 16), true);
  }
}
#endif

// acc += weights (fragments of 16 tokens each) times the values of a slot.
TQ_DEVICE void multiply_values(float (&acc)[kValueTiles][4], const uint32_t (&weights)[kPromptTile / 16][4], uint32_t slot,
                               int lane) {
#pragma unroll
  for (int step = 0; step < kPromptTile / 16; step++) {
#if WGMMA
    multiply_values_from<0>(acc, weights[step], (slot >> 4) + step * 128);
#else
    const int token = 16 * step + lane % 16;
#pragma unroll
    for (int i = 0; i < kValueTiles; i += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, swizzle(slot + i / 8 * kRun + token * 128, token, i % 8 + lane / 16));
      const uint32_t (&a)[4] = weights[step];
      multiply_half(acc[i], a[0], a[1], a[2], a[3], b[0], b[1]);
      multiply_half(acc[i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
#endif
  }
}

// Products of the means of eight blocks with the rows as given: rows g and g + 8, blocks 2 j and 2 j + 1.
TQ_DEVICE void score_means(float (&scores)[4], const PromptParams& p, const Memory& memory, int warp, int lane) {
#pragma unroll
  for (int k = 0; k < 4; k++) scores[k] = 0;
  const uint32_t row = memory.base + kLayout.mean_at + lane % 8 * kLayout.mean_row + lane / 8 * 16;
#pragma unroll 2
  for (int step = 0; step < kKeySteps; step += 2) {
    uint32_t b[4], low[4];
    load_matrices_shared(b, row + step * 32);
    const bool split = p.means_kind == kMeansFloat32;
    if (split) load_matrices_shared(low, row + step * 32 + kPromptMeans * kLayout.mean_row);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      uint32_t a[4];
      load_query(a, memory.base + kLayout.query_at, 16 * warp, step + k, lane);
      multiply_half(scores, a[0], a[1], a[2], a[3], b[2 * k], b[2 * k + 1]);
      if (split) multiply_half(scores, a[0], a[1], a[2], a[3], low[2 * k], low[2 * k + 1]);
      if constexpr (kFloat32) {
        load_query(a, memory.base + kLayout.query_low_at, 16 * warp, step + k, lane);
        multiply_half(scores, a[0], a[1], a[2], a[3], b[2 * k], b[2 * k + 1]);
      }
    }
  }
}

#if !WGMMA
// The products of single warps are over when they return.
TQ_DEVICE void products_begin() {}
TQ_DEVICE void products_commit() {}
template <int kPending>
TQ_DEVICE void products_wait() {}
template <class T, int n>
TQ_DEVICE void hold(T (&)[n][4]) {}
#endif

TQ_DEVICE void shrink_rows(float (&acc)[kValueTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kValueTiles; i++) {
    acc[i][0] *= factor[0], acc[i][1] *= factor[0];
    acc[i][2] *= factor[1], acc[i][3] *= factor[1];
  }
}

TQ_DEVICE void consume(const PromptParams& p, const Sequence& sequence, const Range& range, const Memory& memory,
                       const char* shared, int tile_row0, int warp, int lane, Rows& x) {
  const int g = lane >> 2, j = lane & 3;
  int row[2], query[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    row[k] = tile_row0 + 16 * warp + g + 8 * k;
    query[k] = row[k] / p.n_repeats;
    x.max[k] = kEmptyMax;
    x.sum[k] = 0;
  }
#pragma unroll
  for (int i = 0; i < kValueTiles; i++) {
#pragma unroll
    for (int k = 0; k < 4; k++) x.acc[i][k] = 0;
  }
  int64_t mask_at[2] = {};
  if constexpr (kMask != kMaskNone) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int head = sequence.h * p.n_repeats + row[k] % p.n_repeats;
      mask_at[k] = sequence.b * p.mask_stride[0] + head * p.mask_stride[1] + query[k] * p.mask_stride[2];
    }
  }
  const float* scales = reinterpret_cast<const float*>(shared + kLayout.scale_at) + 16 * warp + g;

  Cursor cursor;
  auto wait = [&](const Cursor& c) {
    slot_barrier_wait(memory.filled(c), c.parity);
    return memory.slot(c);
  };
  auto release = [&](const Cursor& c) {
    __syncwarp();
    if (lane == 0) slot_barrier_arrive(memory.emptied(c));
  };

#pragma unroll 1
  for (int phase = 0; phase < 2; phase++) {
    const bool coded = phase == 1;
    if (coded && range.exact_begin < range.exact_end) {
      constexpr float kFactor = kLloyd ? 1.0f / kLevelFactor : 1.0f;
      if (p.hadamard) {
        rotate_rows<false>(x.acc, j, kFactor / sqrtf(float(kValueDim)));
      } else if (kLloyd) {
#pragma unroll
        for (int i = 0; i < kValueTiles; i++) {
#pragma unroll
          for (int k = 0; k < 4; k++) x.acc[i][k] *= kFactor;
        }
      }
    }
    const int begin = coded ? range.coded_begin : range.exact_begin, end = coded ? range.coded_end : range.exact_end;
    if (begin >= end) continue;
    const bool split_keys = kFloat32 && !coded;
    // Coded tiles of which each row attends to every token.
    const int whole_begin = (range.token_begin + kPromptTile - 1) / kPromptTile;
    const int whole_end = max(0, sequence.coded_end(p, range.first_query)) / kPromptTile;
    const uint32_t rows_tile = memory.base + (coded ? kLayout.rotated_at : kLayout.query_at);
    const uint32_t low_tile = memory.base + (coded ? kLayout.rotated_low_at : kLayout.query_low_at);
    uint32_t rows[kQueryInRegisters ? kKeySteps : 1][4];
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < kKeySteps; step++) load_query(rows[step], rows_tile, 16 * warp, step, lane);
    }
    const float row_scale[2] = {scales[phase * kRows], scales[phase * kRows + 8]};
    float mean_scores[4] = {};
    float s[kTokenTiles][4];
    uint32_t weights[kPromptTile / 16][4];

    // Scores of a tile, in flight until they are waited for.
    Cursor keys, rest;
    auto start_scores = [&] {
      keys = cursor;
      const uint32_t slot = wait(cursor);
      cursor.next();
      products_begin();
      multiply_keys(s, rows, rows_tile, slot, false, warp, lane);
      if constexpr (kFloat32) multiply_keys(s, rows, low_tile, slot, true, warp, lane);
      if (split_keys) {
        rest = cursor;
        multiply_keys(s, rows, rows_tile, wait(cursor), true, warp, lane);
        cursor.next();
      }
      products_commit();
    };
    // A score is the product times factor plus offset. Here since the means that are read come with the first keys of eight
    // tiles.
    float factor[2], offset[2];
    auto find_offsets = [&](int tile) {
#pragma unroll
      for (int r = 0; r < 2; r++) factor[r] = row_scale[r], offset[r] = 0;
      if (coded && p.means) {
        const int step = (tile - begin) % kPromptMeans;
        if (step == 0) score_means(mean_scores, p, memory, warp, lane);
        const float a = step & 1 ? mean_scores[1] : mean_scores[0], b = step & 1 ? mean_scores[3] : mean_scores[2];
        offset[0] = __shfl_sync(kAllLanes, a, (lane & 28) | step >> 1) * scales[0];
        offset[1] = __shfl_sync(kAllLanes, b, (lane & 28) | step >> 1) * scales[8];
      }
    };
    auto end_scores = [&] {
      hold(s);
      if (kFloat32 && coded) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; i++) {
          const float2 norm = load_shared_pair(memory.norms(keys) + 4 * (8 * i + 2 * j));
          s[i][0] *= norm.x, s[i][1] *= norm.y;
          s[i][2] *= norm.x, s[i][3] *= norm.y;
        }
      }
      release(keys);
      if (split_keys) release(rest);
    };
    // -inf for what a row does not attend to, where that is not so of any; biases of a mask.
    auto mask_scores = [&](int tile) {
      const int first = tile * kPromptTile;
      bool whole;
      if (coded) {
        whole = tile >= whole_begin && tile < whole_end;
      } else {
        const ExactToken a(p, sequence, first), b(p, sequence, first + kPromptTile - 1);
        whole = !p.lengths && a.there && b.there && b.seen_from(p, sequence) <= range.first_query;
      }
      if (kMask == kMaskNone && whole) return;
#pragma unroll
      for (int i = 0; i < kTokenTiles; i++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int token = first + 8 * i + 2 * j + c;
          int column = p.n_first + token, seen_from;
          if (coded) {
            seen_from = sequence.coded_seen_from(p, token);
          } else {
            const ExactToken t(p, sequence, token);
            column = t.column;
            seen_from = t.seen_from(p, sequence);
          }
#pragma unroll
          for (int r = 0; r < 2; r++) {
            bool attended = query[r] >= seen_from;
            float y = s[i][2 * r + c];
            if constexpr (kMask != kMaskNone) {
              const int64_t at = mask_at[r] + column * p.mask_stride[3];
              const bool there = attended && row[r] < sequence.n_rows;
              if constexpr (kMask == kMaskBool) {
                if (there) attended = static_cast<const bool*>(p.mask)[at];
              } else {
                y = fmaf(y, factor[r], offset[r]);
                if (there) {
                  const float bias = static_cast<const float*>(p.mask)[at] * kLog2e;
                  attended = bias != -INFINITY;  // also where the score is no number
                  y += bias;
                }
              }
            }
            s[i][2 * r + c] = attended ? y : -INFINITY;
          }
        }
      }
      if constexpr (kMask == kMaskFloat) {
#pragma unroll
        for (int r = 0; r < 2; r++) factor[r] = 1, offset[r] = 0;
      }
    };
    float shrink[2];  // of what is relative to a running maximum that has moved
    bool renew;       // it has
    auto find_top = [&](int r) {
      float y = s[0][2 * r];
#pragma unroll
      for (int i = 0; i < kTokenTiles; i++) y = fmaxf(y, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
      return fmaf(y, factor[r], offset[r]);
    };
    auto move_maximum = [&](int r, float top) {
      float y = fmaxf(x.max[r], top);
      y = fmaxf(y, __shfl_xor_sync(kAllLanes, y, 1));
      y = fmaxf(y, __shfl_xor_sync(kAllLanes, y, 2));
      shrink[r] = exp2_fast(x.max[r] - y);
      x.max[r] = y;
      x.sum[r] *= shrink[r];
    };
    // Weights relative to the running maximum, in place of the scores.
    auto weigh = [&] {
      const float top[2] = {find_top(0), find_top(1)};
      renew = __any_sync(kAllLanes, top[0] > x.max[0] + kGrowth || top[1] > x.max[1] + kGrowth);
      if (renew) {
#pragma unroll
        for (int r = 0; r < 2; r++) move_maximum(r, top[r]);
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float start = offset[r] - x.max[r];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kTokenTiles; i++) {
#pragma unroll
          for (int k = 2 * r; k < 2 * r + 2; k++) {
            s[i][k] = exp2_fast(fmaf(s[i][k], factor[r], start));
            sum += s[i][k];
          }
        }
        x.sum[r] += sum;
      }
    };
    auto pack = [&] {
#pragma unroll
      for (int i = 0; i < kTokenTiles; i++) {
        weights[i / 2][i % 2 * 2] = pack_halves(s[i][0], s[i][1]);
        weights[i / 2][i % 2 * 2 + 1] = pack_halves(s[i][2], s[i][3]);
      }
    };
    // The same beside the scores. Whether a weight may have grown is seen in their sums, so that most tiles need no maximum.
    auto exponentials = [&](uint32_t (&to)[kPromptTile / 16][4], float (&sum)[2]) {
      const float start[2] = {offset[0] - x.max[0], offset[1] - x.max[1]};
      sum[0] = sum[1] = 0;
#pragma unroll
      for (int i = 0; i < kTokenTiles; i++) {
        float y[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          y[k] = exp2_fast(fmaf(s[i][k], factor[k / 2], start[k / 2]));
          sum[k / 2] += y[k];
        }
        to[i / 2][i % 2 * 2] = pack_halves(y[0], y[1]);
        to[i / 2][i % 2 * 2 + 1] = pack_halves(y[2], y[3]);
      }
    };
    auto weigh_beside = [&](uint32_t (&to)[kPromptTile / 16][4]) {
      float sum[2];
      exponentials(to, sum);
      renew = __any_sync(kAllLanes, !(fmaxf(sum[0], sum[1]) <= kMostSum));
      if (renew) {
#pragma unroll
        for (int r = 0; r < 2; r++) move_maximum(r, find_top(r));
        exponentials(to, sum);
      }
#pragma unroll
      for (int r = 0; r < 2; r++) x.sum[r] += sum[r];
    };
    // A zero that the compiler does not know: a mere copy of registers would be made one with its source, which is written
    // while products read it.
    uint32_t zero = 0;
    asm volatile("" : "+r"(zero));
    start_scores();
    find_offsets(begin);
    products_wait<0>();
    end_scores();
    mask_scores(begin);
    if constexpr (kBeside) {
      weigh_beside(weights);
    } else {
      weigh();
      pack();
    }
    // The sum of an earlier phase.
    if (renew) shrink_rows(x.acc, shrink);
    Cursor values = cursor;
    cursor.next();
#pragma unroll 1
    for (int tile = begin + 1; tile < end; tile++) {
      if constexpr (kGroups) {
        start_scores();
        const uint32_t slot = wait(values);
        products_begin();
        multiply_values(x.acc, weights, slot, lane);
        products_commit();
        find_offsets(tile);
        products_wait<1>();
        end_scores();
        mask_scores(tile);
        if constexpr (kBeside) {
          // The products in flight read the weights of the tile before.
          uint32_t next[kPromptTile / 16][4];
          weigh_beside(next);
          products_wait<0>();
          hold(x.acc);
          hold(weights);
          release(values);
          if (renew) shrink_rows(x.acc, shrink);
#pragma unroll
          for (int i = 0; i < kPromptTile / 16; i++) {
#pragma unroll
            for (int k = 0; k < 4; k++) weights[i][k] = next[i][k] | zero;
          }
        } else {
          weigh();
          products_wait<0>();
          hold(x.acc);
          release(values);
          if (renew) shrink_rows(x.acc, shrink);
          pack();
        }
      } else {
        // Nothing is in flight: in the order that takes fewest registers.
        multiply_values(x.acc, weights, wait(values), lane);
        release(values);
        start_scores();
        find_offsets(tile);
        end_scores();
        mask_scores(tile);
        weigh();
        if (renew) shrink_rows(x.acc, shrink);
        pack();
      }
      values = cursor;
      cursor.next();
    }
    const uint32_t slot = wait(values);
    products_begin();
    multiply_values(x.acc, weights, slot, lane);
    products_commit();
    products_wait<0>();
    hold(x.acc);
    release(values);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    x.sum[r] += __shfl_xor_sync(kAllLanes, x.sum[r], 1);
    x.sum[r] += __shfl_xor_sync(kAllLanes, x.sum[r], 2);
  }
}

// Writes this block's share; the last block of the row tile adds up all of them. Whether this is the last.
TQ_DEVICE bool join(const PromptParams& p, char* shared, int tile_index, int split, int n_splits, int warp, int lane, Rows& x) {
  const int g = lane >> 2, j = lane & 3;
  const int64_t first = int64_t(tile_index) * n_splits;
  auto out_of = [&](int s) {
    return reinterpret_cast<float4*>(p.partial_out) + ((first + s) * kConsumerWarps + warp) * (kValueTiles * 32) + lane;
  };
  auto state_of = [&](int s, int r) {
    return reinterpret_cast<float2*>(p.partial_state) + (first + s) * kRows + 16 * warp + g + 8 * r;
  };
  float4* out = out_of(split);
#pragma unroll
  for (int i = 0; i < kValueTiles; i++) out[32 * i] = make_float4(x.acc[i][0], x.acc[i][1], x.acc[i][2], x.acc[i][3]);
  if (j == 0) {
#pragma unroll
    for (int r = 0; r < 2; r++) *state_of(split, r) = make_float2(x.max[r], x.sum[r]);
  }
  __threadfence();
  barrier_of_threads(1, 32 * kConsumerWarps);
  volatile uint32_t* is_last = reinterpret_cast<uint32_t*>(shared + kLayout.is_last_at);
  if (warp == 0 && lane == 0) {
    uint32_t* counter = p.counters + tile_index;
    *is_last = atomicAdd(counter, 1u) == uint32_t(n_splits - 1);
    if (*is_last) *counter = 0;
  }
  barrier_of_threads(1, 32 * kConsumerWarps);
  if (!*is_last) return false;
  __threadfence();
#pragma unroll
  for (int r = 0; r < 2; r++) x.max[r] = kEmptyMax, x.sum[r] = 0;
#pragma unroll 1
  for (int s = 0; s < n_splits; s++) {
#pragma unroll
    for (int r = 0; r < 2; r++) x.max[r] = fmaxf(x.max[r], __ldcg(state_of(s, r)).x);
  }
#pragma unroll
  for (int i = 0; i < kValueTiles; i++) {
#pragma unroll
    for (int k = 0; k < 4; k++) x.acc[i][k] = 0;
  }
#pragma unroll 1
  for (int s = 0; s < n_splits; s++) {
    float f[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float2 y = __ldcg(state_of(s, r));
      f[r] = exp2_fast(y.x - x.max[r]);
      x.sum[r] = fmaf(f[r], y.y, x.sum[r]);
    }
    const float4* from = out_of(s);
#pragma unroll
    for (int i = 0; i < kValueTiles; i++) {
      const float4 y = __ldcg(from + 32 * i);
      x.acc[i][0] = fmaf(f[0], y.x, x.acc[i][0]), x.acc[i][1] = fmaf(f[0], y.y, x.acc[i][1]);
      x.acc[i][2] = fmaf(f[1], y.z, x.acc[i][2]), x.acc[i][3] = fmaf(f[1], y.w, x.acc[i][3]);
    }
  }
  return true;
}

TQ_DEVICE void write_rows(const PromptParams& p, const Sequence& sequence, int tile_row0, int warp, int lane, Rows& x) {
  const int g = lane >> 2, j = lane & 3;
  float inverse[2];
  int64_t at[2];
  bool there[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = tile_row0 + 16 * warp + g + 8 * r, q_head = sequence.h * p.n_repeats + row % p.n_repeats;
    there[r] = row < sequence.n_rows;
    at[r] = ((int64_t(sequence.b) * p.n_kv_heads * p.n_repeats + q_head) * p.n_queries + row / p.n_repeats) * p.value_dim;
    float sum = x.sum[r], shrink = 1;
    if (p.sinks && there[r]) {
      const float sink = p.sinks[q_head * p.sinks_stride] * kLog2e, top = fmaxf(x.max[r], sink);
      shrink = exp2_fast(x.max[r] - top);
      sum = fmaf(sum, shrink, exp2_fast(sink - top));
    }
    inverse[r] = sum == 0 ? 0.0f : shrink / sum;
  }
  shrink_rows(x.acc, inverse);
  constexpr float kFactor = kLloyd ? kLevelFactor : 1.0f;
  float last = kFactor;
  if (p.hadamard) {
    rotate_rows<true>(x.acc, j, kFactor / sqrtf(float(kValueDim)));
    last = 1;
  }
#pragma unroll
  for (int i = 0; i < kValueTiles; i++) {
    const int d = 8 * i + 2 * j;
    if (8 * i >= p.value_dim) break;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!there[r]) continue;
      const float y = x.acc[i][2 * r] * last, z = x.acc[i][2 * r + 1] * last;
      if constexpr (kFloat32) {
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at[r] + d) = make_float2(y, z);
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at[r] + d) = pack_16bit<kType>(y, z);
      }
    }
  }
}

}  // namespace

#if TILES == 2
// Decodes tiles into memory. Grid: (tiles of a head, heads); one team for keys and one for values.
extern "C" __global__ void __launch_bounds__(2 * kProducers) prompt_tiles(const __grid_constant__ PromptParams p) {
  extern __shared__ __align__(1024) char dynamic[];
  const uint32_t start = shared_address(dynamic), base = (start + kLayout.kAlignment - 1) & ~(kLayout.kAlignment - 1u);
  const int tid = threadIdx.x, team = __shfl_sync(kAllLanes, tid / kProducers, 0);
  const int token = tid % kPromptTile, half = __shfl_sync(kAllLanes, tid % kProducers / kPromptTile, 0);
  const Sequence sequence(p, p.head0 + blockIdx.y);
  const int tile = blockIdx.x, n_exact = (sequence.n_exact + kPromptTile - 1) / kPromptTile;
  const uint32_t slot = base + team * kLayout.slot;
  auto acquire = [&] { return slot; };
  if (tile < n_exact) {
    const ExactToken t(p, sequence, tile * kPromptTile + token);
    if (team == 0) {
      copy_exact<kKeyUnits>(exact_row(sequence, t, p.first_keys, p.first_key_stride, p.tail_keys, p.tail_key_stride),
                            t.is_first ? p.first_key_stride[3] : p.tail_key_stride[3], t.there, p.head_dim, p.wide_exact, 0,
                            token, half, acquire);
    } else {
      copy_exact<kValueUnits>(exact_row(sequence, t, p.first_values, p.first_value_stride, p.tail_values, p.tail_value_stride),
                              t.is_first ? p.first_value_stride[3] : p.tail_value_stride[3], t.there, p.value_dim, p.wide_exact,
                              0, token, half, acquire);
    }
  } else {
    Range range;
    range.coded_begin = tile - n_exact;
    range.token_begin = 0;
    range.token_end = p.n_coded;
    if (team == 0) {
      const KeySide side(p, sequence, range, token, half, tid);
      decode_levels<kKeyUnits, kKeyBits>(side.next, p.key_levels, side.next.norm, slot, token, half);
    } else {
      const ValueSide side(p, sequence, range, token, half);
#if LLOYD
      decode_levels<kValueUnits, kValueBits>(side.next, p.value_levels, side.next.norm, slot, token, half);
#else
      if (half == 0) {
        decode_groups<0>(side.next, slot, token);
      } else {
        decode_groups<1>(side.next, slot, token);
      }
#endif
    }
  }
  __syncthreads();
  uint4* to = reinterpret_cast<uint4*>(p.tiles + (int64_t(blockIdx.y) * p.n_tiles + tile) * (2 * kLayout.slot));
#pragma unroll
  for (int i = tid; i < 2 * kLayout.slot / 16; i += 2 * kProducers) to[i] = load_shared(base + 16 * i);
}
#else
extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM) prompt_attention(const __grid_constant__ PromptParams p) {
  extern __shared__ __align__(1024) char dynamic[];
  const uint32_t start = shared_address(dynamic), base = (start + kLayout.kAlignment - 1) & ~(kLayout.kAlignment - 1u);
  char* shared = dynamic + (base - start);
  const Memory memory{base};
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(kAllLanes, tid >> 5, 0);  // tells the compiler that it is uniform
  // The last rows first: of causal ones they take longest.
  const int row_tile = gridDim.x - 1 - blockIdx.x, split = blockIdx.y, n_splits = gridDim.y, head = p.head0 + blockIdx.z;
  const int tile_row0 = row_tile * kRows;
  if (tid < kSlots) {
    Cursor c;
    c.slot = tid;
    slot_barrier_init(memory.filled(c), kProducerWarps);
    slot_barrier_init(memory.emptied(c), kConsumerWarps);
  }
  __syncthreads();
  // Kept in shared memory: registers are short, and little of it is needed for most tiles.
  Task& task = *reinterpret_cast<Task*>(shared + kLayout.task_at);
  if (tid == 0) {
    const Sequence sequence(p, head);
    task = {sequence, Range(p, sequence, tile_row0, split, n_splits)};
  }
  __syncthreads();
  const Sequence& sequence = task.sequence;
  const Range& range = task.range;

  if (warp < kTeams * kProducerWarps) {
#if WGMMA
    if constexpr (kMoveRegisters) set_registers_down<kProducerRegisters>();
#endif
#if TILES == 1
    copy_tiles(p, sequence, range, memory, tid);
#else
    produce(p, sequence, range, memory, tid);
#endif
  } else {
#if WGMMA
    if constexpr (kMoveRegisters) set_registers_up<kConsumerRegisters>();
#endif
    const int consumer = warp - kTeams * kProducerWarps;
    prepare_rows(p, shared, memory, sequence, tile_row0, 16 * consumer, lane);
    operand_fence();
    if constexpr (kGroups && !kQueryInRegisters) {
      barrier_of_threads(2 + consumer / 4, 128);
    } else {
      __syncwarp();
    }
    Rows x;
    consume(p, sequence, range, memory, shared, tile_row0, consumer, lane, x);
    if (n_splits == 1 || join(p, shared, head * gridDim.x + row_tile, split, n_splits, consumer, lane, x)) {
      write_rows(p, sequence, tile_row0, consumer, lane, x);
    }
  }
}

#endif

}  // namespace tqext::cuda
