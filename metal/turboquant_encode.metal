// quantize_keys, quantize_values, dequantize, rotate: one simdgroup per token, lane l holds dimensions l, 32 + l, ...
//
// Bytes per token: the vector once, the packed token once (D = 128: 256 in fp16 and 98). Some 40 operations per dimension; a
// decoding step encodes nothing or 32 tokens, so the prompt is where this counts, and there the matrix products around it
// take a hundred times longer.
//
// Sums are kept in sixteen lanes and nothing is contracted, as on the CPU: the same roundings give the same bytes everywhere.
#include <metal_simdgroup>
#include <metal_stdlib>

#include "format.h"
#include "params.h"
#include "rotate_row.h"

using namespace metal;

constant constexpr int kTokens = 4;  // simdgroups per threadgroup

#define TQ_ENCODE_ARGUMENTS                                                                                                \
  const device uchar *means [[buffer(kEncodeMeanVectors)]], const device float *balance [[buffer(kEncodeBalanceVectors)]], \
      constant EncodeParams &p [[buffer(kEncodeParams)]], uint tg [[threadgroup_position_in_grid]],                        \
      uint sg [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]

struct Token {
  long in, params, mean, balance;  // where its inputs start
};

inline Token token_of(constant EncodeParams& p, int row) {
  const int t = row % p.n_tokens, head = row / p.n_tokens % p.n_heads, batch = row / p.n_tokens / p.n_heads;
  Token token;
  token.in = batch * p.in.batch + head * p.in.head + t * p.in.token;
  token.params = batch * p.in_params.batch + head * p.in_params.head + t * p.in_params.token;
  token.mean = batch * p.means.batch + head * p.means.head + t / kBlockTokens * p.means.token;
  token.balance = head * p.balance.head;
  return token;
}

// Coordinate d of the mean of the token's block.
inline float mean_at(constant EncodeParams& p, const device uchar* means, Token token, int d) {
  const long at = token.mean + d * p.means.last;
  if (p.flags & kEncodeFloatMeans) return reinterpret_cast<const device float*>(means)[at];
  return float(reinterpret_cast<const device half*>(means)[at]);
}

// The token's vector, less the mean, balanced, rotated.
template <typename T, int D>
inline void load_vector(constant EncodeParams& p, const device T* in, const device uchar* means, const device float* balance,
                        Token token, thread float* x, threadgroup float* scratch, uint lane) {
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    x[i] = d < p.head_dim ? float(in[token.in + d * p.in.last]) : 0.0f;
    if ((p.flags & kEncodeMeans) && d < p.head_dim) x[i] -= mean_at(p, means, token, d);
    if ((p.flags & kEncodeBalance) && d < p.head_dim) x[i] *= balance[token.balance + d * p.balance.last];
  }
  if (p.flags & kEncodeHadamard) rotate_row<D>(x, TQ_ROTATION_SEED, p.rotation_scale, scratch, lane);
}

// A power of two near 1 / max|x|, so that squares neither overflow nor vanish; 1 for a zero or non-finite vector.
template <int D>
inline float square_safe_scale(thread const float* x) {
  float top = 0.0f;
  bool finite = true;
  for (int i = 0; i < D / 32; i++) {
    top = max(top, abs(x[i]));
    finite = finite && !isnan(x[i]);
  }
  top = simd_max(top);
  if (!simd_all(finite) || !(top > 0.0f) || isinf(top)) return 1.0f;
  const int exponent = int(as_type<uint>(top) >> 23);
  return as_type<float>(uint(127 + clamp(127 - exponent, -126, 126)) << 23);
}

inline float clip_half(float x) { return isnan(x) ? x : clamp(x, -TQ_HALF_MAX, TQ_HALF_MAX); }

// Sum of a vector in the CPU's order: sixteen running sums over the dimensions, then halves onto halves.
template <int N>
inline float sum_lanes(thread const float* x, uint lane) {
  float sum = 0.0f;
  for (int i = 0; i < N; i++) {
    const float other = simd_shuffle_xor(x[i], ushort(16));
    sum += lane < 16 ? x[i] : other;
    sum += lane < 16 ? other : x[i];
  }
  for (ushort h = 8; h >= 1; h /= 2) sum += simd_shuffle_xor(sum, h);
  return sum;
}

// scratch[d] = x, seen by the whole simdgroup.
template <int D>
inline void share(thread const float* x, threadgroup float* scratch, uint lane) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < D / 32; i++) scratch[32 * i + int(lane)] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Sums over a vector that was scaled by `safe`.
struct Coded {
  float safe, square, projection;  // |x|^2, <x, levels>
};

// Codes of the nearest levels of x / |x|, packed as keys are.
template <int D, int BITS>
inline Coded encode_levels(constant EncodeParams& p, thread const float* x, thread uint* code, device uint* words,
                           threadgroup float* scratch, uint lane) {
  constexpr int N = D / 32, LEVELS = 1 << BITS;
  float y[N];
  Coded coded;
  coded.safe = square_safe_scale<D>(x);
  for (int i = 0; i < N; i++) y[i] = (x[i] * coded.safe) * (x[i] * coded.safe);
  coded.square = sum_lanes<N>(y, lane);
  const float length = precise::sqrt(coded.square);
  const float unit_length = length == 0.0f ? 1.0f : length;  // a zero vector gets the codes of zero
  for (int i = 0; i < N; i++) {
    code[i] = 0u;
    for (int k = 0; k + 1 < LEVELS; k++) code[i] += x[i] * coded.safe >= p.boundaries[k] * unit_length ? 1u : 0u;
    y[i] = x[i] * coded.safe * float(p.codebook[code[i]]);
  }
  coded.projection = sum_lanes<N>(y, lane);

  for (int i = 0; i < N; i++) y[i] = float(code[i]);
  share<D>(y, scratch, lane);
  for (int w = int(lane); w < N * BITS; w += 32) {
    const int unit = w / BITS, k = w % BITS;
    uint word = 0u;
    for (int n = 0; n < 8; n++) {
      uint nibble = uint(scratch[32 * unit + 8 * k + n]);
      if (BITS == 2) nibble |= uint(scratch[32 * unit + 16 + 8 * k + n]) << 2;
      if (BITS == 3) nibble |= (uint(scratch[32 * unit + 24 + n]) >> uint(k) & 1u) << 3;
      word |= nibble << uint(4 * n);
    }
    words[w] = word;
  }
  return coded;
}

template <typename T, int D, int BITS>
[[kernel]] void quantize_keys(const device T* in [[buffer(kEncodeIn)]], device uint* codes_out [[buffer(kEncodeOut)]],
                              device half* norms [[buffer(kEncodeOutParams)]], device uint* signs [[buffer(kEncodeSigns)]],
                              device half* residual_norms [[buffer(kEncodeResidualNorms)]], TQ_ENCODE_ARGUMENTS) {
  constexpr int N = D / 32;
  threadgroup float scratch_all[kTokens * D];
  const int row = int(tg) * kTokens + int(sg);
  if (row >= p.n_rows) return;
  threadgroup float* scratch = scratch_all + int(sg) * D;
  float x[N];
  uint code[N];
  load_vector<T, D>(p, in, means, balance, token_of(p, row), x, scratch, lane);
  const Coded coded = encode_levels<D, BITS>(p, x, code, codes_out + long(row) * (N * BITS), scratch, lane);
  const float value = coded.square == 0.0f ? 0.0f : coded.square / (coded.projection / float(kCodebookTop)) / coded.safe;
  const half norm = half(clip_half(value));
  if (lane == 0) norms[row] = norm;

  if (!(p.flags & kEncodeResidual)) return;
  float y[N];
  for (int i = 0; i < N; i++) x[i] -= float(norm) * float(p.codebook[code[i]]) / float(kCodebookTop);
  const float residual_safe = square_safe_scale<D>(x);
  for (int i = 0; i < N; i++) y[i] = (x[i] * residual_safe) * (x[i] * residual_safe);
  const float residual_length = precise::sqrt(sum_lanes<N>(y, lane));
  if (lane == 0) residual_norms[row] = half(clip_half(residual_length / residual_safe));
  rotate_row<D>(x, TQ_RESIDUAL_SEED, p.rotation_scale, scratch, lane);
  for (int i = 0; i < N; i++) {
    const uint word = simd_or(x[i] >= 0.0f ? 1u << lane : 0u);
    if (lane == 0) signs[long(row) * N + i] = word;
  }
}

template <typename T, int D, int BITS>
[[kernel]] void quantize_values_lloyd(const device T* in [[buffer(kEncodeIn)]], device uint* codes_out [[buffer(kEncodeOut)]],
                                      device half* norms [[buffer(kEncodeOutParams)]], TQ_ENCODE_ARGUMENTS) {
  constexpr int N = D / 32;
  threadgroup float scratch_all[kTokens * D];
  const int row = int(tg) * kTokens + int(sg);
  if (row >= p.n_rows) return;
  threadgroup float* scratch = scratch_all + int(sg) * D;
  float x[N];
  uint code[N];
  load_vector<T, D>(p, in, means, balance, token_of(p, row), x, scratch, lane);
  const Coded coded = encode_levels<D, BITS>(p, x, code, codes_out + long(row) * (N * BITS), scratch, lane);
  float level_square = 0.0f;  // of integers: exact in any order
  for (int i = 0; i < N; i++) level_square += float(p.codebook[code[i]]) * float(p.codebook[code[i]]);
  level_square = simd_sum(level_square);
  const float value = coded.square == 0.0f ? 0.0f : coded.projection * float(kCodebookTop) / level_square / coded.safe;
  if (lane == 0) norms[row] = half(clip_half(value));
}

template <typename T, int D, int BITS>
[[kernel]] void quantize_values_groups(const device T* in [[buffer(kEncodeIn)]], device uint* codes_out [[buffer(kEncodeOut)]],
                                       device half* params_out [[buffer(kEncodeOutParams)]], TQ_ENCODE_ARGUMENTS) {
  constexpr int N = D / 32, W = D * BITS / 32, SLOTS = 32 / BITS;
  threadgroup float scratch_all[kTokens * D], codes_all[kTokens * D];
  const int row = int(tg) * kTokens + int(sg);
  if (row >= p.n_rows) return;
  threadgroup float* scratch = scratch_all + int(sg) * D;
  threadgroup float* codes = codes_all + int(sg) * D;
  float x[N];
  load_vector<T, D>(p, in, means, balance, token_of(p, row), x, scratch, lane);

  const float top = float((1 << BITS) - 1);
  for (int g = 0; g < N; g++) {
    const float y = x[g];
    const float low = simd_min(y), high = simd_max(y);
    const float center = sum_lanes<1>(&y, lane) / 32.0f;
    // Halves first: the range of two finite numbers may overflow.
    const float middle = 0.5f * low + 0.5f * high, half_range = value_shrink(BITS) * (0.5f * high - 0.5f * low);
    const float step = half_range * (2.0f / top), start = middle - half_range;
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    const float ratio = (y - start) * inverse;
    const float code = isnan(ratio) ? 0.0f : clamp(rint(ratio), 0.0f, top);
    codes[32 * g + int(lane)] = code;
    const float code_mean = sum_lanes<1>(&code, lane) / 32.0f;
    const float square = (code - code_mean) * (code - code_mean), product = (code - code_mean) * (y - center);
    const float spread = sum_lanes<1>(&square, lane), covariance = sum_lanes<1>(&product, lane);
    const float scale = spread > 0.0f ? covariance / spread : 0.0f;
    if (lane == 0) {
      params_out[long(row) * (2 * N) + 2 * g] = half(clip_half(scale));
      params_out[long(row) * (2 * N) + 2 * g + 1] = half(clip_half(center - scale * code_mean));
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int w = int(lane); w < W; w += 32) {
    uint word = 0u;
    for (int s = 0; s < SLOTS; s++) word |= uint(codes[W * s + w]) << uint(BITS * s);
    codes_out[long(row) * W + w] = word;
  }
}

// Rotates back, undoes the balance and adds the mean when asked to; writes head_dim numbers.
template <typename T, int D>
inline void store_vector(constant EncodeParams& p, thread float* x, const device uchar* means, const device float* balance,
                         Token token, int row, device T* out, threadgroup float* scratch, uint lane) {
  if (p.flags & kEncodeHadamard) rotate_row_back<D>(x, TQ_ROTATION_SEED, p.rotation_scale, scratch, lane);
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    if (d >= p.head_dim) continue;
    if (p.flags & kEncodeBalance) x[i] /= balance[token.balance + d * p.balance.last];
    if (p.flags & kEncodeMeans) x[i] += mean_at(p, means, token, d);
    out[long(row) * p.head_dim + d] = T(x[i]);
  }
}

template <typename T, int D, int BITS>
[[kernel]] void dequantize_levels(const device uint* in [[buffer(kEncodeIn)]],
                                  const device half* norms [[buffer(kEncodeInParams)]], device T* out [[buffer(kEncodeOut)]],
                                  TQ_ENCODE_ARGUMENTS) {
  threadgroup float scratch_all[kTokens * D];
  const int row = int(tg) * kTokens + int(sg);
  if (row >= p.n_rows) return;
  const Token token = token_of(p, row);
  float x[D / 32];
  for (int i = 0; i < D / 32; i++) {
    const device uint* w = in + token.in + BITS * i;
    uint code;
    if (BITS == 2) {
      code = key_code_2(w[0], w[1], int(lane));
    } else if (BITS == 3) {
      code = key_code_3(w[0], w[1], w[BITS - 1], int(lane));
    } else {
      code = key_code_4(w[0], w[1], w[BITS - 2], w[BITS - 1], int(lane));
    }
    x[i] = float(norms[token.params]) * float(p.codebook[code]) / float(kCodebookTop);
  }
  store_vector<T, D>(p, x, means, balance, token, row, out, scratch_all + int(sg) * D, lane);
}

template <typename T, int D, int BITS>
[[kernel]] void dequantize_groups(const device uint* in [[buffer(kEncodeIn)]],
                                  const device uint* params [[buffer(kEncodeInParams)]], device T* out [[buffer(kEncodeOut)]],
                                  TQ_ENCODE_ARGUMENTS) {
  constexpr int W = D * BITS / 32;
  threadgroup float scratch_all[kTokens * D];
  const int row = int(tg) * kTokens + int(sg);
  if (row >= p.n_rows) return;
  const Token token = token_of(p, row);
  float x[D / 32];
  for (int i = 0; i < D / 32; i++) {
    const int d = 32 * i + int(lane);
    const uint code = in[token.in + d % W] >> uint(BITS * (d / W)) & ((1u << BITS) - 1u);
    const half2 scale_bias = as_type<half2>(params[token.params + i]);
    x[i] = float(scale_bias.x) * float(code) + float(scale_bias.y);
  }
  store_vector<T, D>(p, x, means, balance, token, row, out, scratch_all + int(sg) * D, lane);
}

template <typename T, int D>
[[kernel]] void rotate_vectors(const device T* in [[buffer(kEncodeIn)]], device T* out [[buffer(kEncodeOut)]],
                               TQ_ENCODE_ARGUMENTS) {
  threadgroup float scratch_all[kTokens * D];
  const int row = int(tg) * kTokens + int(sg);
  if (row >= p.n_rows) return;
  threadgroup float* scratch = scratch_all + int(sg) * D;
  const Token token = token_of(p, row);
  float x[D / 32];
  for (int i = 0; i < D / 32; i++) x[i] = float(in[token.in + (32 * i + int(lane)) * p.in.last]);
  if (p.flags & kEncodeInverse) {
    rotate_row_back<D>(x, TQ_ROTATION_SEED, p.rotation_scale, scratch, lane);
  } else {
    rotate_row<D>(x, TQ_ROTATION_SEED, p.rotation_scale, scratch, lane);
  }
  for (int i = 0; i < D / 32; i++) out[long(row) * D + 32 * i + int(lane)] = T(x[i]);
}

// [B, H, n, last] with any strides to contiguous memory; grid: one thread per element. For packed arrays whose last axis is
// not contiguous, which the attention kernel does not take.
template <typename T>
[[kernel]] void compact(const device T* in [[buffer(kEncodeIn)]], device T* out [[buffer(kEncodeOut)]],
                        constant EncodeParams& p [[buffer(kEncodeParams)]], uint tg [[threadgroup_position_in_grid]],
                        uint tid [[thread_index_in_threadgroup]]) {
  const int i = int(tg) * 32 * kTokens + int(tid);
  if (i >= p.n_rows * p.head_dim) return;
  out[i] = in[token_of(p, i / p.head_dim).in + i % p.head_dim * p.in.last];
}

#define TQ_QUANTIZE_KEYS(name, type, d, bits) \
  template [[host_name(name)]] [[kernel]] decltype(quantize_keys<type, d, bits>) quantize_keys<type, d, bits>;
#define TQ_QUANTIZE_VALUES_GROUPS(name, type, d, bits) \
  template [[host_name(name)]] [[kernel]] decltype(quantize_values_groups<type, d, bits>) quantize_values_groups<type, d, bits>;
#define TQ_QUANTIZE_VALUES_LLOYD(name, type, d, bits) \
  template [[host_name(name)]] [[kernel]] decltype(quantize_values_lloyd<type, d, bits>) quantize_values_lloyd<type, d, bits>;
#define TQ_DEQUANTIZE_LEVELS(name, type, d, bits) \
  template [[host_name(name)]] [[kernel]] decltype(dequantize_levels<type, d, bits>) dequantize_levels<type, d, bits>;
#define TQ_DEQUANTIZE_GROUPS(name, type, d, bits) \
  template [[host_name(name)]] [[kernel]] decltype(dequantize_groups<type, d, bits>) dequantize_groups<type, d, bits>;
#define TQ_ROTATE(name, type, d) \
  template [[host_name(name)]] [[kernel]] decltype(rotate_vectors<type, d>) rotate_vectors<type, d>;
#define TQ_COMPACT(name, type) template [[host_name(name)]] [[kernel]] decltype(compact<type>) compact<type>;
