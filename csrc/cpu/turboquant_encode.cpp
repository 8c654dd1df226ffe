#include "turboquant_encode.h"

#include "codec.h"
#include "eval.h"

namespace tqext {

namespace {

constexpr size_t kRows = 32;  // tokens per task

// Row of mean [B, n_kv_heads, D] that belongs to token `row` of [B, n_kv_heads, n, D].
size_t head_of(const mx::Shape& shape, size_t row) { return row / shape[2]; }

}  // namespace

void QuantizeKeys::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& encoder = cpu::prepare(stream(), inputs, outputs);
  std::optional<cpu::View> mean;
  if (inputs.size() > 1) mean.emplace(inputs[1]);
  uint32_t* signs = qjl_ ? outputs[2].data<uint32_t>() : nullptr;
  auto* residual_norms = qjl_ ? reinterpret_cast<uint16_t*>(outputs[3].data<void>()) : nullptr;
  encoder.dispatch([k = cpu::View(inputs[0]), mean, codes = outputs[0].data<uint32_t>(),
                    norms = reinterpret_cast<uint16_t*>(outputs[1].data<void>()), signs, residual_norms, bits = bits_,
                    hadamard = hadamard_] {
    const int head_dim = k.shape.back(), dim = padded_dim(head_dim);
    const Codebook book = codebook(bits, dim);
    cpu::for_rows(k.n_rows(), kRows, [&](size_t i) {
      float x[kMaxDim] = {}, levels[kMaxDim];
      k.load(i, head_dim, x);
      if (mean) {
        float m[kMaxDim];
        mean->load(head_of(k.shape, i), head_dim, m);
        for (int d = 0; d < head_dim; d++) x[d] -= m[d];
      }
      if (hadamard) cpu::rotate_row(x, dim, TQ_ROTATION_SEED, false);
      cpu::encode_key(x, dim, book, codes + i * code_words(dim, bits), norms + i, levels);
      if (signs) {
        const float norm = cpu::half_to_float(norms[i]);
        for (int d = 0; d < dim; d++) x[d] -= norm * levels[d] / float(kCodebookTop);
        cpu::encode_residual(x, dim, signs + i * sign_words(dim), residual_norms + i);
      }
    });
  });
}

void QuantizeValues::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& encoder = cpu::prepare(stream(), inputs, outputs);
  encoder.dispatch([v = cpu::View(inputs[0]), codes = outputs[0].data<uint32_t>(),
                    params = reinterpret_cast<uint16_t*>(outputs[1].data<void>()), bits = bits_, hadamard = hadamard_] {
    const int head_dim = v.shape.back(), dim = padded_dim(head_dim);
    cpu::for_rows(v.n_rows(), kRows, [&](size_t i) {
      float x[kMaxDim] = {};
      v.load(i, head_dim, x);
      if (hadamard) cpu::rotate_row(x, dim, TQ_ROTATION_SEED, false);
      cpu::encode_value(x, dim, bits, codes + i * code_words(dim, bits), params + i * value_params(dim));
    });
  });
}

void Dequantize::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  auto& encoder = cpu::prepare(stream(), inputs, {out});
  std::optional<cpu::View> mean;
  if (inputs.size() > 2) mean.emplace(inputs[2]);
  encoder.dispatch([codes = cpu::View(inputs[0]), params = cpu::View(inputs[1]), mean, to = out.data<void>(),
                    type = out.dtype(), keys = keys_, bits = bits_, head_dim = head_dim_, hadamard = hadamard_] {
    const int dim = padded_dim(head_dim), n_words = code_words(dim, bits), n_params = keys ? 1 : value_params(dim);
    const Codebook book = codebook(keys ? bits : 3, dim);
    cpu::for_rows(codes.n_rows(), kRows, [&](size_t i) {
      uint32_t words[kMaxDim / 8];
      uint16_t half[2 * kMaxDim / kGroup];
      float x[kMaxDim];
      const ptrdiff_t word_start = cpu::row_start(codes.shape, codes.strides, i);
      for (int w = 0; w < n_words; w++)
        words[w] = static_cast<const uint32_t*>(codes.data)[word_start + w * codes.strides.back()];
      const ptrdiff_t param_start = cpu::row_start(params.shape, params.strides, i);
      for (int p = 0; p < n_params; p++)
        half[p] = static_cast<const uint16_t*>(params.data)[param_start + p * params.strides.back()];
      if (keys) {
        cpu::decode_levels(words, dim, bits, book.levels, x);
        const float norm = cpu::half_to_float(half[0]);
        for (int d = 0; d < dim; d++) x[d] = norm * x[d] / float(kCodebookTop);
      } else {
        cpu::decode_values(words, half, dim, bits, x);
      }
      if (hadamard) cpu::rotate_row(x, dim, TQ_ROTATION_SEED, true);
      if (mean) {
        float m[kMaxDim];
        mean->load(head_of(codes.shape, i), head_dim, m);
        for (int d = 0; d < head_dim; d++) x[d] += m[d];
      }
      cpu::store_row(x, head_dim, to, type, i * head_dim);
    });
  });
}

}  // namespace tqext
