// quantize_keys, quantize_values, dequantize and rotate: one warp per token, the same bytes as on the CPU (codec.cpp).
//
// Compile-time: OPERATION, DIM (padded), BITS, TYPE (of the vectors), HADAMARD, MEAN, SIGNS. Compiled without contraction of
// a * b + c: another rounding would give other bytes.
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

TQ_DEVICE void load_vector(float (&x)[kSlots], const void* from, int64_t at, int64_t stride, int head_dim, int lane) {
#pragma unroll
  for (int k = 0; k < kSlots; k++) {
    const int d = lane + 32 * k;
    x[k] = d < head_dim ? load_element<kType>(from, at + d * stride) : 0.0f;
  }
}

}  // namespace

#if OPERATION == 0
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    quantize_keys(const void* k,
#if MEAN
                  const float* mean,
#endif
                  uint32_t* codes, uint16_t* norms,
#if SIGNS
                  uint32_t* signs, uint16_t* residual_norms,
#endif
                  int n_rows, int n_heads, int n_tokens, int head_dim, int s0, int s1, int s2, int s3, int m0, int m1, int m2,
                  int levels0, int levels1, int levels2, int levels3, float book_scale) {
  __shared__ float scratch[kWarps][kDim];
  __shared__ uint8_t code[kWarps][kDim];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  float x[kSlots];
  load_vector(x, k, token.at(s0, s1, s2), s3, head_dim, lane);
#if MEAN
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    const int d = lane + 32 * i;
    if (d < head_dim) x[i] -= mean[int64_t(token.b) * m0 + int64_t(token.h) * m1 + int64_t(d) * m2];
  }
#endif
  if constexpr (HADAMARD) Hadamard<kDim>::template rotate<TQ_ROTATION_SEED>(x, lane, scratch[warp]);

  constexpr int kLevels = 1 << kBits;
  const int packed[4] = {levels0, levels1, levels2, levels3};
  float level[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; i++) level[i] = float(int8_t(packed[i / 4] >> (8 * (i % 4))));

  const float safe = square_safe_scale(x);
  float y[kSlots], chosen[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; i++) y[i] = x[i] * safe;
  const float square = sum_products(y, y, lane), length = sqrtf(square), unit = length == 0 ? 1.0f : length;
  float boundary[kLevels - 1];
#pragma unroll
  for (int i = 0; i + 1 < kLevels; i++)
    boundary[i] = 0.5f * (level[i] + level[i + 1]) / float(kCodebookTop) * book_scale * unit;
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    int c = 0;
    chosen[i] = level[0];
#pragma unroll
    for (int n = 0; n + 1 < kLevels; n++) {
      const bool above = y[i] >= boundary[n];
      c += above;
      chosen[i] += above ? level[n + 1] - level[n] : 0.0f;
    }
    code[warp][lane + 32 * i] = c;
  }
  const float projection = sum_products(y, chosen, lane);
  const float norm = clip_half(length == 0 ? 0.0f : square / (projection / float(kCodebookTop)) / safe);
  if (lane == 0) norms[row] = float_to_half(norm);
  __syncwarp();
  for (int w = lane; w < kWords; w += 32) {
    const uint8_t* c = code[warp] + w / kBits * kUnit;
    const int i = w % kBits;
    uint32_t word = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      uint32_t nibble = c[8 * i + n];
      if (kBits == 2) nibble |= uint32_t(c[16 + 8 * i + n]) << 2;
      if (kBits == 3) nibble |= (uint32_t(c[24 + n]) >> i & 1) << 3;
      word |= nibble << (4 * n);
    }
    codes[row * kWords + w] = word;
  }
#if SIGNS
  const float stored = half_to_float(float_to_half(norm));
#pragma unroll
  for (int i = 0; i < kSlots; i++) x[i] -= stored * chosen[i] / float(kCodebookTop);
  const float residual_safe = square_safe_scale(x);
#pragma unroll
  for (int i = 0; i < kSlots; i++) y[i] = x[i] * residual_safe;
  const float residual_square = sum_products(y, y, lane);
  if (lane == 0) residual_norms[row] = float_to_half(clip_half(sqrtf(residual_square) / residual_safe));
  if constexpr (Hadamard<kDim>::kFactor > 0) Hadamard<kDim>::template rotate<TQ_RESIDUAL_SEED>(x, lane, scratch[warp]);
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    const uint32_t word = __ballot_sync(kAllLanes, x[i] >= 0);
    if (lane == 0) signs[row * kSlots + i] = word;
  }
#endif
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

#if OPERATION == 2 || OPERATION == 3
// Keys (2) or values (3). Strides of the codes c, of the parameters p (norms or scales and biases), of the mean m.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    dequantize(const uint32_t* codes, const uint16_t* params,
#if MEAN
               const float* mean,
#endif
               void* out, int n_rows, int n_heads, int n_tokens, int head_dim, int c0, int c1, int c2, int c3, int p0, int p1,
               int p2, int p3, int m0, int m1, int m2, int levels0, int levels1, int levels2, int levels3) {
  __shared__ float scratch[kWarps][kDim];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= n_rows) return;
  const Token token(row, n_heads, n_tokens);
  const uint32_t* words = codes + token.at(c0, c1, c2);
  const uint16_t* parameters = params + token.at(p0, p1, p2);
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
#if MEAN
    x[i] += mean[int64_t(token.b) * m0 + int64_t(token.h) * m1 + int64_t(d) * m2];
#endif
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
