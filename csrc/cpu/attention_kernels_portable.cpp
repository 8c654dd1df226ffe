// The specification in plain fp32: one token at a time inside a step of kStep. Complete and readable, not fast.
#include <algorithm>
#include <vector>

#include "attention_kernels.h"
#include "codec.h"
#include "half.h"
#include "softmax.h"

namespace tqext::cpu {

namespace {

constexpr int kStep = 64;  // tokens per update of the softmax state

float dot(const float* a, const float* b, int n) {
  float lanes[8] = {};
  for (int d = 0; d < n; d++) lanes[d % 8] += a[d] * b[d];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// An infinity in a norm or a mean must not make a score minus infinity, which is that of a token that is not attended.
float finite_or_nan(float x) { return x + 0.0f * x; }

// decode_key(t, key) writes token t's key; score(row, key, t) its score; decode_value(t, value) its value.
template <class DecodeKey, class Score, class DecodeValue>
void attend(const QueryRows& rows, int value_dim, int begin, int end, Partial* partials, const DecodeKey& decode_key,
            const Score& score, const DecodeValue& decode_value) {
  std::vector<float> scores(size_t(rows.n_rows) * kStep), sums(size_t(rows.n_rows) * value_dim);
  float vector[kMaxDim];
  for (int r = 0; r < rows.n_rows; r++) {
    partials[r].max = kNegInf;
    partials[r].sum = 0;
    std::fill_n(partials[r].out, value_dim, 0.0f);
  }
  for (int t0 = begin; t0 < end; t0 += kStep) {
    const int n = std::min(kStep, end - t0);
    for (int t = 0; t < n; t++) {
      decode_key(t0 + t, vector);
      for (int r = 0; r < rows.n_rows; r++) {
        float s = kNegInf;
        if (t0 + t < rows.end[r]) {
          s = score(r, vector, t0 + t);
          if (rows.offset) {
            s += finite_or_nan(rows.offset[r * rows.offset_stride + (t0 + t) / kBlockTokens - rows.first_block]);
          }
          if (rows.bias) s = rows.bias[r][t0 + t] == kNegInf ? kNegInf : s + rows.bias[r][t0 + t];
        }
        scores[r * kStep + t] = s;
      }
    }
    for (int r = 0; r < rows.n_rows; r++) {
      float* s = &scores[r * kStep];
      Partial& p = partials[r];
      float new_max = p.max;
      for (int t = 0; t < n; t++) new_max = s[t] > new_max || std::isnan(s[t]) ? s[t] : new_max;
      const float keep = rescale(p.max, new_max);
      p.max = new_max;
      // A sum of the step's terms and a sum of such sums lose fewer digits than one of all terms.
      float sum = 0;
      for (int t = 0; t < n; t++) {
        s[t] = s[t] == kNegInf ? 0.0f : std::exp2(s[t] - new_max);
        sum += s[t];
      }
      p.sum = p.sum * keep + sum;
      for (int d = 0; d < value_dim; d++) p.out[d] *= keep;
    }
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int t = 0; t < n; t++) {
      decode_value(t0 + t, vector);
      for (int r = 0; r < rows.n_rows; r++) {
        const float weight = scores[r * kStep + t];
        if (weight == 0.0f) continue;  // a token that is not attended may hold anything
        for (int d = 0; d < value_dim; d++) sums[r * value_dim + d] += weight * vector[d];
      }
    }
    for (int r = 0; r < rows.n_rows; r++) {
      for (int d = 0; d < value_dim; d++) partials[r].out[d] += sums[r * value_dim + d];
    }
  }
}

template <class Load>
void attend_exact(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials, const Load& load) {
  auto decode = [&](const void* base, ptrdiff_t stride, int dim) {
    return [&load, base, stride, dim](int t, float* x) {
      for (int d = 0; d < dim; d++) x[d] = load(base, t * stride + d);
    };
  };
  attend(
      rows, head.value_dim, begin, end, partials, decode(head.keys, head.key_stride, head.key_dim),
      [&](int r, const float* key, int) { return dot(rows.q + r * head.key_dim, key, head.key_dim); },
      decode(head.values, head.value_stride, head.value_dim));
}

}  // namespace

void attend_coded_portable(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                           Partial* partials) {
  auto decode_key = [&](int t, float* key) {
    decode_levels(head.key_codes + t * head.key_stride, shape.key_dim, shape.key_bits, shape.codebook, key);
  };
  auto score = [&](int r, const float* key, int t) {
    const float norm = finite_or_nan(half_to_float(head.key_norms[t * head.norm_stride]));
    float s = norm / float(kCodebookTop) * dot(rows.q + r * shape.key_dim, key, shape.key_dim);
    if (head.key_signs) {
      const float residual_norm = finite_or_nan(half_to_float(head.residual_norms[t * head.residual_stride]));
      s +=
          residual_norm * signed_sum(head.key_signs + t * head.sign_stride, rows.residual_q + r * shape.key_dim, shape.key_dim);
    }
    return s;
  };
  auto decode_value = [&](int t, float* value) {
    if (shape.value_coding == kValueLloyd) {
      decode_levels(head.value_codes + t * head.value_stride, shape.value_dim, shape.value_bits, shape.value_codebook, value);
      const float norm = half_to_float(head.value_params[t * head.param_stride]) / float(kCodebookTop);
      for (int d = 0; d < shape.value_dim; d++) value[d] *= norm;
      return;
    }
    decode_values(head.value_codes + t * head.value_stride, head.value_params + t * head.param_stride, shape.value_dim,
                  shape.value_bits, value);
  };
  attend(rows, shape.value_dim, begin, end, partials, decode_key, score, decode_value);
}

void attend_exact_portable(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials) {
  switch (head.type) {
    case ExactType::kFloat32:
      return attend_exact(head, rows, begin, end, partials,
                          [](const void* x, ptrdiff_t i) { return static_cast<const float*>(x)[i]; });
    case ExactType::kFloat16:
      return attend_exact(head, rows, begin, end, partials,
                          [](const void* x, ptrdiff_t i) { return half_to_float(static_cast<const uint16_t*>(x)[i]); });
    case ExactType::kBFloat16:
      return attend_exact(head, rows, begin, end, partials,
                          [](const void* x, ptrdiff_t i) { return bfloat_to_float(static_cast<const uint16_t*>(x)[i]); });
  }
}

void score_means_portable(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset) {
  float mean[kMaxDim];
  for (int i = 0; i < n; i++) {
    const ptrdiff_t start = (first + i) * means.stride;
    for (int d = 0; d < means.dim; d++) {
      mean[d] = means.half ? half_to_float(static_cast<const uint16_t*>(means.data)[start + d])
                           : static_cast<const float*>(means.data)[start + d];
    }
    for (int r = 0; r < n_rows; r++) offset[ptrdiff_t(r) * n + i] = dot(q + ptrdiff_t(r) * means.dim, mean, means.dim);
  }
}

}  // namespace tqext::cpu
