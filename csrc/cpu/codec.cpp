#include "codec.h"

#include "hadamard.h"
#include "isa.h"

namespace tqext::cpu {

namespace {

constexpr int kLanes = 16;  // dimensions are multiples of 32

struct CodecKernels {
  void (*walsh)(float* x, int n);
  void (*apply_signs)(float* x, int dim, uint32_t seed, float scale);
  float (*largest)(const float* x, int dim);
  float (*scaled_square)(const float* x, int dim, float scale, float* y);
  float (*choose_levels)(const float* y, int dim, const Codebook& book, const float* boundaries, uint32_t* codes,
                         float* levels);
  void (*pack_key)(const uint32_t* codes, int dim, int bits, uint32_t* words);
  void (*encode_group)(const float* y, int bits, uint32_t* codes, float* scale, float* bias);
  void (*pack_value)(const uint32_t* codes, int dim, int bits, uint32_t* words);
};

namespace baseline {
constexpr int kWidth = 4;
#include "codec_vectors.inc"
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
constexpr int kWidth = 8;
#include "codec_vectors.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace avx512 {
constexpr int kWidth = 16;
#include "codec_vectors.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

const CodecKernels& codec_kernels() {
  static const CodecKernels& kernels = []() -> const CodecKernels& {
    switch (active_isa()) {
#if defined(__x86_64__)
      case Isa::kAvx512:
        return avx512::kKernels;
      case Isa::kAvx2:
        return avx2::kKernels;
#endif
      default:
        return baseline::kKernels;
    }
  }();
  return kernels;
}

// H x or H^T x: the matrices of order 12, 20 and 28 are not symmetric.
void hadamard(float* x, int dim, bool transposed) {
  const int factor = hadamard_factor(dim), n = dim / factor;
  for (int start = 0; start < dim; start += n) codec_kernels().walsh(x + start, n);
  if (factor == 1) return;
  const uint32_t* rows = hadamard_rows(factor);
  float column[28];
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < factor; i++) column[i] = x[i * n + j];
    for (int i = 0; i < factor; i++) {
      float sum = 0;
      for (int k = 0; k < factor; k++) {
        const bool negative = transposed ? rows[k] >> i & 1 : rows[i] >> k & 1;
        sum += negative ? -column[k] : column[k];
      }
      x[i * n + j] = sum;
    }
  }
}

}  // namespace

void rotate_row(float* x, int dim, uint32_t seed, bool inverse) {
  const float scale = 1.0f / std::sqrt(float(dim));
  if (inverse) {
    hadamard(x, dim, true);
    codec_kernels().apply_signs(x, dim, seed, scale);
  } else {
    codec_kernels().apply_signs(x, dim, seed, scale);
    hadamard(x, dim, false);
  }
}

namespace {

// A power of two near 1 / max|x|, so that squares neither overflow nor vanish; 1 for a zero or non-finite vector.
float square_safe_scale(const float* x, int dim) {
  const float top = codec_kernels().largest(x, dim);
  if (!(top > 0) || !std::isfinite(top)) return 1.0f;
  return std::ldexp(1.0f, std::clamp(-std::ilogb(top), -126, 126));
}

float clip_half(float x) { return std::clamp(x, -TQ_HALF_MAX, TQ_HALF_MAX); }  // NaN stays

}  // namespace

namespace {

// Codes of the nearest levels of x / |x|, and what both kinds of norm are made of, with x scaled by `safe`.
struct Coded {
  float safe, square, projection;  // |x|^2, <x, levels>
};

Coded encode_levels(const float* x, int dim, const Codebook& book, uint32_t* words, float* levels) {
  float y[kMaxDim];
  uint32_t codes[kMaxDim];
  const float safe = square_safe_scale(x, dim);
  const float square = codec_kernels().scaled_square(x, dim, safe, y), length = std::sqrt(square);
  // Boundaries in the units of y; a zero vector gets the codes of zero.
  const float unit = length == 0 ? 1.0f : length;
  float boundaries[kMaxKeyLevels - 1];
  for (int i = 0; i + 1 < book.n_levels; i++) {
    boundaries[i] = 0.5f * float(book.levels[i] + book.levels[i + 1]) / float(kCodebookTop) * book.scale * unit;
  }
  const float projection = codec_kernels().choose_levels(y, dim, book, boundaries, codes, levels);
  codec_kernels().pack_key(codes, dim, book.bits, words);
  return {safe, square, projection};
}

}  // namespace

void encode_key(const float* x, int dim, const Codebook& book, uint32_t* words, uint16_t* norm, float* levels) {
  const auto [safe, square, projection] = encode_levels(x, dim, book, words, levels);
  *norm = float_to_half(clip_half(square == 0 ? 0.0f : square / (projection / float(kCodebookTop)) / safe));
}

void encode_value_lloyd(const float* x, int dim, const Codebook& book, uint32_t* words, uint16_t* norm) {
  float levels[kMaxDim];
  const auto [safe, square, projection] = encode_levels(x, dim, book, words, levels);
  float level_square = 0;  // of integers: exact
  for (int d = 0; d < dim; d++) level_square += levels[d] * levels[d];
  *norm = float_to_half(clip_half(square == 0 ? 0.0f : projection * float(kCodebookTop) / level_square / safe));
}

void encode_residual(float* residual, int dim, uint32_t* signs, uint16_t* norm) {
  float y[kMaxDim];
  const float safe = square_safe_scale(residual, dim);
  *norm = float_to_half(clip_half(std::sqrt(codec_kernels().scaled_square(residual, dim, safe, y)) / safe));
  rotate_row(residual, dim, TQ_RESIDUAL_SEED, false);
  for (int i = 0; i < dim / 32; i++) {
    signs[i] = 0;
    for (int b = 0; b < 32; b++) signs[i] |= uint32_t(residual[32 * i + b] >= 0) << b;
  }
}

void encode_value_groups(const float* x, int dim, int bits, uint32_t* words, uint16_t* params) {
  uint32_t codes[kMaxDim];
  for (int group = 0; group < dim / kGroup; group++) {
    float scale, bias;
    codec_kernels().encode_group(x + group * kGroup, bits, codes + group * kGroup, &scale, &bias);
    params[2 * group] = float_to_half(clip_half(scale));
    params[2 * group + 1] = float_to_half(clip_half(bias));
  }
  codec_kernels().pack_value(codes, dim, bits, words);
}

}  // namespace tqext::cpu
