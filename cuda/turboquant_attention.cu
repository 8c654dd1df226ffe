// Decode attention over packed keys and values (format.h), exact first tokens and an exact tail, in one launch.
//
// Grid: (splits, batch * n_kv_heads, row tiles). A block takes one share of a KV head's coded tokens for kRows query rows;
// blocks with a number below n_exact_blocks take a chunk of the exact tokens as well. Every block writes a partial softmax
// state; the last one of a head (atomic counter) joins them, rotates the result back and writes the output.
//
// Scores: the query is split into two int8 halves (16 bits), the key codes become int8 levels by byte permutation, int8 tensor
// cores multiply 16 rows (the high halves of 8 query rows, then their low halves) by 8 tokens: both sums of a score meet in one
// lane, in the place where the next product wants its weight.
// A block's mean: the products of eight blocks' means with the rows are one run of fp16 tensor-core products, by each warp for
// itself and its next eight tiles.
// Values, groups: a code in place in a 16-bit half is an fp16 subnormal, exact as a factor of an fp16 tensor-core product; the
// group's scale goes into the softmax weight, the group's bias is one more row of the product. With up to four query rows the
// product has columns to spare: they hold the same weights with another group's scales, so that one fragment serves two groups.
// Values, Lloyd-Max: weight times norm is rounded to 16 bits of the tile's largest, in two int8 halves, which int8 tensor cores
// multiply by the codes' levels, 32 tokens at a time; the sums are added up in fp32. With four query rows the eight columns of
// a product are both halves of each.
//
// A list of tokens: the tiles are those of its slots. A thread copies a slot's token; an empty slot is zeros with the id -1.
// Each token has its own block's mean: one product for eight tokens, whose sums meet the scores in the lane that has them.
// Where each query has a list, a block has the rows of one query.
//
// Compile-time: KEY_DIM, VALUE_DIM (padded), KEY_BITS, VALUE_BITS, LLOYD, ROWS (4, 8, 16), TYPE, MASK, SIGNS, STRIDED, LISTED,
// STAGES, BLOCKS_PER_SM.
#include "device.cuh"

namespace tqext::cuda {
namespace {

constexpr int kKeyDim = KEY_DIM, kValueDim = VALUE_DIM, kKeyBits = KEY_BITS, kValueBits = VALUE_BITS;
constexpr int kRows = ROWS, kType = TYPE, kMask = MASK, kStages = STAGES;
constexpr bool kSigns = SIGNS, kStrided = STRIDED, kListed = LISTED, kLloyd = LLOYD;
constexpr int kWarps = kAttentionWarps, kThreads = 32 * kWarps;

constexpr int kKeyWords = kKeyDim / 32 * kKeyBits, kValueWords = kValueDim / 32 * kValueBits;
constexpr int kGroups = kValueDim / kGroup, kParams = kLloyd ? 1 : 2 * kGroups, kUnits = kKeyDim / kUnit;
constexpr int kLaneUnits = (kUnits + 3) / 4;  // units of 32 dimensions that one lane decodes
constexpr int kSignWords = kKeyDim / 32;

// With fp32 rows, what rounding takes off a weight times a scale is multiplied as well.
constexpr bool kExactProducts = kType == kTypeFloat32;
constexpr bool kFour = kRows == 4;
constexpr int kRowTiles = kFour ? 1 : kRows / 8;  // of 8 columns
// Scale fragments per row tile: with four rows, columns 4 ... 7 hold the groups from kScaleSets on.
constexpr int kScaleSets = kFour ? (kGroups + 1) / 2 : kGroups;
#if __CUDA_ARCH__ >= 900
constexpr bool kBulk = !kStrided && !kListed;
#else
constexpr bool kBulk = false;
#endif

// A weight is at most 2^kTop when the running maximum is renewed and may grow by 2^kGrowth before the next time; group scales
// up to 2^3 then keep the products below fp16's limit. Larger ones overflow, which is seen at the end: the block then repeats
// its share with weights smaller by 2^kSafeShift, enough for any fp16 scale.
constexpr uint32_t kOnes = 0x3c003c00u;  // fp16
constexpr float kTop = 4.0f, kGrowth = 8.0f, kSafeShift = 13.0f;

constexpr AttentionLayout kLayout(kKeyDim, kValueDim, kKeyBits, kValueBits, kLloyd, kRows, kType, kSigns, kListed, kStages);

TQ_DEVICE int clamp(int x, int low, int high) { return min(max(x, low), high); }

// Query rows of a block: those of all queries, or of one that has a list of its own.
TQ_DEVICE int block_queries(const AttentionParams& p) { return kListed && p.n_lists > 1 ? 1 : p.n_queries; }
TQ_DEVICE int first_query(const AttentionParams& p) { return kListed ? int(blockIdx.z) / p.row_tiles : 0; }
TQ_DEVICE int row_tile(const AttentionParams& p) { return kListed ? int(blockIdx.z) % p.row_tiles : int(blockIdx.z); }
// Query head and position of a row. One query at a time, the usual case, costs no division.
TQ_DEVICE int head_of_row(const AttentionParams& p, int row) { return block_queries(p) == 1 ? row : row / p.n_queries; }
TQ_DEVICE int position_of_row(const AttentionParams& p, int row) {
  return first_query(p) + (block_queries(p) == 1 ? 0 : row % p.n_queries);
}

// ---- Copies of a stage, kWarps tiles of kTileTokens tokens, into shared memory ----

constexpr int kStageTokens = kWarps * kTileTokens;

// base: the head's first byte rounded down to 16, lead: what the rounding took off. Tokens [first, first + n) exist.
template <int kRowBytes>
TQ_DEVICE void copy_stage(uint32_t to, const char* base, int lead, int first, int n, int tid) {
  constexpr int kGranules = (kStageTokens * kRowBytes + (kRowBytes % 16 ? 16 : 0)) / 16;
  const char* from = base + int64_t(first) * kRowBytes;
  const int end = n * kRowBytes + (kRowBytes % 16 ? lead : 0);
#pragma unroll
  for (int k = 0; k < (kGranules + kThreads - 1) / kThreads; k++) {
    const int i = tid + kThreads * k;
    if (kGranules % kThreads == 0 || i < kGranules) {
      const int bytes = clamp(end - 16 * i, 0, 16);
      copy_async_part(to + 16 * i, bytes ? from + 16 * i : base, bytes);
    }
  }
}

// Any strides: word by word; halves through registers.
template <int kWords>
TQ_DEVICE void copy_words_strided(uint32_t to, const char* from, const int64_t* stride, int first, int n, int tid) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  for (int i = tid; i < kStageTokens * kWords; i += kThreads) {
    const bool there = i / kWords < n;
    copy_async_word(to + 4 * i, there ? words + (first + i / kWords) * stride[2] + i % kWords * stride[3] : words,
                    there ? 4 : 0);
  }
}
template <int kHalves>
TQ_DEVICE void copy_halves_strided(char* to, const char* from, int64_t token_stride, int64_t stride, int first, int n,
                                   int tid) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  for (int i = tid; i < kStageTokens * kHalves; i += kThreads) {
    reinterpret_cast<uint16_t*>(to)[i] =
        i / kHalves < n ? halves[(first + i / kHalves) * token_stride + i % kHalves * stride] : uint16_t(0);
  }
}

// One KV head's packed arrays.
struct Head {
  const char *keys, *norms, *values, *params, *signs, *residuals;  // rounded down to 16 bytes
  int key_lead, norm_lead, value_lead, param_lead, sign_lead, residual_lead;
  const int32_t* list;

  TQ_DEVICE static void set(const char*& base, int& lead, const void* p) {
    lead = int(reinterpret_cast<uintptr_t>(p) & 15);
    base = static_cast<const char*>(p) - lead;
  }
};

TQ_DEVICE Head head_of(const AttentionParams& p, int b, int h) {
  Head x;
  Head::set(x.keys, x.key_lead, p.key_codes + b * p.key_code_stride[0] + h * p.key_code_stride[1]);
  Head::set(x.norms, x.norm_lead, p.key_norms + b * p.key_norm_stride[0] + h * p.key_norm_stride[1]);
  Head::set(x.values, x.value_lead, p.value_codes + b * p.value_code_stride[0] + h * p.value_code_stride[1]);
  Head::set(x.params, x.param_lead, p.value_params + b * p.value_param_stride[0] + h * p.value_param_stride[1]);
  if constexpr (kSigns) {
    Head::set(x.signs, x.sign_lead, p.signs + b * p.sign_stride[0] + h * p.sign_stride[1]);
    Head::set(x.residuals, x.residual_lead, p.residual_norms + b * p.residual_norm_stride[0] + h * p.residual_norm_stride[1]);
  }
  if constexpr (kListed) {
    x.list = p.indices + b * p.index_stride[0] + h * p.index_stride[1] + first_query(p) * p.index_stride[2];
  }
  if constexpr (kStrided || kListed) {
    // These copies start at the head's first element.
    x.keys += x.key_lead, x.norms += x.norm_lead, x.values += x.value_lead, x.params += x.param_lead;
    x.key_lead = x.norm_lead = x.value_lead = x.param_lead = 0;
    if constexpr (kSigns) {
      x.signs += x.sign_lead, x.residuals += x.residual_lead;
      x.sign_lead = x.residual_lead = 0;
    }
  }
  return x;
}

// By all threads of the block.
TQ_DEVICE void copy_stage(const AttentionParams& p, const Head& head, char* stage, int first, int n, int tid) {
  const uint32_t to = shared_address(stage);
  if constexpr (kStrided) {
    copy_words_strided<kKeyWords>(to, head.keys, p.key_code_stride, first, n, tid);
    copy_words_strided<kValueWords>(to + kLayout.value_at, head.values, p.value_code_stride, first, n, tid);
    copy_halves_strided<kParams>(stage + kLayout.param_at, head.params, p.value_param_stride[2], p.value_param_stride[3], first,
                                 n, tid);
    copy_halves_strided<1>(stage + kLayout.norm_at, head.norms, p.key_norm_stride[2], 0, first, n, tid);
    if constexpr (kSigns) {
      copy_words_strided<kSignWords>(to + kLayout.sign_at, head.signs, p.sign_stride, first, n, tid);
      copy_halves_strided<1>(stage + kLayout.residual_at, head.residuals, p.residual_norm_stride[2], 0, first, n, tid);
    }
  } else {
    copy_stage<kLayout.key_row>(to, head.keys, head.key_lead, first, n, tid);
    copy_stage<kLayout.value_row>(to + kLayout.value_at, head.values, head.value_lead, first, n, tid);
    copy_stage<kLayout.param_row>(to + kLayout.param_at, head.params, head.param_lead, first, n, tid);
    copy_stage<2>(to + kLayout.norm_at, head.norms, head.norm_lead, first, n, tid);
    if constexpr (kSigns) {
      copy_stage<kLayout.sign_row>(to + kLayout.sign_at, head.signs, head.sign_lead, first, n, tid);
      copy_stage<2>(to + kLayout.residual_at, head.residuals, head.residual_lead, first, n, tid);
    }
  }
}

// One token's row of an array, by one thread. step: elements between the row's words, or halves.
template <int kRowBytes>
TQ_DEVICE void copy_row(uint32_t to, const char* from, int64_t step, bool there) {
  if constexpr (!kStrided && kRowBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kRowBytes; i += 16) copy_async_part(to + i, from + i, there ? 16 : 0);
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int i = 0; i < kRowBytes / 4; i++) copy_async_word(to + 4 * i, words + i * step, there ? 4 : 0);
  }
}
template <int kHalves>
TQ_DEVICE void copy_halves(char* to, const char* from, int64_t step, bool there) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
  for (int i = 0; i < kHalves; i++) reinterpret_cast<uint16_t*>(to)[i] = there ? halves[i * step] : uint16_t(0);
}

// The tokens of slots first ... first + n - 1 of the list whose ids are in [begin, end), one by each thread.
TQ_DEVICE void copy_listed(const AttentionParams& p, const Head& head, char* stage, int first, int n, int begin, int end,
                           int tid) {
  static_assert(kStageTokens == kThreads);
  const int id = tid < n ? head.list[(first + tid) * p.index_stride[3]] : -1;
  const bool there = id >= begin && id < end;
  const int64_t token = there ? id : 0;
  reinterpret_cast<int32_t*>(stage + kLayout.id_at)[tid] = there ? id : -1;
  const uint32_t to = shared_address(stage);
  copy_row<kLayout.key_row>(to + tid * kLayout.key_row, head.keys + 4 * token * p.key_code_stride[2], p.key_code_stride[3],
                            there);
  copy_row<kLayout.value_row>(to + kLayout.value_at + tid * kLayout.value_row, head.values + 4 * token * p.value_code_stride[2],
                              p.value_code_stride[3], there);
  const char* params = head.params + 2 * token * p.value_param_stride[2];
  if constexpr (!kStrided && kLayout.param_row % 16 == 0) {
    copy_row<kLayout.param_row>(to + kLayout.param_at + tid * kLayout.param_row, params, 1, there);
  }
  if constexpr (kSigns) {
    copy_row<kLayout.sign_row>(to + kLayout.sign_at + tid * kLayout.sign_row, head.signs + 4 * token * p.sign_stride[2],
                               p.sign_stride[3], there);
  }
  if (p.means_aligned && there) {  // as far as L2
    const uint16_t* mean = static_cast<const uint16_t*>(p.means) + blockIdx.y / p.n_kv_heads * p.mean_stride[0] +
                           blockIdx.y % p.n_kv_heads * p.mean_stride[1] + id / kBlockTokens * p.mean_stride[2];
#pragma unroll
    for (int d = 0; d < kKeyDim; d += 64) {
      if (d < p.head_dim) prefetch_line(mean + d);
    }
  }
  // Through registers, when everything else is on its way.
  if constexpr (kStrided || kLayout.param_row % 16 != 0) {
    copy_halves<kParams>(stage + kLayout.param_at + tid * kLayout.param_row, params, p.value_param_stride[3], there);
  }
  copy_halves<1>(stage + kLayout.norm_at + 2 * tid, head.norms + 2 * token * p.key_norm_stride[2], 0, there);
  if constexpr (kSigns) {
    copy_halves<1>(stage + kLayout.residual_at + 2 * tid, head.residuals + 2 * token * p.residual_norm_stride[2], 0, there);
  }
}

// By one lane and the copy engine. Behind the last token at most 15 bytes are read, of the 16 that its last byte is in.
TQ_DEVICE void copy_stage_bulk(const AttentionParams& p, const Head& head, uint32_t to, uint32_t barrier, int first, int n) {
  auto bytes = [&](int row, int lead) { return uint32_t(row % 16 == 0 ? n * row : (n * row + lead + 15) & ~15); };
  const uint32_t keys = bytes(kLayout.key_row, head.key_lead), values = bytes(kLayout.value_row, head.value_lead);
  const uint32_t params = bytes(kLayout.param_row, head.param_lead), norms = bytes(2, head.norm_lead);
  const uint32_t signs = kSigns ? bytes(kLayout.sign_row, head.sign_lead) : 0,
                 residuals = kSigns ? bytes(2, head.residual_lead) : 0;
  barrier_expect(barrier, keys + values + params + norms + signs + residuals);
  copy_bulk(to, head.keys + int64_t(first) * kLayout.key_row, keys, barrier);
  copy_bulk(to + kLayout.value_at, head.values + int64_t(first) * kLayout.value_row, values, barrier);
  copy_bulk(to + kLayout.param_at, head.params + int64_t(first) * kLayout.param_row, params, barrier);
  copy_bulk(to + kLayout.norm_at, head.norms + int64_t(first) * 2, norms, barrier);
  if constexpr (kSigns) {
    copy_bulk(to + kLayout.sign_at, head.signs + int64_t(first) * kLayout.sign_row, signs, barrier);
    copy_bulk(to + kLayout.residual_at, head.residuals + int64_t(first) * 2, residuals, barrier);
  }
}

// ---- Decoding ----

// Four codes as levels. With 4 bits they are the sum of two numbers, plus one.
struct LevelBytes {
  uint32_t first, second;
};
// selector: the codes in its low 16 bits. With 4 bits a code's highest bit makes the permutation repeat the sign of the byte
// that the others select: the negative levels' table, lower by one, gives -1 for a positive level's code, and the other table,
// for codes with that bit turned, 0 for a negative one's.
template <int kBits>
TQ_DEVICE LevelBytes find_levels(const uint32_t (&book)[4], uint32_t selector) {
  const uint32_t first = permute(book[0], book[1], selector);
  return {first, kBits == 4 ? permute(book[2], book[3], selector ^ 0x88888888u) : 0};
}

// Levels of one unit: r[2 s], r[2 s + 1] are dimensions 8 s ... 8 s + 7.
TQ_DEVICE void decode_unit(const uint32_t* w, const uint32_t (&book)[4], uint32_t two_16, LevelBytes (&r)[8]) {
  uint32_t select[4], top[4];
  if constexpr (kKeyBits == 4) {
#pragma unroll
    for (int s = 0; s < 4; s++) select[s] = w[s];  // the highest bit tells the table
  } else {
    split_codes<kKeyBits>(w, select, top);
  }
#pragma unroll
  for (int s = 0; s < 4; s++) {
    r[2 * s] = find_levels<kKeyBits>(book, select[s]);
    r[2 * s + 1] = find_levels<kKeyBits>(book, __umulhi(select[s], two_16));
  }
}

// +-1 of 32 sign bits: r[2 s + half] byte k is bit s + 4 k + 16 half.
TQ_DEVICE void decode_signs(uint32_t w, uint32_t (&r)[8]) {
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const uint32_t select = w >> s & 0x11111111u;
    r[2 * s] = permute(0x000001ffu, 0u, select);
    r[2 * s + 1] = permute(0x000001ffu, 0u, select >> 16);
  }
}
// Where residual dimension d of its unit goes in the int8 query, so that bytes meet (decode_signs).
TQ_DEVICE int residual_place(int d) { return 8 * (d % 4) + 4 * (d / 16) + d % 16 / 4; }

// Column of a product over 8 tokens <-> token: lanes of a quad then read values from different banks. A lane's scores belong to
// tokens j, j + 4 (columns 2 j, 2 j + 1) of each run of 8.
TQ_DEVICE int token_of_column(int column) { return (column >> 1) + 4 * (column & 1); }

// ---- A warp's part of the softmax ----

// A lane's part of a warp's softmax state: max of row row_of_group(g) of each row tile, the products of
// dimensions value_dimension(i, 0, g), then (i, 1, g) with columns 2 j, 2 j + 1 (Lloyd-Max, four rows: with row j).
// Groups: bias: of the groups' biases with these columns, then the columns' sums, as products with ones, so that they are sums
// of the same rounded weights. Lloyd-Max: sum: of the lane's weights of its row.
constexpr int kAccColumns = kLloyd && kFour ? 2 : 4;
struct Rows {
  float max[kRowTiles];
  float acc[kRowTiles][kValueDim / 16][kAccColumns];
  float bias[kRowTiles][4];
  float sum[kRowTiles];
};
// Row of a lane's scores within a row tile. With four rows two lanes have the same.
TQ_DEVICE int row_of_group(int g) { return !kFour ? g : kLloyd ? g >> 1 : g & 3; }
TQ_DEVICE bool first_of_row(int g) { return !kFour || (kLloyd ? g % 2 == 0 : g < 4); }

#if !LLOYD
// ---- Values in groups: fragment rows of 16 dimensions as fp16 subnormals ----

// Dimension of row g (r = 0) or g + 8 (r = 1) of product i.
TQ_DEVICE int value_dimension(int i, int r, int g) { return 16 * i + 8 * r + g; }

// Dimension d of a value vector: word d % kValueWords, bit kValueBits * (d / kValueWords). Rows g and g + 8 of tile i are
// dimensions 16 i + g and 16 i + 8 + g.
enum : int { kWordsMany, kWordsFour, kWordsAny };
constexpr int kWordLayout = kValueWords % 8 == 0 ? kWordsMany : kValueWords == 4 ? kWordsFour : kWordsAny;
constexpr int kWordsPerLane = kWordLayout == kWordsMany ? kValueWords / 8 : 1;
// Rows of the bias product: scale and bias of each group (16-byte rows can be loaded transposed), or the groups.
constexpr bool kBiasTransposed = kGroups == 4;
constexpr int kCodeMask = (1 << kValueBits) - 1;

// Of the bit position within a half: positions that do not fit fp16's ten fraction bits are shifted down first.
constexpr int kShift = kValueBits == 2 ? 10 : 8;
constexpr int fraction_bit(int bit) { return bit % 16 + kValueBits <= 10 ? bit % 16 : bit % 16 - kShift; }
// 2^(24 - bit): what turns a code at fraction bit `bit` of a subnormal into the code.
TQ_DEVICE float unscale(int bit) { return power_of_two(24 - bit); }

// Position of dimension 16 i + 8 r + g where it does not depend on the lane (kWordsMany, kWordsFour).
constexpr int code_bit(int i, int r) { return kValueBits * ((16 * i + 8 * r) / kValueWords); }
constexpr int word_base(int i, int r) { return (16 * i + 8 * r) % kValueWords / 8; }

TQ_DEVICE uint32_t take_codes(uint32_t pair, uint32_t pair_shifted, int bit) {
  const uint32_t mask = uint32_t(kCodeMask) * 0x10001u << fraction_bit(bit);
  return (bit % 16 + kValueBits <= 10 ? pair : pair_shifted) & mask;
}

// Adds a tile's weights times values.
TQ_DEVICE void add_values(const AttentionParams& p, Rows& x, const float (&score)[kRowTiles][2][2][2], const uint32_t* values,
                          const char* param_rows, int lane) {
  const uint32_t* params = reinterpret_cast<const uint32_t*>(param_rows);
  const int g = lane >> 2, j = lane & 3;
  const int bias_token = (lane & 8) + token_of_column(lane & 7);  // row of the transposed load
#pragma unroll
  for (int u = 0; u < 2; u++) {
    uint32_t weight[kRowTiles][2];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
      for (int v = 0; v < 2; v++) {
        const float w0 = exp2_fast(score[t][u][v][0]), w1 = exp2_fast(score[t][u][v][1]);
        weight[t][v] = pack_halves(w0, w1);
      }
    }
    const int token = 16 * u + j;  // and + 4, + 8, + 12
    {
      uint32_t a0, a2;
      if constexpr (kBiasTransposed) {
        load_transposed(a0, a2, shared_address(params + (16 * u + bias_token) * kGroups));
      } else {
        const uint32_t* q = params + token * kGroups + min(g, kGroups - 1);
        a0 = permute(q[0], q[4 * kGroups], 0x7632);
        a2 = permute(q[8 * kGroups], q[12 * kGroups], 0x7632);
      }
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) multiply_half(x.bias[t], a0, kOnes, a2, kOnes, weight[t][0], weight[t][1]);
    }
    uint32_t low_a[kWordsPerLane], high_a[kWordsPerLane], low_b[kWordsPerLane], high_b[kWordsPerLane];
    if constexpr (kWordLayout != kWordsAny) {
#pragma unroll
      for (int n = 0; n < kWordsPerLane; n++) {
        const uint32_t* w = values + token * kValueWords + (kWordLayout == kWordsMany ? 8 * n + g : g & 3);
        uint32_t w0 = w[0], w1 = w[4 * kValueWords], w2 = w[8 * kValueWords], w3 = w[12 * kValueWords];
        if constexpr (kWordLayout == kWordsFour) {
          const int down = kValueBits * (g >> 2);
          w0 >>= down, w1 >>= down, w2 >>= down, w3 >>= down;
        }
        low_a[n] = permute(w0, w1, 0x5410), high_a[n] = permute(w0, w1, 0x7632);
        low_b[n] = permute(w2, w3, 0x5410), high_b[n] = permute(w2, w3, 0x7632);
      }
    }
    // The lane's scales of its four tokens.
    uint32_t scales[4][kScaleSets];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const uint32_t* q = params + (token + 4 * n) * kGroups;
      if constexpr (kFour && kGroups == 4) {
        const uint2 y = *reinterpret_cast<const uint2*>(q + 2 * (g >> 2));
        scales[n][0] = y.x, scales[n][1] = y.y;
      } else if constexpr (!kFour && kGroups % 4 == 0) {
#pragma unroll
        for (int set = 0; set < kScaleSets; set += 4) {
          const uint4 y = *reinterpret_cast<const uint4*>(q + set);
          scales[n][set] = y.x, scales[n][set + 1] = y.y, scales[n][set + 2] = y.z, scales[n][set + 3] = y.w;
        }
      } else {
#pragma unroll
        for (int set = 0; set < kScaleSets; set++)
          scales[n][set] = q[kFour ? min(set + kScaleSets * (g >> 2), kGroups - 1) : set];
      }
    }
#pragma unroll
    for (int set = 0; set < kScaleSets; set++) {
      const uint32_t scale_a = permute(scales[0][set], scales[1][set], 0x5410);
      const uint32_t scale_b = permute(scales[2][set], scales[3][set], 0x5410);
      uint32_t scaled[kRowTiles][2], rest[kRowTiles][2];
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) {
        scaled[t][0] = multiply_halves(weight[t][0], scale_a);
        scaled[t][1] = multiply_halves(weight[t][1], scale_b);
        if constexpr (kExactProducts) {
          rest[t][0] = multiply_subtract_halves(weight[t][0], scale_a, scaled[t][0]);
          rest[t][1] = multiply_subtract_halves(weight[t][1], scale_b, scaled[t][1]);
        }
      }
#pragma unroll
      for (int group = set; group < kGroups; group += kScaleSets) {
#pragma unroll
        for (int i = 2 * group; i < 2 * group + 2; i++) {
          uint32_t a[4];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            if constexpr (kWordLayout != kWordsAny) {
              const int n = kWordLayout == kWordsMany ? word_base(i, r) : 0, bit = code_bit(i, r);
              const uint32_t pa = bit >= 16 ? high_a[n] : low_a[n], pb = bit >= 16 ? high_b[n] : low_b[n];
              a[r] = take_codes(pa, __umulhi(pa, p.two_up), bit);
              a[2 + r] = take_codes(pb, __umulhi(pb, p.two_up), bit);
            } else {
              const int d = 16 * i + 8 * r + g, word = d % kValueWords, bit = kValueBits * (d / kValueWords);
              const uint32_t* w = values + token * kValueWords + word;
              const uint32_t which = bit >= 16 ? 0x7632 : 0x5410, mask = uint32_t(kCodeMask) * 0x10001u;
              a[r] = permute(w[0], w[4 * kValueWords], which) >> (bit & 15) & mask;
              a[2 + r] = permute(w[8 * kValueWords], w[12 * kValueWords], which) >> (bit & 15) & mask;
            }
          }
#pragma unroll
          for (int t = 0; t < kRowTiles; t++) {
            multiply_half(x.acc[t][i], a[0], a[1], a[2], a[3], scaled[t][0], scaled[t][1]);
            if constexpr (kExactProducts) multiply_half(x.acc[t][i], a[0], a[1], a[2], a[3], rest[t][0], rest[t][1]);
          }
        }
      }
    }
  }
}

// Turns what the products added up to into values.
TQ_DEVICE void finish_values(Rows& x, int lane) {
  const int j = lane & 3;
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    // Codes in place to codes, plus the biases.
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      const int from = 4 * (kBiasTransposed ? 2 * group + 1 : group) + j;
      const float z0 = __shfl_sync(kAllLanes, x.bias[t][0], from), z1 = __shfl_sync(kAllLanes, x.bias[t][1], from);
#pragma unroll
      for (int i = 2 * group; i < 2 * group + 2; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float f = kWordLayout == kWordsAny ? unscale(0) : unscale(fraction_bit(code_bit(i, r)));
          x.acc[t][i][2 * r] = fmaf(x.acc[t][i][2 * r], f, z0);
          x.acc[t][i][2 * r + 1] = fmaf(x.acc[t][i][2 * r + 1], f, z1);
        }
      }
    }
  }
}

#else
// ---- Values by Lloyd-Max levels: fragment rows of 16 dimensions as int8, columns of 32 tokens ----

// Runs of 8, 4, 2 and 1 units of 32 dimensions, as kValueDim asks for. From each word of a run lane group g has as many nibbles
// as the run has units: four times as many dimensions, two for each of its products.
constexpr int kPieces = 4;
constexpr int piece_units(int piece) { return 8 >> piece; }
constexpr bool has_piece(int piece) { return (kValueDim / 32 & piece_units(piece)) != 0; }
// Units before it; the largest come first.
constexpr int piece_begin(int piece) { return kValueDim / 32 & ~(2 * piece_units(piece) - 1); }

// Dimension of row g (r = 0) or g + 8 (r = 1) of product i.
TQ_DEVICE int value_dimension(int i, int r, int g) {
#pragma unroll
  for (int piece = 0; piece < kPieces; piece++) {
    const int units = piece_units(piece), begin = piece_begin(piece), k = i - 2 * begin;
    if (!has_piece(piece) || k < 0 || k >= 2 * units) continue;
    // A word's nibble n of set s (add_piece) is dimension 8 s + n of its unit.
    if (units == 8) return 32 * (begin + g) + 8 * (k % 8 / 2) + 4 * (k / 8) + 2 * r + k % 2;
    if (units == 4) return 32 * (begin + (g >> 1)) + 8 * (k / 2) + 4 * (g & 1) + 2 * r + k % 2;
    if (units == 2) return 32 * (begin + (g >> 2)) + 8 * k + 2 * (g & 3) + r;
    return 32 * begin + 8 * (2 * k + r) + g;
  }
  return 0;
}

// What a tile's products take besides levels.
struct TileWeights {
  // Weights times norms in 16 bits of tokens 0 ... 15 and 16 ... 31: [row tile][high, low half]; four rows: only [0][0], both
  // halves of a row in columns 2 j and 2 j + 1.
  uint32_t fragment[kRowTiles][2][2];
  float unit[kRowTiles][2];   // of the rows of columns 2 j, 2 j + 1; four rows: [0][0], of row j
  int ones[kRowTiles][2][4];  // with 4 bits: products with ones
};

// Adds product i: a0, a1: rows g and g + 8 of tokens 0 ... 15, a2, a3: of the others.
TQ_DEVICE void add_product(Rows& x, int i, const LevelBytes& a0, const LevelBytes& a1, const LevelBytes& a2,
                           const LevelBytes& a3, const TileWeights& weights) {
  const uint4 first = make_uint4(a0.first, a1.first, a2.first, a3.first);
  const uint4 second = make_uint4(a0.second, a1.second, a2.second, a3.second);
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    int sums[2][4];
#pragma unroll
    for (int half = 0; half < (kFour ? 1 : 2); half++) {
      const uint32_t (&b)[2] = weights.fragment[t][half];
#pragma unroll
      for (int k = 0; k < 4; k++) sums[half][k] = kValueBits == 4 ? weights.ones[t][half][k] : 0;
      multiply_int8(sums[half], first, b[0], b[1]);
      if constexpr (kValueBits == 4) multiply_int8(sums[half], second, b[0], b[1]);
    }
#pragma unroll
    for (int k = 0; k < kAccColumns; k++) {
      const int sum = kFour ? sums[0][2 * k % 4] * 256 + sums[0][2 * k % 4 + 1] : sums[0][k] * 256 + sums[1][k];
      x.acc[t][i][k] = fmaf(float(sum), weights.unit[t][kFour ? 0 : k & 1], x.acc[t][i][k]);
    }
  }
}

// Codes of one word of four tokens, 4 tokens apart, as selectors: the lowest nibble is the first token's. even: of the low
// nibble of the byte that `which` takes of each, odd: of the high one; the upper 16 bits: of a second byte.
struct Selectors {
  uint32_t even, odd;
};
TQ_DEVICE Selectors select_codes(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t which) {
  const uint32_t ac = permute(a, c, which), bd = permute(b, d, which);
  return {(ac & 0x0f0f0f0fu) | (bd << 4 & 0xf0f0f0f0u), (ac >> 4 & 0x0f0f0f0fu) | (bd & 0xf0f0f0f0u)};
}

// The products of a run of units.
template <int kPiece>
TQ_DEVICE void add_piece(Rows& x, const uint32_t* values, const uint32_t (&book)[4], uint32_t two_16,
                         const TileWeights& weights, int lane) {
  constexpr int kPieceUnits = piece_units(kPiece), kBegin = piece_begin(kPiece), kHalves = kPieceUnits == 8 ? 2 : 1;
  constexpr bool kVector = kLayout.value_row % 16 == 0;
  const int g = lane >> 2, unit = kBegin + (kPieceUnits == 1 ? 0 : g * kPieceUnits / 8);
  const uint32_t* first = values + (lane & 3) * kValueWords + unit * kValueBits;
  uint32_t words[2][4][kValueBits];  // [16 tokens][token][word]
#pragma unroll
  for (int u = 0; u < 2; u++) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const uint32_t* from = first + (16 * u + 4 * n) * kValueWords;
      uint32_t (&w)[kValueBits] = words[u][n];
      if constexpr (kVector && kValueBits == 4) {
        const uint4 y = *reinterpret_cast<const uint4*>(from);
        w[0] = y.x, w[1] = y.y, w[2] = y.z, w[3] = y.w;
      } else if constexpr (kVector && kValueBits == 2) {
        const uint2 y = *reinterpret_cast<const uint2*>(from);
        w[0] = y.x, w[1] = y.y;
      } else {
#pragma unroll
        for (int i = 0; i < kValueBits; i++) w[i] = from[i];
      }
    }
  }
#pragma unroll
  for (int half = 0; half < kHalves; half++) {
    // Bytes of the lane's nibbles, of both words in turn.
    const uint32_t which = kPieceUnits == 8   ? 0x5140u + 0x2222u * half
                           : kPieceUnits == 4 ? 0x5140u + 0x2222u * (g & 1)
                           : kPieceUnits == 2 ? 0x40u + 0x11u * (g & 3)
                                              : 0x40u + 0x11u * (g >> 1);
    // Set s: the codes of dimensions 8 s ... 8 s + 7 of a unit (format.h), without what other codes share a nibble.
    Selectors sets[2][4] = {};
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
      for (int i = 0; i < kValueBits; i++) {
        const uint32_t (&w)[4][kValueBits] = words[u];
        Selectors y = select_codes(w[0][i], w[1][i], w[2][i], w[3][i], which);
        if (kPieceUnits == 1 && (g & 1)) y.even = y.odd;
        if constexpr (kValueBits == 4) {
          sets[u][i] = y;
        } else if constexpr (kValueBits == 3) {
          sets[u][i] = {y.even & 0x77777777u, y.odd & 0x77777777u};
          sets[u][3].even |= y.even >> (3 - i) & (0x11111111u << i);
          sets[u][3].odd |= y.odd >> (3 - i) & (0x11111111u << i);
        } else {
          sets[u][i] = {y.even & 0x33333333u, y.odd & 0x33333333u};
          sets[u][2 + i] = {y.even >> 2 & 0x33333333u, y.odd >> 2 & 0x33333333u};
        }
      }
    }
    auto lower = [&](uint32_t selector) { return find_levels<kValueBits>(book, selector); };
    auto upper = [&](uint32_t selector) { return find_levels<kValueBits>(book, __umulhi(selector, two_16)); };
    LevelBytes before[2];  // one unit: levels of the set before
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const Selectors &y = sets[0][s], &z = sets[1][s];
      if constexpr (kPieceUnits >= 4) {
        const int i = 2 * kBegin + 8 * half + 2 * s;
        add_product(x, i, lower(y.even), upper(y.even), lower(z.even), upper(z.even), weights);
        add_product(x, i + 1, lower(y.odd), upper(y.odd), lower(z.odd), upper(z.odd), weights);
      } else if constexpr (kPieceUnits == 2) {
        add_product(x, 2 * kBegin + s, lower(y.even), lower(y.odd), lower(z.even), lower(z.odd), weights);
      } else if (s % 2 == 0) {
        before[0] = lower(y.even), before[1] = lower(z.even);
      } else {
        add_product(x, 2 * kBegin + s / 2, before[0], lower(y.even), before[1], lower(z.even), weights);
      }
    }
  }
}

// Adds a tile's weights times values.
TQ_DEVICE void add_values(const AttentionParams& p, Rows& x, const float (&score)[kRowTiles][2][2][2], const uint32_t* values,
                          const char* param_rows, int lane) {
  const uint16_t* norms = reinterpret_cast<const uint16_t*>(param_rows);
  const uint32_t book[4] = {p.value_codebook[0], p.value_codebook[1], p.value_codebook[2], p.value_codebook[3]};
  constexpr float kMost = 127 * 256;
  const int g = lane >> 2, j = lane & 3;
  float norm[8];
#pragma unroll
  for (int i = 0; i < 8; i++) norm[i] = half_to_float(norms[4 * i + j]);
  TileWeights weights;
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    float y[8], top = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float weight = exp2_fast(score[t][i >> 2][i >> 1 & 1][i & 1]);
      x.sum[t] += weight;
      y[i] = weight * norm[i];
      top = max_nan(top, fabsf(y[i]));
    }
    top = max_nan(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = max_nan(top, __shfl_xor_sync(kAllLanes, top, 2));
    const float inverse = top > power_of_two(-100) ? kMost * reciprocal_fast(top) : 0.0f;
    const float unit = top * (1.0f / (kMost * kCodebookTop));
    weights.unit[t][0] = __shfl_sync(kAllLanes, unit, 8 * j);
    if constexpr (!kFour) weights.unit[t][1] = __shfl_sync(kAllLanes, unit, 8 * j + 4);
    // In the low bits of a float between 2^23 and 2^24: the 16-bit number plus 128, so that its bytes are the high half and
    // the low one plus 128.
    uint32_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; i++) bits[i] = __float_as_uint(fmaf(y[i], inverse, 12582912.0f + 128.0f));
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const uint32_t* n = bits + 4 * u;
      if constexpr (kFour) {
        const uint32_t which = g & 1 ? 0x40 : 0x51, turn = g & 1 ? 0x80808080u : 0u;
        weights.fragment[t][0][u] = permute(permute(n[0], n[1], which), permute(n[2], n[3], which), 0x5410) ^ turn;
      } else {
        const uint32_t a = permute(n[0], n[1], 0x4051), b = permute(n[2], n[3], 0x4051);
        weights.fragment[t][0][u] = permute(a, b, 0x5410);
        weights.fragment[t][1][u] = permute(a, b, 0x7632) ^ 0x80808080u;
      }
    }
    if constexpr (kValueBits == 4) {
      constexpr uint32_t kOne = 0x01010101u;
#pragma unroll
      for (int half = 0; half < (kFour ? 1 : 2); half++) {
        int (&ones)[4] = weights.ones[t][half];
#pragma unroll
        for (int k = 0; k < 4; k++) ones[k] = 0;
        multiply_int8(ones, make_uint4(kOne, kOne, kOne, kOne), weights.fragment[t][half][0], weights.fragment[t][half][1]);
      }
    }
  }
  if constexpr (has_piece(0)) add_piece<0>(x, values, book, p.two_16, weights, lane);
  if constexpr (has_piece(1)) add_piece<1>(x, values, book, p.two_16, weights, lane);
  if constexpr (has_piece(2)) add_piece<2>(x, values, book, p.two_16, weights, lane);
  if constexpr (has_piece(3)) add_piece<3>(x, values, book, p.two_16, weights, lane);
}

// Joins the sums of the lanes of a row.
TQ_DEVICE void finish_values(Rows& x, int) {
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    x.sum[t] += __shfl_xor_sync(kAllLanes, x.sum[t], 1);
    x.sum[t] += __shfl_xor_sync(kAllLanes, x.sum[t], 2);
  }
}
#endif

// ---- The main loop over a block's share of the coded tokens ----

struct Share {
  int begin, end;            // tiles of this block
  int n_requests;            // steps that are requested in the main loop
  int first_token;           // tokens below are not attended
  int last_token;            // nor those from here on, by any row
  int whole_begin, n_whole;  // tiles of which every row attends to every token
  TQ_DEVICE int steps() const { return (end - begin + kWarps - 1) / kWarps; }
};

// The block's ring of stages: step i (kWarps tiles) is in stage i % kStages. With the copy engine, step i + kStages - 2 is
// requested at step i, by the warps in turn, so that warps may be two steps apart; else step i + kStages - 1, by all threads.
struct Ring {
  char* shared;
  int tid, lane, warp;

  TQ_DEVICE char* stage(int i) const { return shared + i % kStages * kLayout.stage; }
  TQ_DEVICE uint32_t filled(int i) const { return shared_address(shared) + kLayout.barrier_at + 8 * (i % kStages); }
  TQ_DEVICE uint32_t emptied(int i) const { return filled(i) + 8 * kStages; }

  TQ_DEVICE void request(const AttentionParams& p, const Head& head, const Share& share, int i) const {
    const int first = (share.begin + i * kWarps) * kTileTokens;
    const int n_tokens = kListed ? p.n_listed : p.n_coded;
    const int n = min(min(kWarps, share.end - share.begin - i * kWarps) * kTileTokens, n_tokens - first);
    if constexpr (kListed) {
      copy_listed(p, head, stage(i), first, n, share.first_token, share.last_token, tid);
    } else if constexpr (kBulk) {
      copy_stage_bulk(p, head, shared_address(stage(i)), filled(i), first, n);
    } else {
      copy_stage(p, head, stage(i), first, n, tid);
    }
  }

  // What follows up to the main loop may overlap with the first copies, but not touch any stage except the last.
  TQ_DEVICE void start(const AttentionParams& p, const Head& head, const Share& share) const {
    const int steps = min(kStages - 1, share.steps());
    if constexpr (kBulk) {
      if (tid < 2 * kStages) {
        barrier_init(tid < kStages ? filled(tid) : emptied(tid - kStages), tid < kStages ? 1 : kWarps);
        copy_engine_fence();
      }
      __syncthreads();
      if (lane == 0) {
        for (int i = warp; i < steps; i += kWarps) request(p, head, share, i);
      }
      __syncwarp();
    } else {
#pragma unroll 1
      for (int i = 0; i < kStages - 1; i++) {
        if (i < steps) request(p, head, share, i);
        copy_async_commit();
      }
    }
  }

  // Waits for step i and requests a later one.
  TQ_DEVICE void acquire(const AttentionParams& p, const Head& head, const Share& share, int i) const {
    if constexpr (kBulk) {
      const int next = i + kStages - 2;
      if (i % kWarps == warp && uint32_t(i - 1) < uint32_t(share.n_requests)) {
        if (lane == 0) {
          if (next >= kStages) barrier_wait(emptied(next), (next / kStages - 1) & 1);
          request(p, head, share, next);
        }
        __syncwarp();
      }
      barrier_wait(filled(i), i / kStages & 1);
    } else {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      const int next = i + kStages - 1;
      if (next < share.steps()) request(p, head, share, next);
      copy_async_commit();
    }
  }
  TQ_DEVICE void release(int i) const {
    if constexpr (kBulk) {
      copy_engine_fence();  // the copy engine does not wait for loads that are under way
      __syncwarp();
      if (lane == 0) barrier_arrive(emptied(i));
    }
  }
};

// A row in 16-bit fixed point lies in shared memory as fragments: for each unit and run s of 8 dimensions, the high halves of
// the first four, their low halves, the high halves of the other four, their low halves.
TQ_DEVICE int fixed_point_place(int d, int part) { return d / 32 * 64 + d % 32 / 8 * 16 + d % 8 / 4 * 8 + 4 * part + d % 4; }
TQ_DEVICE uint4 query_fragment(const int8_t* rows, int row, int unit, int s) {
  if (kUnits % 4 != 0 && unit >= kUnits) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(rows + 2 * row * kKeyDim + 64 * unit + 16 * s);
}

// A row of the query, at `row` in shared memory, times a mean of any strides and type, at `at` in its array: of all lanes.
TQ_DEVICE float multiply_any_mean(const AttentionParams& p, const uint16_t* row, int64_t at, int lane) {
  float sum = 0;
#pragma unroll 1
  for (int d = lane; d < p.head_dim; d += 32) {
    float x = half_to_float(row[d]);
    if constexpr (kType == kTypeFloat32) x += half_to_float(row[kRows * kLayout.half_stride / 2 + d]);
    const int64_t from = at + d * p.mean_stride[3];
    const float mean =
        p.means_kind == kMeansFloat32 ? load_element<kTypeFloat32>(p.means, from) : load_element<kTypeFloat16>(p.means, from);
    sum = fmaf(x, mean, sum);
  }
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
  return sum;
}

// The means of the blocks of a warp's next kMeanSteps tiles, and their scores with the rows.
struct BlockMeans {
  const AttentionParams& p;
  char* shared;
  int b, h, lane, warp;
  int last_block;  // of the share

  static constexpr int kTilesPerBlock = kBlockTokens / kTileTokens, kPieces = kKeyDim / 32;

  TQ_DEVICE int block_of(int tile, int step) const { return min((tile + step * kWarps) / kTilesPerBlock, last_block); }
  TQ_DEVICE float* scores() const {  // [step][row]
    return reinterpret_cast<float*>(shared + kLayout.mean_score_at) + warp * kMeanSteps * kRows;
  }
  // A lane's pieces of the mean of step g: 8 dimensions from 8 (j + 4 i) on.
  TQ_DEVICE const uint16_t* mean_of_lane(int tile) const {
    const int64_t at = b * p.mean_stride[0] + h * p.mean_stride[1] + block_of(tile, lane >> 2) * p.mean_stride[2];
    return static_cast<const uint16_t*>(p.means) + at;
  }
  TQ_DEVICE int dimension(int i) const { return 8 * ((lane & 3) + 4 * i); }
  TQ_DEVICE char* copied(int i) const { return shared + kLayout.mean_at + ((warp * kPieces + i) * 32 + lane) * 16; }
  // Ahead by kMeanSteps: copies, which a lane makes for itself, or as far as L2.
  TQ_DEVICE void request(int tile) const {
    const uint16_t* mean = mean_of_lane(tile);
    if constexpr (kLayout.means_copied) {
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        const bool there = dimension(i) < p.head_dim;
        copy_async_part(shared_address(copied(i)), there ? mean + dimension(i) : mean, there ? 16 : 0);
      }
    } else {
      constexpr int kLine = 64;
      static_assert(kKeyDim <= 4 * kLine, "a line for each lane of a mean");
      if (kLine * (lane & 3) < p.head_dim) prefetch_line(mean + kLine * (lane & 3));
    }
  }

  // Scores of the tiles tile, tile + kWarps, ..., of which there are more for the warp than kMeanSteps if more.
  TQ_DEVICE void score(int tile, bool more) const {
    constexpr bool kSplit = kType == kTypeFloat32;
    const int g = lane >> 2, j = lane & 3, row_of_lane = kFour ? g & 3 : g;
    const char* query = shared + kLayout.mean_query_at;
    const float* row_scale = reinterpret_cast<const float*>(shared + kLayout.mean_scale_at);
    __syncwarp();
    if (p.means_aligned) {
      if constexpr (kBulk && kLayout.means_copied) copy_async_wait_all();  // else the ring has waited for them
      const uint16_t* mean = mean_of_lane(tile);
      // The order of dimensions within a product is free: that of the copies.
      float score[2][4] = {};  // two sums. Row g: steps 2 j, 2 j + 1; row g + 8: the same
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if constexpr (kLayout.means_copied) {
          x = *reinterpret_cast<const uint4*>(copied(i));
        } else if (dimension(i) < p.head_dim) {
          x = *reinterpret_cast<const uint4*>(mean + dimension(i));
        }
#pragma unroll
        for (int part = 0; part < (kSplit ? 2 : 1); part++) {
          const char* from = query + part * kRows * kLayout.half_stride + 16 * (j + 4 * i);
          const uint4 low = *reinterpret_cast<const uint4*>(from + row_of_lane * kLayout.half_stride);
          uint4 high = make_uint4(0, 0, 0, 0);
          if constexpr (kRowTiles == 2) high = *reinterpret_cast<const uint4*>(from + (8 + g) * kLayout.half_stride);
          multiply_half(score[0], low.x, high.x, low.y, high.y, x.x, x.y);
          multiply_half(score[1], low.z, high.z, low.w, high.w, x.z, x.w);
        }
      }
      if (more) request(tile + kMeanSteps * kWarps);
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) {
        if (kFour && g >= 4) continue;
        const float factor = row_scale[8 * t + g];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          scores()[(2 * j + c) * kRows + 8 * t + g] = (score[0][2 * t + c] + score[1][2 * t + c]) * factor;
        }
      }
    } else {
      // Any strides, and fp32.
#pragma unroll 1
      for (int i = 0; i < kMeanSteps * kRows; i++) {
        const int step = i / kRows, r = i % kRows;
        const int64_t at = b * p.mean_stride[0] + h * p.mean_stride[1] + block_of(tile, step) * p.mean_stride[2];
        const uint16_t* row = reinterpret_cast<const uint16_t*>(query + r * kLayout.half_stride);
        const float sum = multiply_any_mean(p, row, at, lane);
        if (lane == 0) scores()[i] = sum * row_scale[r];
      }
    }
    __syncwarp();
  }
};

// What the means of eight listed tokens' blocks add to the scores of the lane: of tokens j, j + 4 for its row of each row tile.
// block: of token token_of_column(g) of the eight.
TQ_DEVICE void score_listed_means(const AttentionParams& p, const char* shared, int block, int b, int h, int lane,
                                  float (&scores)[kRowTiles][2]) {
  constexpr bool kSplit = kType == kTypeFloat32;
  const int g = lane >> 2, j = lane & 3, row_of_lane = row_of_group(g);
  const char* query = shared + kLayout.mean_query_at;
  const float* row_scale = reinterpret_cast<const float*>(shared + kLayout.mean_scale_at);
  const int64_t head = b * p.mean_stride[0] + h * p.mean_stride[1];
  if (p.means_aligned) {
    const uint16_t* mean = static_cast<const uint16_t*>(p.means) + head + block * p.mean_stride[2];
    float score[2][4] = {};  // as in BlockMeans::score
#pragma unroll
    for (int i = 0; i < kKeyDim / 32; i++) {
      const int d = 8 * (j + 4 * i);
      uint4 x = make_uint4(0, 0, 0, 0);
      if (d < p.head_dim) x = *reinterpret_cast<const uint4*>(mean + d);
#pragma unroll
      for (int part = 0; part < (kSplit ? 2 : 1); part++) {
        const char* from = query + part * kRows * kLayout.half_stride + 2 * d;
        const uint4 low = *reinterpret_cast<const uint4*>(from + row_of_lane * kLayout.half_stride);
        uint4 high = make_uint4(0, 0, 0, 0);
        if constexpr (kRowTiles == 2) high = *reinterpret_cast<const uint4*>(from + (8 + g) * kLayout.half_stride);
        multiply_half(score[0], low.x, high.x, low.y, high.y, x.x, x.y);
        multiply_half(score[1], low.z, high.z, low.w, high.w, x.z, x.w);
      }
    }
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
      const float factor = row_scale[8 * t + row_of_lane];
#pragma unroll
      for (int c = 0; c < 2; c++) scores[t][c] = (score[0][2 * t + c] + score[1][2 * t + c]) * factor;
    }
    return;
  }
  // Any strides, and fp32.
#pragma unroll 1
  for (int i = 0; i < 8 * kRows; i++) {
    const int column = i / kRows, r = i % kRows, token = token_of_column(column);
    const int64_t at = head + __shfl_sync(kAllLanes, block, 4 * column) * p.mean_stride[2];
    const uint16_t* row = reinterpret_cast<const uint16_t*>(query + r * kLayout.half_stride);
    const float sum = multiply_any_mean(p, row, at, lane) * row_scale[r];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        if (r == 8 * t + row_of_lane && token == j + 4 * c) scores[t][c] = sum;
      }
    }
  }
}

// An empty state of row tile t.
TQ_DEVICE void clear(Rows& x, int t) {
  x.max[t] = kEmptyMax;
#pragma unroll
  for (int i = 0; i < kValueDim / 16; i++) {
#pragma unroll
    for (int k = 0; k < kAccColumns; k++) x.acc[t][i][k] = 0;
  }
  if constexpr (kLloyd) {
    x.sum[t] = 0;
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++) x.bias[t][k] = 0;
  }
}

// Multiplies what row tile t has added up by a factor of the lane's row.
TQ_DEVICE void rescale(Rows& x, int t, float factor, int lane) {
  const int j = lane & 3;
  const float f0 = __shfl_sync(kAllLanes, factor, 8 * j), f1 = __shfl_sync(kAllLanes, factor, 8 * j + 4);
#pragma unroll
  for (int i = 0; i < kValueDim / 16; i++) {
    if constexpr (kAccColumns == 2) {
      x.acc[t][i][0] *= f0, x.acc[t][i][1] *= f0;
    } else {
      x.acc[t][i][0] *= f0, x.acc[t][i][2] *= f0;
      x.acc[t][i][1] *= f1, x.acc[t][i][3] *= f1;
    }
  }
  if constexpr (kLloyd) {
    x.sum[t] *= factor;
  } else {
    x.bias[t][0] *= f0, x.bias[t][2] *= f0;
    x.bias[t][1] *= f1, x.bias[t][3] *= f1;
  }
}

// Zeroes the factors of values that no row attends to: weight zero times whatever lies there must be zero.
TQ_DEVICE void hide_values(const Share& share, char* params, int token0, int lane) {
  if (token0 + lane < share.first_token || token0 + lane >= share.last_token) {
    if constexpr (kLloyd) {
      reinterpret_cast<uint16_t*>(params)[lane] = 0;
    } else {
#pragma unroll
      for (int group = 0; group < kGroups; group++) reinterpret_cast<uint32_t*>(params)[lane * kGroups + group] = 0;
    }
  }
}

// Masks a tile's scores, token0 its first token; ids: of its tokens where they are listed. row_end: the token that a row sees
// last, plus one.
template <class RowEnd>
TQ_DEVICE void mask_scores(const AttentionParams& p, const Share& share, RowEnd row_end, float (&score)[kRowTiles][2][2][2],
                           int token0, const int32_t* ids, int lane, int row0, int b, int h) {
  const int j = lane & 3, row_of_lane = row_of_group(lane >> 2);
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    const int row = row0 + 8 * t + row_of_lane;
    const bool there = row < p.n_repeats * block_queries(p);
    const int end = row_end(row);
    int64_t mask_at = 0;
    if (kMask != kMaskNone && there) {
      mask_at = b * p.mask_stride[0] + (h * p.n_repeats + head_of_row(p, row)) * p.mask_stride[1] +
                position_of_row(p, row) * p.mask_stride[2];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = 16 * (i >> 2) + 8 * (i >> 1 & 1) + 4 * (i & 1) + j;
      const int token = kListed ? ids[place] : token0 + place;
      float& s = score[t][i >> 2][i >> 1 & 1][i & 1];
      if (token < share.first_token || token >= end) {
        s = -INFINITY;
      } else if (kMask != kMaskNone && there) {
        const int64_t at = mask_at + (p.n_first + token) * p.mask_stride[3];
        if constexpr (kMask == kMaskBool) {
          if (!static_cast<const bool*>(p.mask)[at]) s = -INFINITY;
        } else {
          const float bias = static_cast<const float*>(p.mask)[at] * kLog2e;
          s = bias == -INFINITY ? bias : s + bias;  // also where the score is no number
        }
      }
    }
  }
}

template <class RowEnd>
TQ_DEVICE void attend_coded(const AttentionParams& p, const Head& head, const Share& share, const Ring& ring,
                            const BlockMeans& means, RowEnd row_end, float shift, Rows& x, int lane, int row0, int b, int h) {
  const int g = lane >> 2, j = lane & 3;
  const char* shared = ring.shared;
  const int row_of_lane = row_of_group(g);
  float* mean_scores = means.scores();
  const int8_t* query8 = reinterpret_cast<const int8_t*>(shared + kLayout.int8_at);
  uint4 query[kRowTiles][kLaneUnits][4];  // [step]: fragment of the high and low halves
  float row_scale[kRowTiles], residual_scale[kRowTiles];
  // Scores are kept relative to the running maximum, once there is one; threshold: where it must be renewed.
  float base[kRowTiles], threshold[kRowTiles];
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    const int row = 8 * t + row_of_lane;
#pragma unroll
    for (int u = 0; u < kLaneUnits; u++) {
#pragma unroll
      for (int s = 0; s < 4; s++) query[t][u][s] = query_fragment(query8, row, j + 4 * u, s);
    }
    row_scale[t] = reinterpret_cast<const float*>(shared + kLayout.row_scale_at)[row];
    residual_scale[t] = kSigns ? reinterpret_cast<const float*>(shared + kLayout.residual_scale_at)[row] : 0.0f;
    base[t] = 0;
    threshold[t] = kEmptyMax;
    clear(x, t);
  }
  if (!kListed && !p.means) {
    for (int i = lane; i < kMeanSteps * kRows; i += 32) mean_scores[i] = 0;
    __syncwarp();
  }
  uint32_t book[4];
#pragma unroll
  for (int i = 0; i < 4; i++) book[i] = p.codebook[i];
  // What the products of a tile's keys begin with: with 4 bits the products with ones (find_levels).
  int ones[kRowTiles][4] = {};
  if constexpr (kKeyBits == 4) {
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
      for (int u = 0; u < kLaneUnits; u++) {
#pragma unroll
        for (int s = 0; s < 4; s++) multiply_int8(ones[t], query[t][u][s], 0x01010101u, 0x01010101u);
      }
    }
  }
  const float renew = kTop + kGrowth - shift, top = kTop - shift;
  const int key_token = token_of_column(g);

  const int steps = share.steps();
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    ring.acquire(p, head, share, i);
    const int tile = share.begin + i * kWarps + ring.warp;
    if (tile >= share.end) {
      ring.release(i);
      continue;
    }
    if (!kListed && p.means && i % kMeanSteps == 0) means.score(tile, tile + kMeanSteps * kWarps < share.end);
    char* data = ring.stage(i);
    auto part = [&](int at, int row, int lead) { return data + at + (row % 16 ? lead : 0) + ring.warp * kTileTokens * row; };
    const uint32_t* keys = reinterpret_cast<const uint32_t*>(part(0, kLayout.key_row, head.key_lead));
    const uint32_t* values = reinterpret_cast<const uint32_t*>(part(kLayout.value_at, kLayout.value_row, head.value_lead));
    char* params = part(kLayout.param_at, kLayout.param_row, head.param_lead);
    const uint16_t* norms = reinterpret_cast<const uint16_t*>(part(kLayout.norm_at, 2, head.norm_lead));

    const int token0 = tile * kTileTokens;
    const int32_t* ids = kListed ? reinterpret_cast<const int32_t*>(data + kLayout.id_at) + ring.warp * kTileTokens : nullptr;
    const bool whole = uint32_t(tile - share.whole_begin) < uint32_t(share.n_whole);
    if (!kListed && !whole) {
      hide_values(share, params, token0, lane);
      if constexpr (kBulk) copy_engine_fence();
      __syncwarp();
    }

    // score[t][u][v][c]: token 16 u + 8 v + j + 4 c of the tile, row of the lane.
    float score[kRowTiles][2][2][2];
    float start[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
      start[t] = base[t];
      if constexpr (!kListed) start[t] += mean_scores[i % kMeanSteps * kRows + 8 * t + row_of_lane];
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
      int sums[kRowTiles][2][4];  // [v]: high halves of columns 2 j, 2 j + 1, low halves of the same
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
        for (int v = 0; v < 2; v++) {
#pragma unroll
          for (int k = 0; k < 4; k++) sums[t][v][k] = kKeyBits == 4 ? ones[t][k] : 0;
        }
      }
      const uint32_t* key = keys + (16 * u + key_token) * kKeyWords;
#pragma unroll
      for (int lu = 0; lu < kLaneUnits; lu++) {
        // Lanes without a unit read some unit; their query is zero.
        const int unit = kUnits % 4 == 0 ? j + 4 * lu : min(j + 4 * lu, kUnits - 1);
#pragma unroll
        for (int v = 0; v < 2; v++) {
          LevelBytes levels[8];
          decode_unit(key + 8 * v * kKeyWords + unit * kKeyBits, book, p.two_16, levels);
#pragma unroll
          for (int s = 0; s < 4; s++) {
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
              multiply_int8(sums[t][v], query[t][lu][s], levels[2 * s].first, levels[2 * s + 1].first);
              if constexpr (kKeyBits == 4) {
                multiply_int8(sums[t][v], query[t][lu][s], levels[2 * s].second, levels[2 * s + 1].second);
              }
            }
          }
        }
      }
#pragma unroll
      for (int v = 0; v < 2; v++) {
        float mean[kRowTiles][2] = {};
        if (kListed && p.means) {
          score_listed_means(p, shared, max(ids[16 * u + 8 * v + key_token], 0) / kBlockTokens, b, h, lane, mean);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float norm = half_to_float(norms[16 * u + 8 * v + 4 * c + j]);
#pragma unroll
          for (int t = 0; t < kRowTiles; t++) {
            const float from = kListed ? start[t] + mean[t][c] : start[t];
            score[t][u][v][c] = fmaf(float(sums[t][v][c] * 256 + sums[t][v][2 + c]), norm * row_scale[t], from);
          }
        }
      }
      if constexpr (kSigns) {
        const uint32_t* signs = reinterpret_cast<const uint32_t*>(part(kLayout.sign_at, kLayout.sign_row, head.sign_lead));
        const uint16_t* residuals = reinterpret_cast<const uint16_t*>(part(kLayout.residual_at, 2, head.residual_lead));
        const int8_t* residual8 = reinterpret_cast<const int8_t*>(shared + kLayout.residual_int8_at);
#pragma unroll
        for (int v = 0; v < 2; v++) {
          int rest[kRowTiles][4] = {};
#pragma unroll
          for (int lu = 0; lu < kLaneUnits; lu++) {
            const int unit = min(j + 4 * lu, kUnits - 1);
            uint32_t levels[8];
            decode_signs(signs[(16 * u + 8 * v + key_token) * kSignWords + unit], levels);
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
              for (int s = 0; s < 4; s++) {
                multiply_int8(rest[t], query_fragment(residual8, 8 * t + row_of_lane, j + 4 * lu, s), levels[2 * s],
                              levels[2 * s + 1]);
              }
            }
          }
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const float norm = half_to_float(residuals[16 * u + 8 * v + 4 * c + j]);
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
              score[t][u][v][c] = fmaf(float(rest[t][c] * 256 + rest[t][2 + c]), norm * residual_scale[t], score[t][u][v][c]);
            }
          }
        }
      }
    }

    if (kMask != kMaskNone || !whole) mask_scores(p, share, row_end, score, token0, ids, lane, row0, b, h);

    // Renew the maximum only when a weight has grown by 2^kGrowth: rarely after the first tile.
    bool grown = false;
    float highest[kRowTiles];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
      const auto& s = score[t];
      highest[t] = fmaxf(fmaxf(fmaxf(s[0][0][0], s[0][0][1]), fmaxf(s[0][1][0], s[0][1][1])),
                         fmaxf(fmaxf(s[1][0][0], s[1][0][1]), fmaxf(s[1][1][0], s[1][1][1])));
      grown |= highest[t] > threshold[t];
    }
    if (__any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) {
        float m = highest[t];
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
        const float before = x.max[t] == kEmptyMax ? 0.0f : x.max[t];
        const float renewed = fmaxf(x.max[t], m + before - top);
        const float factor = exp2_fast(x.max[t] - renewed);
        if (renewed != kEmptyMax) {
#pragma unroll
          for (int i = 0; i < 8; i++) score[t][i >> 2][i >> 1 & 1][i & 1] += before - renewed;
          base[t] = -renewed;
          threshold[t] = renew;
        }
        x.max[t] = renewed;
        rescale(x, t, factor, lane);
      }
    }

    add_values(p, x, score, values, params, lane);
    ring.release(i);
  }
  if constexpr (!kBulk) copy_async_wait<0>();
  finish_values(x, lane);
}

// ---- Exact tokens: eight at a time for one warp ----

// Asks for a chunk's keys and values: a line of memory for each thread.
TQ_DEVICE void prefetch_exact(const AttentionParams& p, int begin, int tid, int b, int h) {
  constexpr int kSize = kType == kTypeFloat32 ? 4 : 2, kDim = kKeyDim > kValueDim ? kKeyDim : kValueDim;
  constexpr int kLine = 128 / kSize, kLines = (kDim + kLine - 1) / kLine;
#pragma unroll 1
  for (int i = tid; i < p.exact_tokens * 2 * kLines; i += kThreads) {
    const int e = begin + i / (2 * kLines), d = i / 2 % kLines * kLine, is_value = i & 1;
    const bool is_first = e < p.n_first;
    const int index = is_first ? e : e - p.n_first;
    if (e >= p.n_first + p.n_tail || d >= (is_value ? p.value_dim : p.head_dim)) continue;
    const void* data = is_value ? (is_first ? p.first_values : p.tail_values) : (is_first ? p.first_keys : p.tail_keys);
    const int64_t* stride = is_value ? (is_first ? p.first_value_stride : p.tail_value_stride)
                                     : (is_first ? p.first_key_stride : p.tail_key_stride);
    prefetch_line(static_cast<const char*>(data) + (b * stride[0] + h * stride[1] + index * stride[2] + d * stride[3]) * kSize);
  }
}

// One exact token, and who may attend to it.
struct ExactToken {
  bool is_first, there;
  int index, column, own_index;  // own_index: of the rows' own tokens; -1: older than them
};
struct ExactTokens {
  const AttentionParams& p;
  int end, b, h, row0, padding;
  const int (&lengths)[3];
  bool own;  // the last n_queries tail tokens are the rows' own

  TQ_DEVICE ExactToken operator[](int e) const {
    ExactToken t;
    t.is_first = e < p.n_first;
    t.index = t.is_first ? e : e - p.n_first;
    t.column = t.is_first ? e : e + p.n_coded;
    const int own_index = t.index - (p.n_tail - p.n_queries);
    t.own_index = own && !t.is_first && own_index >= 0 ? own_index : -1;
    // What no row attends to may not be read as a number: it may be outside of what the sequence has stored.
    t.there = e < end && t.column >= padding && (t.own_index >= 0 || t.index < (t.is_first ? lengths[0] : lengths[2]));
    return t;
  }

  // The token's row of one of the arrays.
  template <class T>
  TQ_DEVICE const T* row(const ExactToken& t, const void* first, const int64_t (&first_stride)[4], const void* tail,
                         const int64_t (&tail_stride)[4]) const {
    const T* of_first = static_cast<const T*>(first) + (b * first_stride[0] + h * first_stride[1]);
    const T* of_tail = static_cast<const T*>(tail) + (b * tail_stride[0] + h * tail_stride[1]);
    return (t.is_first ? of_first : of_tail) + t.index * (t.is_first ? first_stride[2] : tail_stride[2]);
  }
  template <class T>
  TQ_DEVICE const T* key_row(const ExactToken& t) const {
    return row<T>(t, p.first_keys, p.first_key_stride, p.tail_keys, p.tail_key_stride);
  }
  template <class T>
  TQ_DEVICE const T* value_row(const ExactToken& t) const {
    return row<T>(t, p.first_values, p.first_value_stride, p.tail_values, p.tail_value_stride);
  }

  // The score of row row0 + r, masked.
  TQ_DEVICE float masked(float score, const ExactToken& t, int r) const {
    const int row = row0 + r, i = position_of_row(p, row);
    const int n_keys = p.n_first + p.n_coded + p.n_tail;
    bool attended = t.there && row < p.n_repeats * block_queries(p);
    if (p.causal && !own) attended = attended && t.column <= n_keys - p.n_queries + i;
    attended = attended && t.own_index <= i;
    if (!attended) return -INFINITY;
    if constexpr (kMask != kMaskNone) {
      const int64_t m = b * p.mask_stride[0] + (h * p.n_repeats + head_of_row(p, row)) * p.mask_stride[1] +
                        i * p.mask_stride[2] + t.column * p.mask_stride[3];
      if constexpr (kMask == kMaskBool) return static_cast<const bool*>(p.mask)[m] ? score : -INFINITY;
      if constexpr (kMask == kMaskFloat) {
        const float bias = static_cast<const float*>(p.mask)[m] * kLog2e;
        return bias == -INFINITY ? bias : score + bias;
      }
    }
    return score;
  }
};

// 16-bit keys and values that can be loaded 16 bytes at a time, by tensor cores. Lane (g, j) loads keys of token g, values of
// tokens 2 j and 2 j + 1, and has the scores of row g (with 16 rows: and g + 8) with these two. The order of dimensions within
// a product is free: that of the loads. query: 16-bit rows, exact.
TQ_DEVICE void attend_exact_tensor(const ExactTokens& tokens, const char* query, int begin, float* partial_out,
                                   float* partial_state, int lane) {
  const AttentionParams& p = tokens.p;
  const int g = lane >> 2, j = lane & 3, row_of_lane = kFour ? g & 3 : g;
  constexpr int kPieces = kKeyDim / 32, kRuns = kValueDim / 64;  // runs of 64 dimensions
  constexpr int kRest = kValueDim % 64 != 0;                     // and one of 32
  constexpr bool kSplit = kType == kTypeBFloat16;                // what rounding takes off a bf16 weight is multiplied as well
  // [row tile][tile]: dimensions 8 g + 2 i, 8 g + 2 i + 1 of a run (of its 32: 4 g + ...) for rows 2 j, 2 j + 1.
  float acc[kRowTiles][kValueDim / 16][4] = {};
  float max[kRowTiles], sum[kRowTiles];
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) max[t] = kEmptyMax, sum[t] = 0;
#pragma unroll 1
  for (int first = begin; first < tokens.end; first += kExactStep) {
    const ExactToken mine = tokens[first + g], pair[2] = {tokens[first + 2 * j], tokens[first + 2 * j + 1]};
    uint4 key[kPieces];
    const uint16_t* keys = tokens.key_row<uint16_t>(mine);
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int d = 8 * (j + 4 * i);
      key[i] = make_uint4(0, 0, 0, 0);
      if (mine.there && d < p.head_dim) key[i] = *reinterpret_cast<const uint4*>(keys + d);
    }
    uint4 value[2][kRuns + kRest];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const uint16_t* values = tokens.value_row<uint16_t>(pair[n]);
#pragma unroll
      for (int run = 0; run < kRuns + kRest; run++) {
        const int d = 64 * run + (run < kRuns ? 8 : 4) * g;
        value[n][run] = make_uint4(0, 0, 0, 0);
        if (pair[n].there && d < p.value_dim) {
          if (run < kRuns) {
            value[n][run] = *reinterpret_cast<const uint4*>(values + d);
          } else {
            const uint2 y = *reinterpret_cast<const uint2*>(values + d);
            value[n][run].x = y.x, value[n][run].y = y.y;
          }
        }
      }
    }

    float score[4] = {};  // row g: tokens 2 j, 2 j + 1; row g + 8: the same
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const uint4 low = *reinterpret_cast<const uint4*>(query + row_of_lane * kLayout.half_stride + 16 * (j + 4 * i));
      uint4 high = make_uint4(0, 0, 0, 0);
      if constexpr (kRowTiles == 2) {
        high = *reinterpret_cast<const uint4*>(query + (8 + g) * kLayout.half_stride + 16 * (j + 4 * i));
      }
      multiply_16bit<kType>(score, low.x, high.x, low.y, high.y, key[i].x, key[i].y);
      multiply_16bit<kType>(score, low.z, high.z, low.w, high.w, key[i].z, key[i].w);
    }
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
      const int r = 8 * t + row_of_lane;
      const float s0 = tokens.masked(score[2 * t] * p.scale, pair[0], r);
      const float s1 = tokens.masked(score[2 * t + 1] * p.scale, pair[1], r);
      float m = fmaxf(max[t], fmaxf(s0, s1));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
      const float factor = exp2_fast(max[t] - m), w0 = exp2_fast(s0 - m), w1 = exp2_fast(s1 - m);
      max[t] = m;
      const uint32_t weight = pack_16bit<kType>(w0, w1);
      const float r0 = w0 - low_16bit<kType>(weight), r1 = w1 - high_16bit<kType>(weight);
      const uint32_t rest = pack_16bit<kType>(r0, r1);
      // The sum of what is multiplied.
      sum[t] = fmaf(sum[t], factor, kSplit ? w0 + w1 : (w0 - r0) + (w1 - r1));
      const float f0 = __shfl_sync(kAllLanes, factor, 8 * j), f1 = __shfl_sync(kAllLanes, factor, 8 * j + 4);
#pragma unroll
      for (int i = 0; i < kValueDim / 16; i++) {
        float (&c)[4] = acc[t][i];
        c[0] *= f0, c[1] *= f1, c[2] *= f0, c[3] *= f1;
        const uint4 &x = value[0][i / 4], &y = value[1][i / 4];
        const uint32_t a = i % 4 == 0 ? x.x : i % 4 == 1 ? x.y : i % 4 == 2 ? x.z : x.w;
        const uint32_t b = i % 4 == 0 ? y.x : i % 4 == 1 ? y.y : i % 4 == 2 ? y.z : y.w;
        const uint32_t even = permute(a, b, 0x5410), odd = permute(a, b, 0x7632);
        multiply_16bit_short<kType>(c, even, odd, weight);
        if constexpr (kSplit) multiply_16bit_short<kType>(c, even, odd, rest);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    sum[t] += __shfl_xor_sync(kAllLanes, sum[t], 1);
    sum[t] += __shfl_xor_sync(kAllLanes, sum[t], 2);
    if (j == 0 && (!kFour || g < 4)) {
      partial_state[2 * (8 * t + g)] = max[t];
      partial_state[2 * (8 * t + g) + 1] = sum[t];
    }
    if (kFour && j >= 2) continue;
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int i = 0; i < kValueDim / 16; i += 2) {
        const int run = i / 4, at = 64 * run + (run < kRuns ? 8 : 4) * g + 2 * (i % 4);
        const float (&x)[4] = acc[t][i], (&y)[4] = acc[t][i + 1];
        *reinterpret_cast<float4*>(partial_out + (8 * t + 2 * j + c) * kValueDim + at) =
            make_float4(x[c], x[2 + c], y[c], y[2 + c]);
      }
    }
  }
}

// Any keys and values. Tokens begin ... begin + 7, then kExactStep later, and so on; four lanes per token for the scores.
TQ_DEVICE void attend_exact(const ExactTokens& tokens, const float* query, int begin, float* partial_out, float* partial_state,
                            int lane) {
  const AttentionParams& p = tokens.p;
  const int j = lane & 3;
  using Exact = Element<kType>;
  constexpr int kPieces = kKeyDim / 32;  // of eight dimensions, of a lane
  constexpr int kSlots = kValueDim / 32;
  constexpr int kBatch = kRows * kValueDim > 512 ? 4 : 8;  // tokens whose values are loaded together: registers are short

  float acc[kRows][kSlots] = {}, max[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) max[r] = kEmptyMax, sum[r] = 0;
#pragma unroll 1
  for (int first = begin; first < tokens.end; first += kExactStep) {
    const ExactToken token = tokens[first + (lane >> 2)];
    const Exact* keys = tokens.key_row<Exact>(token);
    const int64_t key_step = token.is_first ? p.first_key_stride[3] : p.tail_key_stride[3];
    const uint64_t value_row = reinterpret_cast<uint64_t>(tokens.value_row<Exact>(token));
    const uint32_t tokens_there = __ballot_sync(kAllLanes, token.there);
    float weight[kRows] = {};  // first the scores
#pragma unroll 1
    for (int i = 0; i < kPieces; i++) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int d = 8 * (j + 4 * i) + k;
        const float key = token.there && d < p.head_dim ? load_element<kType>(keys, d * key_step) : 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; r++) weight[r] = fmaf(query[r * kLayout.query_stride + d], key, weight[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float s = weight[r];
      s += __shfl_xor_sync(kAllLanes, s, 1);
      s += __shfl_xor_sync(kAllLanes, s, 2);
      s = tokens.masked(s, token, r);
      float m = fmaxf(s, max[r]);
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, o));
      const float factor = exp2_fast(max[r] - m);
      weight[r] = exp2_fast(s - m);
      max[r] = m;
      sum[r] = fmaf(sum[r], factor, weight[r]);
#pragma unroll
      for (int k = 0; k < kSlots; k++) acc[r][k] *= factor;
    }
#pragma unroll 1
    for (int t0 = 0; t0 < 8; t0 += kBatch) {
      float value[kBatch][kSlots];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        // NOLINTNEXTLINE(performance-no-int-to-ptr): lanes exchange numbers
        const void* values = reinterpret_cast<const void*>(__shfl_sync(kAllLanes, value_row, 4 * (t0 + i)));
        const bool from_first = first + t0 + i < p.n_first, there = tokens_there >> 4 * (t0 + i) & 1;
        const int64_t step = from_first ? p.first_value_stride[3] : p.tail_value_stride[3];
#pragma unroll
        for (int k = 0; k < kSlots; k++) {
          const int d = lane + 32 * k;
          value[i][k] = there && d < p.value_dim ? load_element<kType>(values, d * step) : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const float w = __shfl_sync(kAllLanes, weight[r], 4 * (t0 + i));
#pragma unroll
          for (int k = 0; k < kSlots; k++) acc[r][k] = fmaf(w, value[i][k], acc[r][k]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    // The four lanes of a token hold the same weight.
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], o);
    if (lane == 0) {
      partial_state[2 * r] = max[r];
      partial_state[2 * r + 1] = sum[r];
    }
#pragma unroll
    for (int k = 0; k < kSlots; k++) partial_out[r * kValueDim + lane + 32 * k] = acc[r][k];
  }
}

}  // namespace

// x = step * (256 * high + low).
TQ_DEVICE void split_row(const float (&x)[kKeyDim / 32], int8_t* row, float* step_out, int lane, bool residual) {
  float top = 0;
#pragma unroll
  for (int k = 0; k < kKeyDim / 32; k++) top = max_nan(top, fabsf(x[k]));
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) top = max_nan(top, __shfl_xor_sync(kAllLanes, top, o));
  const float step = top / 32512.0f, inverse = top > 0 ? 32512.0f / top : 0.0f;
#pragma unroll
  for (int k = 0; k < kKeyDim / 32; k++) {
    const int value = __float2int_rn(x[k] * inverse), h = (value + 128) >> 8;
    const int to = 32 * k + (residual ? residual_place(lane) : lane);
    row[fixed_point_place(to, 0)] = int8_t(h);
    row[fixed_point_place(to, 1)] = int8_t(value - 256 * h);
  }
  if (lane == 0) *step_out = step;
}

// A row for the products with means, as fp16 times a power of two; fp32: and what rounding takes off, as many rows later. fp16
// and bf16 rows are exact, but for elements below 2^-28 of the largest.
TQ_DEVICE void split_mean_query(const float (&x)[kKeyDim / 32], char* row, float* scale_out, float scale, int lane) {
  float top = 0;
#pragma unroll
  for (int k = 0; k < kKeyDim / 32; k++) top = fmaxf(top, fabsf(x[k]));
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, o));
  // Below 2^15, as means may be as large.
  const int up = min(14 - (int(__float_as_uint(top) >> 23) - 127), 126);
  uint16_t* halves = reinterpret_cast<uint16_t*>(row);
#pragma unroll
  for (int k = 0; k < kKeyDim / 32; k++) {
    const float y = x[k] * power_of_two(up);
    const uint16_t half = float_to_half(y);
    halves[lane + 32 * k] = half;
    if constexpr (kType == kTypeFloat32) {
      halves[kRows * kLayout.half_stride / 2 + lane + 32 * k] = float_to_half(y - half_to_float(half));
    }
  }
  if (lane == 0) *scale_out = scale * power_of_two(-up);
}

// A warp's maxima and sums, for the others: [warp][row][2].
TQ_DEVICE void store_states(const Rows& x, float* state, int lane, int warp) {
  const int g = lane >> 2, j = lane & 3;
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
    if (j == 0 && first_of_row(g)) {
      float* to = state + (warp * kRows + 8 * t + row_of_group(g)) * 2;
      to[0] = x.max[t];
      if constexpr (kLloyd) to[1] = x.sum[t];
    }
    if (!kLloyd && g == 0 && (!kFour || j < 2)) {
      state[(warp * kRows + 8 * t + 2 * j) * 2 + 1] = x.bias[t][2];
      state[(warp * kRows + 8 * t + 2 * j + 1) * 2 + 1] = x.bias[t][3];
    }
  }
}

// Whether no product of the lane has overflowed.
TQ_DEVICE bool is_finite(const Rows& x) {
  bool finite = true;
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
    for (int i = 0; i < kValueDim / 16; i++) {
#pragma unroll
      for (int k = 0; k < kAccColumns; k++) finite &= fabsf(x.acc[t][i][k]) < INFINITY;
    }
  }
  return finite;
}

// Whether all other shares of the head are done: this block joins them.
TQ_DEVICE bool is_last_block(uint32_t* counter, int n_splits, int tid) {
  __shared__ bool is_last;
  if (n_splits > 1) {
    __threadfence();
    __syncthreads();
    if (tid == 0) {
      is_last = atomicAdd(counter, 1u) == uint32_t(n_splits - 1);
      if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
  } else {
    __syncthreads();
  }
  return true;
}

// A warp's query rows, and the balance.
TQ_DEVICE void load_query(const AttentionParams& p, float (&query_rows)[kRows / kWarps][kKeyDim / 32],
                          float (&balance)[kKeyDim / 32], int n_rows, int row0, int b, int h, int lane, int warp) {
  constexpr int kWarpRows = kRows / kWarps;
#pragma unroll
  for (int i = 0; i < kWarpRows; i++) {
    const int r = warp + kWarps * i, row = row0 + r, q_head = h * p.n_repeats + head_of_row(p, row);
    const int64_t at = b * p.q_stride[0] + q_head * p.q_stride[1] + position_of_row(p, row) * p.q_stride[2];
#pragma unroll
    for (int k = 0; k < kKeyDim / 32; k++) {
      const int d = lane + 32 * k;
      query_rows[i][k] = r < n_rows && d < p.head_dim ? load_element<kType>(p.q, at + d * p.q_stride[3]) : 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < kKeyDim / 32; k++) {
    const int d = lane + 32 * k;
    balance[k] = p.balance && d < p.head_dim ? p.balance[h * p.balance_stride[0] + d * p.balance_stride[1]] : 1.0f;
  }
}

// Adds the warps' states into the share's result.
TQ_DEVICE void add_warps(const float* join, const float* state, float* partial_out, float* partial_state, int split, int tid) {
  constexpr int kJoinStride = kValueDim + 4;
  if (tid < kRows) {
    float m = kEmptyMax, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) m = fmaxf(m, state[(w * kRows + tid) * 2]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += exp2_fast(state[(w * kRows + tid) * 2] - m) * state[(w * kRows + tid) * 2 + 1];
    partial_state[(split * kRows + tid) * 2] = m;
    partial_state[(split * kRows + tid) * 2 + 1] = sum;
  }
  for (int i = tid; i < kRows * kValueDim / 4; i += kThreads) {
    const int r = i / (kValueDim / 4), d = i % (kValueDim / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float4 y = *reinterpret_cast<const float4*>(join + (w * kRows + r) * kJoinStride + d);
      sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
    }
    *reinterpret_cast<float4*>(partial_out + (split * kRows + r) * kValueDim + d) = sum;
  }
}

// Factors of a head's results, and one over the rows' sums. states: of the first 32 results.
TQ_DEVICE void weigh_results(const AttentionParams& p, const float2 (&states)[kRows / kWarps], const float* partial_state,
                             float* factors, float* inverse, float* lse, int n_slots, int n_rows, int row0, int h, int lane,
                             int warp) {
  constexpr int kWarpRows = kRows / kWarps;
#pragma unroll
  for (int i = 0; i < kWarpRows; i++) {
    const int r = warp + kWarps * i, row = row0 + r, q_head = h * p.n_repeats + head_of_row(p, row);
    const float sink = p.sinks && r < n_rows ? p.sinks[q_head * p.sinks_stride] * kLog2e : kEmptyMax;
    auto state = [&](int s) { return __ldcg(reinterpret_cast<const float2*>(partial_state + (s * kRows + r) * 2)); };
    float m = fmaxf(sink, states[i].x);
    for (int s = lane + 32; s < n_slots; s += 32) m = fmaxf(m, state(s).x);
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, o));
    float sum = 0;
    for (int s = lane; s < n_slots; s += 32) {
      const float2 y = s < 32 ? states[i] : state(s);
      const float factor = exp2f(y.x - m);
      factors[s * kRows + r] = factor;
      sum = fmaf(factor, y.y, sum);
    }
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
    if (p.sinks) sum += exp2f(sink - m);
    if (lane == 0) {
      inverse[r] = sum == 0 ? 0.0f : 1.0f / sum;
      if (p.lse) lse[r] = sum == 0 ? -INFINITY : (m + log2f(sum)) / kLog2e;
    }
  }
}

// What block `split` of a head takes. column_end: the column that a row sees last, plus one.
template <class ColumnEnd>
TQ_DEVICE Share plan_share(const AttentionParams& p, int padding, int n_coded, ColumnEnd column_end, int split, int n_splits) {
  Share share;
  share.first_token = clamp(padding - p.n_first, 0, n_coded);
  share.last_token = clamp(n_coded, 0, column_end(p.n_queries - 1) - p.n_first);
  const int safe_last = min(share.last_token, column_end(0) - p.n_first);
  share.whole_begin = (share.first_token + kTileTokens - 1) / kTileTokens;
  share.n_whole = kListed ? 0 : max(0, max(0, safe_last) / kTileTokens - share.whole_begin);
  asm("" : "+r"(share.whole_begin), "+r"(share.n_whole));  // not to be computed again in every step
  {
    const int tile0 = kListed ? 0 : share.first_token / kTileTokens;
    const int n_tiles = max(0, ((kListed ? p.n_listed : share.last_token) + kTileTokens - 1) / kTileTokens - tile0);
    const int n_exact = p.n_exact_blocks;
    int per = (n_tiles + n_exact * p.exact_tiles + n_splits - 1) / n_splits, less = p.exact_tiles;
    if (per < less) {  // the exact chunks are all that their blocks can take
      if (n_splits > n_exact) {
        per = (n_tiles + n_splits - n_exact - 1) / (n_splits - n_exact);
        less = per;
      } else {
        per = (n_tiles + n_splits - 1) / n_splits;
        less = 0;
      }
    }
    const int before = min(split, n_exact) * (per - less) + max(0, split - n_exact) * per;
    const int mine = split < n_exact ? per - less : per;
    share.begin = tile0 + min(n_tiles, before);
    share.end = tile0 + min(n_tiles, before + mine);
    share.n_requests = max(0, share.steps() - kStages + 1);
    asm("" : "+r"(share.n_requests));
  }
  return share;
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    turboquant_attention(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(16) char shared[];
  const int tid = threadIdx.x, lane = tid & 31, g = lane >> 2, j = lane & 3;
  const int warp = __shfl_sync(kAllLanes, tid >> 5, 0);  // tells the compiler that it is uniform
  const int head_index = blockIdx.y, b = head_index / p.n_kv_heads, h = head_index % p.n_kv_heads;
  const int n_splits = gridDim.x, split = blockIdx.x, row0 = row_tile(p) * kRows;
  const int n_rows = min(kRows, p.n_repeats * block_queries(p) - row0);
  const int n_keys = p.n_first + p.n_coded + p.n_tail;

  // What each part holds for this sequence.
  const bool own = p.lengths && p.causal;  // the last n_queries tail tokens are the rows' own
  const int padding = p.left_padding ? max(0, p.left_padding[b * p.left_padding_stride]) : 0;
  int lengths[3] = {p.n_first, p.n_coded, p.n_tail - (own ? p.n_queries : 0)};
  if (p.lengths) {
#pragma unroll
    for (int part = 0; part < 3; part++) {
      const int length = p.lengths[b * p.lengths_stride[0] + part * p.lengths_stride[1]];
      lengths[part] = clamp(length, 0, lengths[part]);
    }
  }
  // Column that row i sees last, plus one.
  const bool causal = p.causal && !own;
  auto column_end = [&](int row) { return causal ? n_keys - p.n_queries + position_of_row(p, row) + 1 : n_keys; };
  auto row_end = [&](int row) { return min(lengths[1], column_end(row) - p.n_first); };

  const Share share = plan_share(p, padding, lengths[1], column_end, split, n_splits);
  // The first loads, ahead of the copies that will keep the memory busy: the query rows; the exact tokens, as far as L2.
  constexpr int kWarpRows = kRows / kWarps;
  float query_rows[kWarpRows][kKeyDim / 32];
  float balance[kKeyDim / 32];
  load_query(p, query_rows, balance, n_rows, row0, b, h, lane, warp);
  if (split < p.n_exact_blocks && row0 == 0) prefetch_exact(p, split * p.exact_tokens, tid, b, h);
  const Ring ring{shared, tid, lane, warp};
  const Head head = head_of(p, b, h);
  const BlockMeans means{p, shared, b, h, lane, warp, (share.end - 1) / BlockMeans::kTilesPerBlock};
  auto start = [&] {
    if (!kListed && p.means_aligned && share.begin + warp < share.end) means.request(share.begin + warp);
    ring.start(p, head, share);
  };
  start();

#pragma unroll
  for (int k = 0; k < kKeyDim / 32; k++) balance[k] = 1.0f / balance[k];
  float* rotated = reinterpret_cast<float*>(shared + kLayout.rotated_at);
  char* exact_query = shared + kLayout.exact_query_at;  // rows of 16 bits for tensor cores, else of floats
  const bool exact_tensor = kType != kTypeFloat32 && p.exact_aligned;
  float* row_scale = reinterpret_cast<float*>(shared + kLayout.row_scale_at);
  float* mean_scale = reinterpret_cast<float*>(shared + kLayout.mean_scale_at);
  float* residual_scale = reinterpret_cast<float*>(shared + kLayout.residual_scale_at);
  int8_t* query8 = reinterpret_cast<int8_t*>(shared + kLayout.int8_at);
  int8_t* residual8 = reinterpret_cast<int8_t*>(shared + kLayout.residual_int8_at);
#pragma unroll
  for (int i = 0; i < kWarpRows; i++) {
    const int r = warp + kWarps * i;
    float (&x)[kKeyDim / 32] = query_rows[i];
    float* scratch = rotated + r * kLayout.query_stride;
    if (split < p.n_exact_blocks && exact_tensor) {
#pragma unroll
      for (int k = 0; k < kKeyDim / 32; k++) {
        store_element<kType>(exact_query + r * kLayout.half_stride, lane + 32 * k, x[k]);
      }
    }
    if (p.means) split_mean_query(x, shared + kLayout.mean_query_at + r * kLayout.half_stride, mean_scale + r, p.scale, lane);
#pragma unroll
    for (int k = 0; k < kKeyDim / 32; k++) x[k] *= p.scale;
    if (split < p.n_exact_blocks && !exact_tensor) {
      float* row = reinterpret_cast<float*>(exact_query) + r * kLayout.query_stride;
#pragma unroll
      for (int k = 0; k < kKeyDim / 32; k++) row[lane + 32 * k] = x[k];
    }
#pragma unroll
    for (int k = 0; k < kKeyDim / 32; k++) x[k] *= balance[k];
    if constexpr (Hadamard<kKeyDim>::kFactor > 0) {
      if (p.hadamard) Hadamard<kKeyDim>::template rotate<TQ_ROTATION_SEED>(x, lane, scratch);
    }
    split_row(x, query8 + 2 * r * kKeyDim, row_scale + r, lane, false);
    if (lane == 0) row_scale[r] *= 1.0f / kCodebookTop;
    if constexpr (kSigns && Hadamard<kKeyDim>::kFactor > 0) {
      Hadamard<kKeyDim>::template rotate<TQ_RESIDUAL_SEED>(x, lane, scratch);
      split_row(x, residual8 + 2 * r * kKeyDim, residual_scale + r, lane, true);
      // sqrt(pi / 2) / sqrt(dim)
      if (lane == 0) residual_scale[r] *= 1.25331414f * rsqrtf(float(kKeyDim));
    }
  }
  __syncthreads();

  const int n_slots = n_splits + p.n_exact_blocks * kWarps;
  // One number lives through the main loop in place of two addresses.
  int head_rows = (head_index * int(gridDim.z) + int(blockIdx.z)) * n_slots * kRows;
  asm("" : "+r"(head_rows));

  if (split < p.n_exact_blocks) {
    const int begin = split * p.exact_tokens, slot = n_splits + split * kWarps + warp;
    const ExactTokens tokens{p, min(begin + p.exact_tokens, p.n_first + p.n_tail), b, h, row0, padding, lengths, own};
    float* out = p.partial_out + int64_t(head_rows + slot * kRows) * kValueDim;
    float* state = p.partial_state + int64_t(head_rows + slot * kRows) * 2;
    bool done = false;
    if constexpr (kType != kTypeFloat32) {
      if (exact_tensor) attend_exact_tensor(tokens, exact_query, begin + 8 * warp, out, state, lane), done = true;
    }
    if (!done) {
      attend_exact(tokens, reinterpret_cast<const float*>(exact_query), begin + 8 * warp, out, state, lane);
    }
  }
  // Everybody has read the queries: the last stage is free for the main loop.
  if constexpr (kBulk) copy_engine_fence();
  __syncthreads();

  // The coded share.
  Rows x;
  float shift = 0;
#pragma unroll 1
  for (int attempt = 0; attempt < (kLloyd ? 1 : 2); attempt++) {
    if (attempt == 1) {
      shift = kSafeShift;
      start();
    }
    attend_coded(p, head, share, ring, means, row_end, shift, x, lane, row0, b, h);
    if constexpr (kLloyd) {
      __syncthreads();
      break;
    }
    if (__syncthreads_and(is_finite(x))) break;
  }

  float* partial_out = p.partial_out + int64_t(head_rows) * kValueDim;
  float* partial_state = p.partial_state + int64_t(head_rows) * 2;
  // Join the warps.
  float* state = reinterpret_cast<float*>(shared + kLayout.state_at);
  store_states(x, state, lane, warp);
  __syncthreads();
  constexpr int kJoinStride = kValueDim + 4;
  float* join = reinterpret_cast<float*>(shared);  // [warp][row][kJoinStride]
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
    for (int k = 0; k < kAccColumns / 2; k++) {
      const int column = 2 * j + k, r = !kFour ? 8 * t + column : kLloyd ? j : column & 3;
      float m = kEmptyMax;
#pragma unroll
      for (int w = 0; w < kWarps; w++) m = fmaxf(m, state[(w * kRows + r) * 2]);
      const float factor = exp2_fast(state[(warp * kRows + r) * 2] - m);
#pragma unroll
      for (int i = 0; i < kValueDim / 16; i++) {
        // With four rows, columns 4 ... 7 are right for the groups from kScaleSets on, the others for those before.
        if (!kLloyd && kFour && (j >> 1) != i / 2 / kScaleSets) continue;
        float* to = join + (warp * kRows + r) * kJoinStride;
        to[value_dimension(i, 0, g)] = x.acc[t][i][k] * factor;
        to[value_dimension(i, 1, g)] = x.acc[t][i][kAccColumns / 2 + k] * factor;
      }
    }
  }
  __syncthreads();
  add_warps(join, state, partial_out, partial_state, split, tid);

  if (!is_last_block(p.counters + head_index * gridDim.z + blockIdx.z, n_splits, tid)) return;

  float* total = reinterpret_cast<float*>(shared);  // [kRows][kValueDim + 4], rotated space
  float* factors = total + kRows * kJoinStride;     // [kMaxSlots][kRows]
  float* inverse = factors + kMaxSlots * kRows;     // [kRows]
  float* lse = inverse + kRows;                     // [kRows]
  // All first loads together: each waits for the second-level cache.
  constexpr int kEarly = 8, kEarlyExact = 8;  // shares, exact results
  float2 states[kWarpRows];
#pragma unroll
  for (int i = 0; i < kWarpRows; i++) {
    states[i] = make_float2(kEmptyMax, 0);
    const int r = warp + kWarps * i;
    if (lane < n_slots) states[i] = __ldcg(reinterpret_cast<const float2*>(partial_state + (lane * kRows + r) * 2));
  }
  auto load_share = [&](int s, int r, int d) {
    return __ldcg(reinterpret_cast<const float4*>(partial_out + (s * kRows + r) * kValueDim + d));
  };
  float4 early[kEarly];
  const int early_row = tid / (kValueDim / 4) % kRows, early_d = tid % (kValueDim / 4) * 4;
#pragma unroll
  for (int s = 0; s < kEarly; s++) {
    early[s] = make_float4(0, 0, 0, 0);
    if (s < n_splits) early[s] = load_share(s, early_row, early_d);
  }
  float early_exact[kEarlyExact][kValueDim / 32];
#pragma unroll
  for (int s = 0; s < kEarlyExact; s++) {
#pragma unroll
    for (int k = 0; k < kValueDim / 32; k++) {
      early_exact[s][k] =
          n_splits + s < n_slots ? __ldcg(partial_out + ((n_splits + s) * kRows + warp) * kValueDim + lane + 32 * k) : 0.0f;
    }
  }
  weigh_results(p, states, partial_state, factors, inverse, lse, n_slots, n_rows, row0, h, lane, warp);
  __syncthreads();
#pragma unroll 1
  for (int i = tid; i < kRows * kValueDim / 4; i += kThreads) {
    const int r = i / (kValueDim / 4), d = i % (kValueDim / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
    auto add = [&](const float4& y, int s) {
      const float f = factors[s * kRows + r];
      sum.x = fmaf(f, y.x, sum.x), sum.y = fmaf(f, y.y, sum.y), sum.z = fmaf(f, y.z, sum.z), sum.w = fmaf(f, y.w, sum.w);
    };
    int s = 0;
    if (i == tid) {
#pragma unroll
      for (int e = 0; e < kEarly; e++) {
        if (e < n_splits) add(early[e], e);
      }
      s = kEarly;
    }
#pragma unroll 16
    for (; s < n_splits; s++) add(load_share(s, r, d), s);
    *reinterpret_cast<float4*>(total + r * kJoinStride + d) = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int r = warp; r < n_rows; r += kWarps) {
    float y[kValueDim / 32];
#pragma unroll
    for (int k = 0; k < kValueDim / 32; k++) y[k] = total[r * kJoinStride + lane + 32 * k];
    if constexpr (Hadamard<kValueDim>::kFactor > 0) {
      if (p.hadamard) Hadamard<kValueDim>::template rotate_back<TQ_ROTATION_SEED>(y, lane, total + r * kJoinStride);
    }
    const int row = row0 + r, q_head = h * p.n_repeats + head_of_row(p, row);
    const int64_t at =
        ((int64_t(b) * p.n_kv_heads * p.n_repeats + q_head) * p.n_queries + position_of_row(p, row)) * (p.value_dim + p.lse);
    int s = n_splits;
    if (r == warp) {
#pragma unroll
      for (int e = 0; e < kEarlyExact; e++) {
        if (s + e >= n_slots) break;
        const float factor = factors[(s + e) * kRows + r];
#pragma unroll
        for (int k = 0; k < kValueDim / 32; k++) y[k] = fmaf(factor, early_exact[e][k], y[k]);
      }
      s += kEarlyExact;
    }
#pragma unroll 4
    for (; s < n_slots; s++) {
      const float factor = factors[s * kRows + r];
#pragma unroll
      for (int k = 0; k < kValueDim / 32; k++) {
        y[k] = fmaf(factor, __ldcg(partial_out + (s * kRows + r) * kValueDim + lane + 32 * k), y[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kValueDim / 32; k++) {
      const int d = lane + 32 * k;
      if (d < p.value_dim) {
        if (p.lse) {
          static_cast<float*>(p.out)[at + d] = y[k] * inverse[r];
        } else {
          store_element<kType>(p.out, at + d, y[k] * inverse[r]);
        }
      }
    }
    if (p.lse && lane == 0) static_cast<float*>(p.out)[at + p.value_dim] = lse[r];
  }
}

}  // namespace tqext::cuda
