#include "codec.h"

#include "hadamard.h"

namespace tqext::cpu {

void hadamard(float* x, int dim) {
  const int factor = hadamard_factor(dim), n = dim / factor;
  for (int start = 0; start < dim; start += n) {
    for (int half = 1; half < n; half *= 2) {
      for (int i = start; i < start + n; i += 2 * half) {
        for (int j = i; j < i + half; j++) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
      }
    }
  }
  if (factor > 1) {
    const uint32_t* rows = hadamard_rows(factor);
    float column[28];
    for (int j = 0; j < n; j++) {
      for (int i = 0; i < factor; i++) column[i] = x[i * n + j];
      for (int i = 0; i < factor; i++) {
        float sum = 0;
        for (int k = 0; k < factor; k++) sum += (rows[i] >> k & 1) ? -column[k] : column[k];
        x[i * n + j] = sum;
      }
    }
  }
}

namespace {

// H^T x: the matrices of order 12, 20 and 28 are not symmetric.
void hadamard_transposed(float* x, int dim) {
  const int factor = hadamard_factor(dim), n = dim / factor;
  if (factor > 1) {
    const uint32_t* rows = hadamard_rows(factor);
    float column[28];
    for (int j = 0; j < n; j++) {
      for (int i = 0; i < factor; i++) column[i] = x[i * n + j];
      for (int i = 0; i < factor; i++) {
        float sum = 0;
        for (int k = 0; k < factor; k++) sum += (rows[k] >> i & 1) ? -column[k] : column[k];
        x[i * n + j] = sum;
      }
    }
  }
  for (int start = 0; start < dim; start += n) hadamard(x + start, n);
}

void apply_signs(float* x, int dim, uint32_t seed, float scale) {
  for (int i = 0; i < dim / 32; i++) {
    const uint32_t signs = sign_word(seed, i);
    for (int b = 0; b < 32; b++) x[32 * i + b] *= (signs >> b & 1) ? -scale : scale;
  }
}

}  // namespace

void rotate_row(float* x, int dim, uint32_t seed, bool inverse) {
  const float scale = 1.0f / std::sqrt(float(dim));
  if (inverse) {
    hadamard_transposed(x, dim);
    apply_signs(x, dim, seed, scale);
  } else {
    apply_signs(x, dim, seed, scale);
    hadamard(x, dim);
  }
}

namespace {

void set_key_code(uint32_t* words, int bits, int d, uint32_t code) {
  uint32_t* unit = words + d / kUnit * bits;
  const int i = d % kUnit, n = 4 * (i % 8);
  if (bits == 4) {
    unit[i / 8] |= code << n;
  } else if (bits == 2) {
    unit[i / 8 % 2] |= code << (n + (i >= 16 ? 2 : 0));
  } else if (i < 24) {
    unit[i / 8] |= code << n;
  } else {
    for (int b = 0; b < 3; b++) unit[b] |= (code >> b & 1) << (n + 3);
  }
}

// A power of two near 1 / max|x|, so that squares neither overflow nor vanish; 1 for a zero or non-finite vector.
float square_safe_scale(const float* x, int dim) {
  float top = 0;
  for (int d = 0; d < dim; d++) top = std::max(top, std::fabs(x[d]));
  if (!(top > 0) || !std::isfinite(top)) return 1.0f;
  return std::ldexp(1.0f, std::clamp(-std::ilogb(top), -126, 126));
}

float clip_half(float x) { return std::clamp(x, -TQ_HALF_MAX, TQ_HALF_MAX); }  // NaN stays

}  // namespace

void encode_key(const float* x, int dim, const Codebook& book, uint32_t* words, uint16_t* norm, float* levels) {
  std::memset(words, 0, sizeof(uint32_t) * code_words(dim, book.bits));
  const float safe = square_safe_scale(x, dim);
  float square = 0;
  for (int d = 0; d < dim; d++) square += (x[d] * safe) * (x[d] * safe);
  const float length = std::sqrt(square);
  // Boundaries in the units of x * safe; a zero vector gets the codes of zero.
  const float unit = length == 0 ? 1.0f : length;
  float boundaries[kMaxKeyLevels - 1];
  for (int i = 0; i + 1 < book.n_levels; i++) {
    boundaries[i] = 0.5f * float(book.levels[i] + book.levels[i + 1]) / kCodebookTop * book.scale * unit;
  }
  float projection = 0;
  for (int d = 0; d < dim; d++) {
    int code = 0;
    for (int i = 0; i + 1 < book.n_levels; i++) code += x[d] * safe >= boundaries[i];
    set_key_code(words, book.bits, d, code);
    projection += x[d] * safe * book.levels[code];
    if (levels) levels[d] = book.levels[code];
  }
  const float value = length == 0 ? 0.0f : square / (projection / kCodebookTop) / safe;
  *norm = float_to_half(clip_half(value));
}

void encode_residual(float* residual, int dim, uint32_t* signs, uint16_t* norm) {
  const float safe = square_safe_scale(residual, dim);
  float square = 0;
  for (int d = 0; d < dim; d++) square += (residual[d] * safe) * (residual[d] * safe);
  *norm = float_to_half(clip_half(std::sqrt(square) / safe));
  rotate_row(residual, dim, TQ_RESIDUAL_SEED, false);
  for (int i = 0; i < dim / 32; i++) {
    signs[i] = 0;
    for (int b = 0; b < 32; b++) signs[i] |= uint32_t(residual[32 * i + b] >= 0) << b;
  }
}

void encode_value(const float* x, int dim, int bits, uint32_t* words, uint16_t* params) {
  std::memset(words, 0, sizeof(uint32_t) * code_words(dim, bits));
  const float top = float((1 << bits) - 1);
  for (int group = 0; group < dim / kGroup; group++) {
    const float* y = x + group * kGroup;
    float low = y[0], high = y[0];
    for (int d = 1; d < kGroup; d++) {
      low = std::min(low, y[d]);
      high = std::max(high, y[d]);
    }
    // Halves first: the range of two finite numbers may overflow.
    const float middle = 0.5f * low + 0.5f * high, half_range = value_shrink(bits) * (0.5f * high - 0.5f * low);
    const float step = half_range * (2.0f / top), start = middle - half_range;
    const float inverse = step > 0 ? 1.0f / step : 0.0f;
    float codes[kGroup], code_sum = 0, mean = 0;
    for (int d = 0; d < kGroup; d++) {
      codes[d] = std::clamp(std::nearbyint((y[d] - start) * inverse), 0.0f, top);
      if (std::isnan(codes[d])) codes[d] = 0;
      code_sum += codes[d];
      mean += y[d] / kGroup;
    }
    const float code_mean = code_sum / kGroup;
    float spread = 0, covariance = 0;
    for (int d = 0; d < kGroup; d++) {
      spread += (codes[d] - code_mean) * (codes[d] - code_mean);
      covariance += (codes[d] - code_mean) * (y[d] - mean);
    }
    const float scale = spread > 0 ? covariance / spread : 0.0f;
    params[2 * group] = float_to_half(clip_half(scale));
    params[2 * group + 1] = float_to_half(clip_half(mean - scale * code_mean));
    for (int d = 0; d < kGroup; d++) {
      const int i = group * kGroup + d;
      words[value_word(dim, bits, i)] |= uint32_t(codes[d]) << value_shift(dim, bits, i);
    }
  }
}

}  // namespace tqext::cpu
