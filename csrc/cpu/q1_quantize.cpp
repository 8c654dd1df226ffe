#include "q1_quantize.h"

#include <cmath>

#include "eval.h"
#include "format.h"

namespace tqext {

namespace {

constexpr size_t kRowsPerTask = 16;

// Sign bits of one group, and its scale.
uint16_t encode_group(const float* x, uint32_t* words) {
  double sum = 0;
  for (int w = 0; w < kQ1Words; w++) {
    uint32_t bits = 0;
    for (int b = 0; b < 32; b++) {
      const float value = x[w * 32 + b];
      bits |= uint32_t(value >= 0) << b;
      sum += std::fabs(value);
    }
    words[w] = bits;
  }
  const double scale = sum / double(kQ1Group);
  return cpu::float_to_half(float(scale > TQ_HALF_MAX ? TQ_HALF_MAX : scale));  // NaN passes
}

}  // namespace

void Q1Quantize::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto encoder = cpu::prepare("q1_quantize", stream(), inputs, outputs);
  encoder.dispatch([w = cpu::View(inputs[0]), words = outputs[0].data<uint32_t>(),
                    scales = reinterpret_cast<uint16_t*>(outputs[1].data<void>())] {
    const int n_groups = w.shape.back() / kQ1Group;
    cpu::for_rows(w.n_rows(), kRowsPerTask, [&](size_t r) {
      const ptrdiff_t start = cpu::row_start(w.shape, w.strides, r), stride = w.strides.back();
      for (int g = 0; g < n_groups; g++) {
        float x[kQ1Group];
        cpu::load_row(w.data, w.type, start + ptrdiff_t(g) * kQ1Group * stride, stride, kQ1Group, x);
        scales[r * n_groups + g] = encode_group(x, words + (r * n_groups + g) * kQ1Words);
      }
    });
  });
}

void Q1Dequantize::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  auto encoder = cpu::prepare("q1_dequantize", stream(), inputs, {out});
  encoder.dispatch([weight = cpu::View(inputs[0]), scales = cpu::View(inputs[1]), to = out.data<void>(), type = out.dtype()] {
    const int n_groups = scales.shape.back();
    cpu::for_rows(weight.n_rows(), kRowsPerTask, [&](size_t r) {
      const uint32_t* words = static_cast<const uint32_t*>(weight.data) + cpu::row_start(weight.shape, weight.strides, r);
      const uint16_t* half = static_cast<const uint16_t*>(scales.data) + cpu::row_start(scales.shape, scales.strides, r);
      for (int g = 0; g < n_groups; g++) {
        float x[kQ1Group];
        const float scale = cpu::half_to_float(half[g * scales.strides.back()]);
        for (int w = 0; w < kQ1Words; w++) {
          const uint32_t bits = words[(g * kQ1Words + w) * weight.strides.back()];
          for (int b = 0; b < 32; b++) x[w * 32 + b] = bits >> b & 1 ? scale : -scale;
        }
        cpu::store_row(x, kQ1Group, to, type, (ptrdiff_t(r) * n_groups + g) * kQ1Group);
      }
    });
  });
}

}  // namespace tqext
