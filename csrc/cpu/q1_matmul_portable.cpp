#include <algorithm>

#include "half.h"
#include "q1_matmul_kernels.h"

// The 16 signed sums of four inputs are a table, and four sign bits an index into it: the additions of four weights are
// paid once for all rows.

namespace tqext::cpu {
namespace {

constexpr int kGroup = 128, kWords = kGroup / 32, kLookups = kGroup / 4, kTable = 16;
constexpr int kPanelTables = 8;  // inputs * groups whose tables are built at a time: 16 KiB of L1

void build_table(const float* x, float* table) {
  for (int bits = 0; bits < kTable; bits++) {
    float sum = 0;
    for (int c = 0; c < 4; c++) sum += bits >> c & 1 ? x[c] : -x[c];
    table[bits] = sum;
  }
}

template <int n_inputs>
void run(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int row_begin, int row_end, float* out, ptrdiff_t out_stride) {
  constexpr int kPanelGroups = kPanelTables / n_inputs, kWordTables = 8 * n_inputs * kTable;
  float tables[kPanelGroups * kLookups * n_inputs * kTable];  // [group of the panel][lookup][input][16]
  for (int panel = 0; panel < m.n_groups; panel += kPanelGroups) {
    const int n_groups = std::min(kPanelGroups, m.n_groups - panel);
    for (int k = 0; k < n_groups * kLookups; k++)
      for (int i = 0; i < n_inputs; i++)
        build_table(x + i * x_stride + panel * kGroup + 4 * k, tables + (k * n_inputs + i) * kTable);
    for (int r = row_begin; r < row_end; r++) {
      const uint32_t* weight = m.weight + r * m.weight_stride + panel * kWords;
      const uint16_t* scales = m.scales + r * m.scale_stride + panel;
      float total[n_inputs] = {};
      for (int g = 0; g < n_groups; g++, weight += kWords) {
        // The four words are four independent sums: the additions of one would wait for each other.
        float sum[kWords][n_inputs] = {};
        const float* table = tables + g * kWords * kWordTables;
        for (int shift = 0; shift < 32; shift += 4, table += n_inputs * kTable)
          for (int w = 0; w < kWords; w++)
            for (int i = 0; i < n_inputs; i++) sum[w][i] += table[w * kWordTables + i * kTable + (weight[w] >> shift & 15)];
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
  with_inputs(n_inputs, [&]<int n>() { run<n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

}  // namespace tqext::cpu
