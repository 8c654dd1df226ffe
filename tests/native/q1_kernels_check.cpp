// Every q1_matmul and ternary_matmul kernel this machine can run against float64 over the same bits; no MLX, no Python, so that
// it also runs cross-compiled under an emulator. Prints the worst relative errors; the exit status is the number of failures.
//   g++ -std=c++20 -O3 -I csrc tests/native/q1_kernels_check.cpp csrc/cpu/q1_matmul_*.cpp csrc/cpu/isa.cpp csrc/cpu/scratch.cpp
//       -o check && ./check
// Argument: N, to test every Nth case.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/q1_matmul_kernels.h"

using namespace tqext::cpu;

namespace {

constexpr double kTolerance = 1e-5;
constexpr float kUntouched = 777;

double error_of(Q1MatmulKernel* kernel, int bits, int rows, int row_begin, int cols, int n_inputs) {
  std::mt19937 random(rows * 31 + cols + n_inputs);
  std::normal_distribution<float> normal;
  const int words = cols * bits / 32, groups = cols / 128, weight_stride = words + 3, scale_stride = groups + 1,
            x_stride = cols + 5, out_stride = rows + 7;
  // What lies between the rows would show: set bits, and scales that are NaN.
  std::vector<uint32_t> weight(size_t(rows) * weight_stride, ~0u);
  std::vector<uint16_t> scales(size_t(rows) * scale_stride, 0x7e00);
  std::vector<float> x(size_t(n_inputs) * x_stride, std::numeric_limits<float>::quiet_NaN());
  std::vector<float> out(size_t(n_inputs) * out_stride, kUntouched);
  for (int r = 0; r < rows; r++) {
    for (int w = 0; w < words; w++) weight[r * weight_stride + w] = random();
    for (int g = 0; g < groups; g++) scales[r * scale_stride + g] = random() % 8 ? float_to_half(normal(random)) : 0;
  }
  for (int i = 0; i < n_inputs; i++)
    for (int c = 0; c < cols; c++) x[i * x_stride + c] = normal(random);
  const Q1Matrix matrix{weight.data(), scales.data(), weight_stride, scale_stride, groups};
  kernel(matrix, x.data(), x_stride, n_inputs, row_begin, rows, out.data(), out_stride);
  double largest = 0, error = 0;
  for (int i = 0; i < n_inputs; i++)
    for (int r = 0; r < out_stride; r++) {
      const double got = out[i * out_stride + r];
      if (r < row_begin || r >= rows) {
        if (got != kUntouched) return INFINITY;
        continue;
      }
      double want = 0;
      for (int c = 0; c < cols; c++) {
        const double value = double(x[i * x_stride + c]) * half_to_float(scales[r * scale_stride + c / 128]);
        const uint32_t code = weight[r * weight_stride + c * bits / 32] >> (c * bits % 32) & ((1 << bits) - 1);
        want += value * (bits == 1 ? 2 * int(code) - 1 : int(code) - 1);
      }
      largest = std::fmax(largest, std::fabs(want));
      error = std::isfinite(got) ? std::fmax(error, std::fabs(got - want)) : INFINITY;
    }
  return largest > 0 ? error / largest : error;
}

int check(Isa isa, int every) {
  const char* const name = isa_name(isa);
  int failures = 0, n = 0;
  double worst[2] = {};
  for (int rows : {1, 7, 8, 9, 15, 17, 31, 32, 33, 65, 70, 290})
    for (int cols : {128, 384, 640, 4096, 4224, 12288 + 384})
      for (int n_inputs = 1; n_inputs <= kQ1MaxInputs; n_inputs++)
        for (int bits : {1, 2}) {
          if ((cols > 1000 && rows > 70) || n++ % every != 0) continue;
          Q1MatmulKernel* const kernel = matmul_kernel_of(isa, bits);
          const double error = error_of(kernel, bits, rows, rows > 60 ? 5 : 0, cols, n_inputs);
          worst[bits - 1] = std::fmax(worst[bits - 1], error);
          if (error <= kTolerance) continue;
          std::printf("%s bits=%d rows=%d cols=%d inputs=%d: error %.3g\n", name, bits, rows, cols, n_inputs, error);
          failures++;
        }
  std::printf("%-10s worst %.2e with one bit, %.2e with two, %d failures\n", name, worst[0], worst[1], failures);
  return std::min(failures, 255);  // an exit status has eight bits
}

}  // namespace

int main(int argc, char** argv) {
  int failures = 0;
  for (Isa isa : available_isas()) failures += check(isa, argc > 1 ? std::atoi(argv[1]) : 1);
  return std::min(failures, 255);  // an exit status has eight bits
}
