// quantize_keys, quantize_values, dequantize and rotate: one warp per token, the same bytes as on the CPU (codec.cpp).
//
// Compile-time: OPERATION (params.h), DIM (padded), BITS, TYPE (of the vectors), HADAMARD, MEANS (of blocks: none, fp16, fp32),
// BALANCE, SIGNS. Compiled without contraction of a * b + c: another rounding would give other bytes.
#include "device.cuh"

namespace tqext::cuda {
namespace {

constexpr int kDim = DIM, kBits = BITS, kType = TYPE, kSlots = kDim / 32, kWarps = kEncodeWarps;
constexpr int kWords = kDim / 32 * kBits;

// A token: vector [B, H, n, head_dim] with strides, or row `row` of contiguous arrays.
struct Token {
  int64_t row;
  int b, h, t;
  TQ_DEVICE Token(int64_t row, int n_heads, int n_tokens)
      : row(row), b(int(row / n_tokens / n_heads)), h(int(row / n_tokens % n_heads)), t(int(row % n_tokens)) {}
  TQ_DEVICE int64_t at(int s0, int s1, int s2) const { return int64_t(b) * s0 + int64_t(h) * s1 + int64_t(t) * s2; }
};

// As the CPU sums: 16 lanes, each over dimensions 16 n + lane in order, then halves onto halves.
TQ_DEVICE float sum_lanes(float lanes16) {
#pragma unroll
  for (int o = 8; o > 0; o >>= 1) lanes16 = lanes16 + __shfl_xor_sync(kAllLanes, lanes16, o);
  return lanes16;
}
template <int kCount>
TQ_DEVICE float sum_products(const float (&x)[kCount], const float (&y)[kCount], int lane) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; k++) {
    const float product = x[k] * y[k];
    sum = sum + __shfl_sync(kAllLanes, product, lane & 15);
    sum = sum + __shfl_sync(kAllLanes, product, lane | 16);
  }
  return sum_lanes(sum);
}

TQ_DEVICE float clip_half(float x) { return x > TQ_HALF_MAX ? TQ_HALF_MAX : x < -TQ_HALF_MAX ? -TQ_HALF_MAX : x; }  // NaN stays

// A power of two near 1 / max|x|; 1 for a zero or non-finite vector.
TQ_DEVICE float square_safe_scale(const float (&x)[kSlots]) {
  float top = 0;
#pragma unroll
  for (int k = 0; k < kSlots; k++) top = fabsf(x[k]) > top ? fabsf(x[k]) : top;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, o));
  if (!(top > 0) || !(top < INFINITY)) return 1.0f;
  return ldexpf(1.0f, min(max(-ilogbf(top), -126), 126));
}

#if MEANS == 2
using Mean = float;
#else
using Mean = uint16_t;
#endif

// Means [B, H, n_blocks, head_dim] and balance [H, head_dim] of keys, with strides.
struct Centre {
  const Mean* means;
  const float* balance;
  int m0, m1, m2, m3, a0, a1;

  TQ_DEVICE float mean(const Token& token, int d) const {
    const Mean x = means[token.at(m0, m1, 0) + int64_t(token.t / kBlockTokens) * m2 + int64_t(d) * m3];
#if MEANS == 2
    return x;
#else
    return half_to_float(x);
#endif
  }
  TQ_DEVICE float factor(const Token& token, int d) const { return balance[int64_t(token.h) * a0 + int64_t(d) * a1]; }
};

// Codes of the levels nearest to x / |x|.
struct Coded {
  float safe, square, projection;  // y = x * safe, |y|^2, <y, levels>
  float level[kSlots];
};

TQ_DEVICE Coded encode_levels(const float (&x)[kSlots], const int (&packed)[4], float book_scale, uint8_t* code, int lane) {
  constexpr int kLevels = 1 << kBits;
  float level[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; i++) level[i] = float(int8_t(packed[i / 4] >> (8 * (i % 4))));

  Coded coded;
  coded.safe = square_safe_scale(x);
  float y[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; i++) y[i] = x[i] * coded.safe;
  coded.square = sum_products(y, y, lane);
  const float length = sqrtf(coded.square), unit = length == 0 ? 1.0f : length;
  float boundary[kLevels - 1];
#pragma unroll
  for (int i = 0; i + 1 < kLevels; i++)
    boundary[i] = 0.5f * (level[i] + level[i + 1]) / float(kCodebookTop) * book_scale * unit;
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    int c = 0;
    coded.level[i] = level[0];
#pragma unroll
    for (int n = 0; n + 1 < kLevels; n++) {
      const bool above = y[i] >= boundary[n];
      c += above;
      coded.level[i] += above ? level[n + 1] - level[n] : 0.0f;
    }
    code[lane + 32 * i] = c;
  }
  coded.projection = sum_products(y, coded.level, lane);
  return coded;
}

// The words of a token's codes in units (format.h), from the codes of all lanes.
TQ_DEVICE void pack_units(const uint8_t* code, uint32_t* words, int lane) {
  __syncwarp();
  for (int w = lane; w < kWords; w += 32) {
    const uint8_t* c = code + w / kBits * kUnit;
    const int i = w % kBits;
    uint32_t word = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      uint32_t nibble = c[8 * i + n];
      if (kBits == 2) nibble |= uint32_t(c[16 + 8 * i + n]) << 2;
      if (kBits == 3) nibble |= (uint32_t(c[24 + n]) >> i & 1) << 3;
      word |= nibble << (4 * n);
    }
    words[w] = word;
  }
}

TQ_DEVICE void load_vector(float (&x)[kSlots], const void* from, int64_t at, int64_t stride, int head_dim, int lane) {
#pragma unroll
  for (int k = 0; k < kSlots; k++) {
    const int d = lane + 32 * k;
    x[k] = d < head_dim ? load_element<kType>(from, at + d * stride) : 0.0f;
  }
}

}  // namespace

// The codes and the norm of row `row`, a rotated key; its residual signs (SIGNS), for which x then is the residual.
TQ_DEVICE void store_key(float (&x)[kSlots], int64_t row, const int (&levels)[4], float book_scale, uint32_t* codes,
                         uint16_t* norms, uint32_t* signs, uint16_t* residual_norms, uint8_t* code, float* scratch, int lane) {
  const Coded coded = encode_levels(x, levels, book_scale, code, lane);
  const float norm = clip_half(coded.square == 0 ? 0.0f : coded.square / (coded.projection / float(kCodebookTop)) / coded.safe);
  if (lane == 0) norms[row] = float_to_half(norm);
  pack_units(code, codes + row * kWords, lane);
  if constexpr (SIGNS) {
    const float stored = half_to_float(float_to_half(norm));
#pragma unroll
    for (int i = 0; i < kSlots; i++) x[i] -= stored * coded.level[i] / float(kCodebookTop);
    const float residual_safe = square_safe_scale(x);
    float y[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; i++) y[i] = x[i] * residual_safe;
    const float residual_square = sum_products(y, y, lane);
    if (lane == 0) residual_norms[row] = float_to_half(clip_half(sqrtf(residual_square) / residual_safe));
    if constexpr (Hadamard<kDim>::kFactor > 0) Hadamard<kDim>::template rotate<TQ_RESIDUAL_SEED>(x, lane, scratch);
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      const uint32_t word = __ballot_sync(kAllLanes, x[i] >= 0);
      if (lane == 0) signs[row * kSlots + i] = word;
    }
  }
}

#if OPERATION == 0
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    quantize_keys(const void* k,
#if MEANS
                  const Mean* means,
#endif
#if BALANCE
                  const float* balance,
#endif
                  uint32_t* codes, uint16_t* norms,
#if SIGNS
                  uint32_t* signs, uint16_t* residual_norms,
#endif
                  int n_rows, int n_heads, int n_tokens, int head_dim, int s0, int s1, int s2, int s3, int m0, int m1, int m2,
                  int m3, int a0, int a1, int levels0, int levels1, int levels2, int levels3, float book_scale) {
  __shared__ float scratch[kWarps][kDim];
  __shared__ uint8_t code[kWarps][kDim];
#if !MEANS
  const Mean* const means = nullptr;
#endif
#if !BALANCE
  const float* const balance = nullptr;
#endif
#if !SIGNS
  uint32_t* const signs = nullptr;
  uint16_t* const residual_norms = nullptr;
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  const Centre centre{means, balance, m0, m1, m2, m3, a0, a1};
  float x[kSlots];
  load_vector(x, k, token.at(s0, s1, s2), s3, head_dim, lane);
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    const int d = lane + 32 * i;
    if (d >= head_dim) continue;
    if (MEANS) x[i] -= centre.mean(token, d);
    if (BALANCE) x[i] *= centre.factor(token, d);
  }
  if constexpr (HADAMARD) Hadamard<kDim>::template rotate<TQ_ROTATION_SEED>(x, lane, scratch[warp]);

  const int packed[4] = {levels0, levels1, levels2, levels3};
  store_key(x, row, packed, book_scale, codes, norms, signs, residual_norms, code[warp], scratch[warp], lane);
}
#endif

#if OPERATION == 6
// A block of the grid codes a block of one head's keys, less the mean of those that are finite.
extern "C" __global__ void __launch_bounds__(32 * kBlockWarps, 1)
    quantize_blocks(const void* k,
#if BALANCE
                    const float* balance,
#endif
                    uint32_t* codes, uint16_t* norms,
#if SIGNS
                    uint32_t* signs, uint16_t* residual_norms,
#endif
                    uint16_t* means, int n_heads, int n_tokens, int head_dim, int s0, int s1, int s2, int s3, int a0, int a1,
                    int levels0, int levels1, int levels2, int levels3, float book_scale) {
  static_assert(kBlockWarps * kWarpTokens == kBlockTokens, "the warps share a block");
  __shared__ float scratch[kBlockWarps][kDim];
  __shared__ uint8_t code[kBlockWarps][kDim];
  __shared__ float mean[kDim];
  __shared__ int n_finite[kBlockWarps];
#if !SIGNS
  uint32_t* const signs = nullptr;
  uint16_t* const residual_norms = nullptr;
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int n_blocks = (n_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t head = blockIdx.x / n_blocks;
  const int block = int(blockIdx.x % n_blocks), begin = block * kBlockTokens + warp * kWarpTokens;
  const int n_own = min(max(n_tokens - begin, 0), int(kWarpTokens));
  const int64_t first = (head / n_heads) * s0 + (head % n_heads) * s1 + int64_t(begin) * s2;

  // All tokens of a warp stay in registers up to 256 dimensions; beyond, they are loaded again.
  constexpr bool kStay = kSlots <= 8;
  float x[kStay ? kWarpTokens : 1][kSlots], sum[kSlots] = {};
  int count = 0;
  auto load = [&](int i) {
    if (i < n_own) load_vector(x[kStay ? i : 0], k, first + int64_t(i) * s2, s3, head_dim, lane);
  };
  if constexpr (kStay) {
#pragma unroll
    for (int i = 0; i < kWarpTokens; i++) load(i);  // all before the first is used
  }
#pragma unroll
  for (int i = 0; i < kWarpTokens; i++) {
    if constexpr (!kStay) load(i);
    const float (&y)[kSlots] = x[kStay ? i : 0];
    bool finite = i < n_own;
#pragma unroll
    for (int n = 0; n < kSlots; n++) finite = finite && fabsf(y[n]) < INFINITY;
    if (!__all_sync(kAllLanes, finite)) continue;
    count++;
    // Divided first: the sum of large numbers may overflow.
#pragma unroll
    for (int n = 0; n < kSlots; n++) sum[n] += y[n] * (1.0f / float(kBlockTokens));
  }
#pragma unroll
  for (int n = 0; n < kSlots; n++) scratch[warp][32 * n + lane] = sum[n];
  if (lane == 0) n_finite[warp] = count;
  __syncthreads();
  for (int d = threadIdx.x; d < head_dim; d += 32 * kBlockWarps) {
    float total = 0;
    int n = 0;
#pragma unroll
    for (int w = 0; w < kBlockWarps; w++) {
      total += scratch[w][d];
      n += n_finite[w];
    }
    const uint16_t rounded = float_to_half(clip_half(total * (float(kBlockTokens) / float(max(n, 1)))));
    means[int64_t(blockIdx.x) * head_dim + d] = rounded;
    mean[d] = half_to_float(rounded);
  }
  __syncthreads();

  const int packed[4] = {levels0, levels1, levels2, levels3};
#pragma unroll(kStay ? kWarpTokens : 1)
  for (int i = 0; i < kWarpTokens; i++) {
    if (i >= n_own) break;
    if constexpr (!kStay) load(i);
    float (&y)[kSlots] = x[kStay ? i : 0];
#pragma unroll
    for (int n = 0; n < kSlots; n++) {
      const int d = lane + 32 * n;
      if (d >= head_dim) continue;
      y[n] -= mean[d];
#if BALANCE
      y[n] *= balance[(head % n_heads) * a0 + int64_t(d) * a1];
#endif
    }
    if constexpr (HADAMARD) Hadamard<kDim>::template rotate<TQ_ROTATION_SEED>(y, lane, scratch[warp]);
    store_key(y, head * n_tokens + begin + i, packed, book_scale, codes, norms, signs, residual_norms, code[warp],
              scratch[warp], lane);
    __syncwarp();
  }
}
#endif

#if OPERATION == 1
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    quantize_values(const void* v, uint32_t* codes, uint16_t* params, int n_rows, int n_heads, int n_tokens, int head_dim,
                    int s0, int s1, int s2, int s3) {
  __shared__ float scratch[kWarps][kDim];
  __shared__ uint8_t code[kWarps][kDim];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  float x[kSlots];
  load_vector(x, v, token.at(s0, s1, s2), s3, head_dim, lane);
  if constexpr (HADAMARD) Hadamard<kDim>::template rotate<TQ_ROTATION_SEED>(x, lane, scratch[warp]);
  constexpr float kTop = float((1 << kBits) - 1);
#pragma unroll
  for (int group = 0; group < kSlots; group++) {
    const float y = x[group];
    float low = y, high = y;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, o));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, o));
    }
    // The other half of a pair comes second in the lower lane and first in the upper one: the sum is the same.
    const float mean = sum_lanes(y + __shfl_xor_sync(kAllLanes, y, 16)) / float(kGroup);
    const float middle = 0.5f * low + 0.5f * high, half_range = value_shrink(kBits) * (0.5f * high - 0.5f * low);
    const float step = half_range * (2.0f / kTop), start = middle - half_range;
    const float inverse = step > 0 ? 1.0f / step : 0.0f;
    float c = (y - start) * inverse;
    c = c > 0 ? c : 0.0f;  // NaN gives 0
    c = c < kTop ? c : kTop;
    c = rintf(c);
    code[warp][32 * group + lane] = uint8_t(c);
    const float code_mean = sum_lanes(c + __shfl_xor_sync(kAllLanes, c, 16)) / float(kGroup);
    const float a = c - code_mean, square = a * a, product = a * (y - mean);
    const float spread = sum_lanes(square + __shfl_xor_sync(kAllLanes, square, 16));
    const float covariance = sum_lanes(product + __shfl_xor_sync(kAllLanes, product, 16));
    const float scale = spread > 0 ? covariance / spread : 0.0f, bias = mean - scale * code_mean;
    if (lane == 0) {
      params[(row * kSlots + group) * 2] = float_to_half(clip_half(scale));
      params[(row * kSlots + group) * 2 + 1] = float_to_half(clip_half(bias));
    }
  }
  __syncwarp();
  for (int w = lane; w < kWords; w += 32) {
    uint32_t word = 0;
#pragma unroll
    for (int slot = 0; slot < 32 / kBits; slot++) word |= uint32_t(code[warp][kWords * slot + w]) << (kBits * slot);
    codes[row * kWords + w] = word;
  }
}
#endif

#if OPERATION == 5
// Values as keys are coded, with the norm of least squared error.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    quantize_values(const void* v, uint32_t* codes, uint16_t* norms, int n_rows, int n_heads, int n_tokens, int head_dim,
                    int s0, int s1, int s2, int s3, int levels0, int levels1, int levels2, int levels3, float book_scale) {
  __shared__ float scratch[kWarps][kDim];
  __shared__ uint8_t code[kWarps][kDim];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  float x[kSlots];
  load_vector(x, v, token.at(s0, s1, s2), s3, head_dim, lane);
  if constexpr (HADAMARD) Hadamard<kDim>::template rotate<TQ_ROTATION_SEED>(x, lane, scratch[warp]);

  const int packed[4] = {levels0, levels1, levels2, levels3};
  const Coded coded = encode_levels(x, packed, book_scale, code[warp], lane);
  const float level_square = sum_products(coded.level, coded.level, lane);  // of integers: exact
  const float norm = clip_half(coded.square == 0 ? 0.0f : coded.projection * float(kCodebookTop) / level_square / coded.safe);
  if (lane == 0) norms[row] = float_to_half(norm);
  pack_units(code[warp], codes + row * kWords, lane);
}
#endif

#if OPERATION == 2 || OPERATION == 3
// Levels of a codebook (2) or groups (3). Strides of the codes c, of the parameters p (norms or scales and biases).
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    dequantize(const uint32_t* codes, const uint16_t* params,
#if MEANS
               const Mean* means,
#endif
#if BALANCE
               const float* balance,
#endif
               void* out, int n_rows, int n_heads, int n_tokens, int head_dim, int c0, int c1, int c2, int c3, int p0, int p1,
               int p2, int p3, int m0, int m1, int m2, int m3, int a0, int a1, int levels0, int levels1, int levels2,
               int levels3) {
  __shared__ float scratch[kWarps][kDim];
#if !MEANS
  const Mean* const means = nullptr;
#endif
#if !BALANCE
  const float* const balance = nullptr;
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  const uint32_t* words = codes + token.at(c0, c1, c2);
  const uint16_t* parameters = params + token.at(p0, p1, p2);
  const Centre centre{means, balance, m0, m1, m2, m3, a0, a1};
  float x[kSlots];
#if OPERATION == 2
  const uint32_t packed[4] = {uint32_t(levels0), uint32_t(levels1), uint32_t(levels2), uint32_t(levels3)};
  const float norm = half_to_float(parameters[0]);
#endif
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
#if OPERATION == 2
    uint32_t w[4] = {};
#pragma unroll
    for (int n = 0; n < kBits; n++) w[n] = words[int64_t(i * kBits + n) * c3];
    const uint32_t code = kBits == 2   ? key_code_2(w[0], w[1], lane)
                          : kBits == 3 ? key_code_3(w[0], w[1], w[2], lane)
                                       : key_code_4(w[0], w[1], w[2], w[3], lane);
    const uint32_t four = code < 8 ? (code < 4 ? packed[0] : packed[1]) : (code < 12 ? packed[2] : packed[3]);
    x[i] = norm * float(int8_t(four >> (8 * (code % 4)))) / float(kCodebookTop);
#else
    const int d = lane + 32 * i;
    const uint32_t code = words[int64_t(value_word(kDim, kBits, d)) * c3] >> value_shift(kDim, kBits, d) & ((1u << kBits) - 1);
    x[i] = half_to_float(parameters[int64_t(2 * i) * p3]) * float(code) + half_to_float(parameters[int64_t(2 * i + 1) * p3]);
#endif
  }
  if constexpr (HADAMARD) Hadamard<kDim>::template rotate_back<TQ_ROTATION_SEED>(x, lane, scratch[warp]);
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    const int d = lane + 32 * i;
    if (d >= head_dim) continue;
    if (BALANCE) x[i] /= centre.factor(token, d);
    if (MEANS) x[i] += centre.mean(token, d);
    store_element<kType>(out, row * head_dim + d, x[i]);
  }
}
#endif

#if OPERATION == 4
// Rows are counted over up to four axes; HADAMARD = 2: the inverse.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    rotate(const void* from, void* to, int n_rows, int n_heads, int n_tokens, int s0, int s1, int s2, int s3) {
  __shared__ float scratch[kWarps][kDim];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  float x[kSlots];
  load_vector(x, from, token.at(s0, s1, s2), s3, kDim, lane);
  if constexpr (HADAMARD == 2) {
    Hadamard<kDim>::template rotate_back<TQ_ROTATION_SEED>(x, lane, scratch[warp]);
  } else {
    Hadamard<kDim>::template rotate<TQ_ROTATION_SEED>(x, lane, scratch[warp]);
  }
#pragma unroll
  for (int i = 0; i < kSlots; i++) store_element<kType>(to, row * kDim + lane + 32 * i, x[i]);
}
#endif

}  // namespace tqext::cuda
