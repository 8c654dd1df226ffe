#include "turboquant_encode.h"

#include "codec.h"
#include "eval.h"

namespace tqext {

namespace {

constexpr size_t kRows = 32;  // tokens per task

// Means and balance of the tokens [B, n_kv_heads, n, D] at hand.
struct Centre {
  std::optional<cpu::View> means, balance;

  Centre(const mx::array* given_means, const mx::array* given_balance) {
    if (given_means) means.emplace(*given_means);
    if (given_balance) balance.emplace(*given_balance);
  }
  void load_mean(const mx::Shape& shape, size_t row, int head_dim, float* mean) const {
    const size_t head = row / shape[2], block = row % shape[2] / kBlockTokens;
    means->load(head * means->shape[2] + block, head_dim, mean);
  }
  void load_balance(const mx::Shape& shape, size_t row, int head_dim, float* factors) const {
    balance->load(row / shape[2] % shape[1], head_dim, factors);
  }
  // (x - mean) * balance
  void apply(const mx::Shape& shape, size_t row, int head_dim, float* x) const {
    float y[kMaxDim];
    if (means) {
      load_mean(shape, row, head_dim, y);
      for (int d = 0; d < head_dim; d++) x[d] -= y[d];
    }
    if (balance) {
      load_balance(shape, row, head_dim, y);
      for (int d = 0; d < head_dim; d++) x[d] *= y[d];
    }
  }
  void undo(const mx::Shape& shape, size_t row, int head_dim, float* x) const {
    float y[kMaxDim];
    if (balance) {
      load_balance(shape, row, head_dim, y);
      for (int d = 0; d < head_dim; d++) x[d] /= y[d];
    }
    if (means) {
      load_mean(shape, row, head_dim, y);
      for (int d = 0; d < head_dim; d++) x[d] += y[d];
    }
  }
};

}  // namespace

void QuantizeKeys::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto encoder = cpu::prepare("quantize_keys", stream(), inputs, outputs);
  uint32_t* signs = state_.qjl ? outputs[2].data<uint32_t>() : nullptr;
  auto* residual_norms = state_.qjl ? reinterpret_cast<uint16_t*>(outputs[3].data<void>()) : nullptr;
  encoder.dispatch([k = cpu::View(inputs[0]), centre = Centre(means(inputs), balance(inputs)),
                    codes = outputs[0].data<uint32_t>(), norms = reinterpret_cast<uint16_t*>(outputs[1].data<void>()), signs,
                    residual_norms, bits = state_.bits, hadamard = state_.hadamard] {
    const int head_dim = k.shape.back(), dim = padded_dim(head_dim);
    const Codebook book = codebook(bits, dim);
    cpu::for_rows(k.n_rows(), kRows, [&](size_t i) {
      float x[kMaxDim] = {}, levels[kMaxDim];
      k.load(i, head_dim, x);
      centre.apply(k.shape, i, head_dim, x);
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
  auto encoder = cpu::prepare("quantize_values", stream(), inputs, outputs);
  encoder.dispatch([v = cpu::View(inputs[0]), codes = outputs[0].data<uint32_t>(),
                    params = reinterpret_cast<uint16_t*>(outputs[1].data<void>()), state = state_] {
    const int head_dim = v.shape.back(), dim = padded_dim(head_dim), bits = state.bits;
    const int n_words = code_words(dim, bits), n_params = value_params(dim, state.coding);
    const Codebook book = codebook(bits, dim);
    cpu::for_rows(v.n_rows(), kRows, [&](size_t i) {
      float x[kMaxDim] = {};
      v.load(i, head_dim, x);
      if (state.hadamard) cpu::rotate_row(x, dim, TQ_ROTATION_SEED, false);
      if (state.coding == kValueLloyd) {
        cpu::encode_value_lloyd(x, dim, book, codes + i * n_words, params + i * n_params);
      } else {
        cpu::encode_value_groups(x, dim, bits, codes + i * n_words, params + i * n_params);
      }
    });
  });
}

void Dequantize::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  auto encoder = cpu::prepare("dequantize", stream(), inputs, {out});
  encoder.dispatch([codes = cpu::View(inputs[0]), params = cpu::View(inputs[1]),
                    centre = Centre(means(inputs), balance(inputs)), to = out.data<void>(), type = out.dtype(),
                    state = state_] {
    const int head_dim = state.head_dim, bits = state.bits, dim = padded_dim(head_dim), n_words = code_words(dim, bits);
    const int n_params = value_params(dim, state.groups ? kValueGroups : kValueLloyd);
    const Codebook book = codebook(bits, dim);
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
      if (state.groups) {
        cpu::decode_values(words, half, dim, bits, x);
      } else {
        cpu::decode_levels(words, dim, bits, book.levels, x);
        const float norm = cpu::half_to_float(half[0]);
        for (int d = 0; d < dim; d++) x[d] = norm * x[d] / float(kCodebookTop);
      }
      if (state.hadamard) cpu::rotate_row(x, dim, TQ_ROTATION_SEED, true);
      centre.undo(codes.shape, i, head_dim, x);
      cpu::store_row(x, head_dim, to, type, i * head_dim);
    });
  });
}

}  // namespace tqext
