#include "q1_matmul.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

#include "eval.h"
#include "q1_matmul_kernels.h"
#include "ternary_matmul.h"

namespace tqext {

namespace {

// Rows of the weight that one task takes: few enough to share work evenly, and enough that its lookup tables (as costly as
// some ten rows) are paid for.
constexpr int kMinRows = 256, kMaxRows = 4096, kRowStep = 64;

// Without branches, so that the baseline instruction set vectorises it; half.h's functions take one number at a time.
void load_halves(const uint16_t* from, int n, float* to) {
  for (int i = 0; i < n; i++) {
    const uint32_t h = from[i];
    const float magnitude = std::bit_cast<float>((h & 0x7fff) << 13) * 0x1p112f;  // exact, subnormals too
    const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    to[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | (h & 0x8000) << 16);
  }
}

void store_halves(const float* from, int n, uint16_t* to) {
  for (int i = 0; i < n; i++) {
    const uint32_t bits = std::bit_cast<uint32_t>(from[i]), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // The last bit of 0.5 to 1 is 2^-24, the unit of subnormal halves: the addition rounds.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    to[i] = uint16_t((magnitude >= 0x477ff000 ? special : finite) | (bits >> 16 & 0x8000));
  }
}

void load_input(const cpu::View& x, size_t row, int n, float* to) {
  const ptrdiff_t start = cpu::row_start(x.shape, x.strides, row);
  if (x.type == mx::float16 && x.strides.back() == 1) {
    load_halves(static_cast<const uint16_t*>(x.data) + start, n, to);
  } else {
    cpu::load_row(x.data, x.type, start, x.strides.back(), n, to);
  }
}

// Rows of adjacent elements: those of the array, or a copy of an odd view.
template <class T>
const T* contiguous_rows(const cpu::View& x, ptrdiff_t& stride, std::unique_ptr<T[]>& copy) {
  const T* data = static_cast<const T*>(x.data);
  const int n_rows = x.shape[0], n = x.shape[1];
  stride = x.strides[0];
  if (x.strides[1] == 1 || n <= 1) return data;
  copy.reset(new T[size_t(n_rows) * n]);
  for (ptrdiff_t r = 0; r < n_rows; r++)
    for (ptrdiff_t i = 0; i < n; i++) copy[r * n + i] = data[r * x.strides[0] + i * x.strides[1]];
  stride = n;
  return copy.get();
}

struct Work {
  cpu::View x, weight, scales;
  void* out;
  cpu::Q1MatmulKernel* kernel;

  void run() const {
    const int n_rows = weight.shape[0], n_inputs = int(x.n_rows()), n_cols = x.shape.back();
    if (n_inputs == 0 || n_rows == 0) return;
    if (n_cols == 0)
      return cpu::store_row(std::vector<float>(size_t(n_inputs) * n_rows).data(), n_inputs * n_rows, out, x.type, 0);

    std::unique_ptr<uint32_t[]> weight_copy;
    std::unique_ptr<uint16_t[]> scales_copy;
    cpu::Q1Matrix matrix{nullptr, nullptr, 0, 0, scales.shape[1]};
    matrix.weight = contiguous_rows(weight, matrix.weight_stride, weight_copy);
    matrix.scales = contiguous_rows(scales, matrix.scale_stride, scales_copy);

    const float* input = static_cast<const float*>(x.data);
    std::unique_ptr<float[]> converted;
    if (x.type != mx::float32 || x.strides.back() != 1 || n_inputs > 1) {
      converted.reset(new float[size_t(n_inputs) * n_cols]);
      constexpr int kRows = 16;
      cpu::for_rows(n_inputs, kRows, [&](size_t i) { load_input(x, i, n_cols, converted.get() + i * n_cols); });
      input = converted.get();
    }

    const int n_tiles = (n_inputs + cpu::kQ1MaxInputs - 1) / cpu::kQ1MaxInputs;
    const int tile = (n_inputs + n_tiles - 1) / n_tiles;
    const int share = n_rows / (2 * cpu::num_threads()) / kRowStep * kRowStep;
    const int rows = std::clamp(share, kMinRows, kMaxRows), n_chunks = cpu::row_blocks(n_rows, rows);
    // Neighbouring tasks share their weights, which then come from a cache.
    cpu::parallel_for(n_chunks * n_tiles, [&](int task) {
      const int first = task % n_tiles * tile, count = std::min(tile, n_inputs - first);
      if (count <= 0) return;
      const int begin = task / n_tiles * rows, end = std::min(begin + rows, n_rows);
      const float* from = input + ptrdiff_t(first) * n_cols;
      if (x.type == mx::float32) {
        kernel(matrix, from, n_cols, count, begin, end, static_cast<float*>(out) + ptrdiff_t(first) * n_rows, n_rows);
        return;
      }
      const int stride = end - begin;
      std::unique_ptr<float[]> sums(new float[size_t(count) * stride]);
      kernel(matrix, from, n_cols, count, begin, end, sums.get() - begin, stride);
      for (int i = 0; i < count; i++) {
        const ptrdiff_t to = ptrdiff_t(first + i) * n_rows + begin;
        if (x.type == mx::float16) {
          store_halves(sums.get() + ptrdiff_t(i) * stride, stride, static_cast<uint16_t*>(out) + to);
        } else {
          cpu::store_row(sums.get() + ptrdiff_t(i) * stride, stride, out, x.type, to);
        }
      }
    });
  }
};

void multiply(const char* op, cpu::Q1MatmulKernel* kernel, mx::Stream stream, const std::vector<mx::array>& inputs,
              mx::array& out) {
  auto encoder = cpu::prepare(op, stream, inputs, {out});
  encoder.dispatch([work = Work{cpu::View(inputs[0]), cpu::View(inputs[1]), cpu::View(inputs[2]), out.data<void>(), kernel}] {
    work.run();
  });
}

}  // namespace

void Q1Matmul::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  multiply("q1_matmul", cpu::matmul_kernel_of(cpu::active_isa(), 1), stream(), inputs, out);
}

void TernaryMatmul::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  multiply("ternary_matmul", cpu::matmul_kernel_of(cpu::active_isa(), 2), stream(), inputs, out);
}

}  // namespace tqext
