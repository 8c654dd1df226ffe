#include <algorithm>

#include "half.h"
#include "q1_matmul_kernels.h"

// The 16 sums that four bits can stand for (the signs of four inputs, the codes of two) are a table, and the bits an index into
// it: the additions are paid once for all rows.

namespace tqext::cpu {
namespace {

constexpr int kGroup = 128, kTable = 16, kChains = 4;
constexpr int kPanelTables = 8;  // inputs * groups of bits whose tables are built at a time: 16 KiB of L1

template <int kBits>
void build_table(const float* x, float* table) {
  using Factor = BitFactor<kBits>;
  for (int bits = 0; bits < kTable; bits++) {
    float sum = 0;
    for (int b = 0; b < 4; b++) sum += x[Factor::column(b)] * (bits >> b & 1 ? Factor::one(b) : Factor::zero(b));
    table[bits] = sum;
  }
}

template <int kBits, int n_inputs>
void run(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int row_begin, int row_end, float* out, ptrdiff_t out_stride) {
  constexpr int kWords = kGroup * kBits / 32, kLookups = 8 * kWords, kWordTables = 8 * n_inputs * kTable;
  constexpr int kPanelGroups = std::max(kPanelTables / (n_inputs * kBits), 1);
  float tables[kPanelGroups * kLookups * n_inputs * kTable];  // [group of the panel][lookup][input][16]
  for (int panel = 0; panel < m.n_groups; panel += kPanelGroups) {
    const int n_groups = std::min(kPanelGroups, m.n_groups - panel);
    for (int k = 0; k < n_groups * kLookups; k++)
      for (int i = 0; i < n_inputs; i++)
        build_table<kBits>(x + i * x_stride + panel * kGroup + 4 / kBits * k, tables + (k * n_inputs + i) * kTable);
    for (int r = row_begin; r < row_end; r++) {
      const uint32_t* weight = m.weight + r * m.weight_stride + panel * kWords;
      const uint16_t* scales = m.scales + r * m.scale_stride + panel;
      float total[n_inputs] = {};
      for (int g = 0; g < n_groups; g++) {
        // Four words are four independent sums: the additions of one would wait for each other.
        float sum[kChains][n_inputs] = {};
        for (int first = 0; first < kWords; first += kChains, weight += kChains) {
          const float* table = tables + (g * kWords + first) * kWordTables;
          for (int shift = 0; shift < 32; shift += 4, table += n_inputs * kTable)
            for (int w = 0; w < kChains; w++)
              for (int i = 0; i < n_inputs; i++) sum[w][i] += table[w * kWordTables + i * kTable + (weight[w] >> shift & 15)];
        }
        const float scale = half_to_float(scales[g]);
        for (int i = 0; i < n_inputs; i++) total[i] += scale * ((sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]));
      }
      for (int i = 0; i < n_inputs; i++) {
        float& y = out[i * out_stride + r];
        y = panel == 0 ? total[i] : y + total[i];
      }
    }
  }
}

}  // namespace

void q1_matmul_portable(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                        float* out, ptrdiff_t out_stride) {
  with_inputs(n_inputs, [&]<int n>() { run<1, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

void ternary_matmul_portable(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                             float* out, ptrdiff_t out_stride) {
  with_inputs(n_inputs, [&]<int n>() { run<2, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

}  // namespace tqext::cpu
