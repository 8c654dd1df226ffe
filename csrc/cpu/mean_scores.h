// Products of query rows with block means, written once for every vector width. Included inside the target pragma of each
// instruction set: internal linkage only.
#pragma once

#include "attention_kernels.h"

namespace tqext::cpu {
namespace {

// V: that of the fp32 tile kernel; kMeans: means that share a pass over the rows.
template <class V>
class MeanScores {
  using F = typename V::F;
  static constexpr int kWidth = V::kWidth, kRows = 4, kMeans = V::kMeans;

 public:
  static void score(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset) {
    if (means.half) {
      score(q, n_rows, static_cast<const uint16_t*>(means.data) + first * means.stride, means, n, offset);
    } else {
      score(q, n_rows, static_cast<const float*>(means.data) + first * means.stride, means, n, offset);
    }
  }

 private:
  static F load(const float* x) { return V::load(x); }
  static F load(const uint16_t* x) { return V::load_half(x); }

  template <class T>
  static void score(const float* q, int n_rows, const T* mean, const BlockMeans& means, int n, float* offset) {
    int i = 0;
    for (; i + kMeans <= n; i += kMeans) score_rows<kMeans>(q, n_rows, mean + i * means.stride, means, n, offset + i);
    for (; i < n; i++) score_rows<1>(q, n_rows, mean + i * means.stride, means, n, offset + i);
  }

  template <int M, class T>
  static void score_rows(const float* q, int n_rows, const T* mean, const BlockMeans& means, int n, float* offset) {
    int r = 0;
    for (; r + kRows <= n_rows; r += kRows) {
      multiply<kRows, M>(q + ptrdiff_t(r) * means.dim, mean, means, offset + ptrdiff_t(r) * n, n);
    }
    for (; r < n_rows; r++) multiply<1, M>(q + ptrdiff_t(r) * means.dim, mean, means, offset + ptrdiff_t(r) * n, n);
  }

  template <int R, int M, class T>
  static void multiply(const float* q, const T* mean, const BlockMeans& means, float* offset, ptrdiff_t offset_stride) {
    F acc[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) acc[r][m] = V::set1(0);
    }
    const int dim = means.dim, whole = dim / kWidth * kWidth;
    for (int d = 0; d < whole; d += kWidth) {
      F x[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) x[m] = load(mean + m * means.stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const F y = V::load(q + r * dim + d);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) acc[r][m] = V::fma(x[m], y, acc[r][m]);
      }
    }
    for (int r = 0; r < R; r++) {
      for (int m = 0; m < M; m++) {
        float sum = V::sum(acc[r][m]);
        if (whole < dim) sum += rest(q + r * dim, mean + m * means.stride, whole, dim);
        offset[r * offset_stride + m] = sum;
      }
    }
  }

  // Head dimensions are multiples of 8, vectors may be longer.
  template <class T>
  static float rest(const float* q, const T* mean, int from, int dim) {
    alignas(64) float x[kWidth] = {};
    alignas(64) T y[kWidth] = {};
    for (int d = from; d < dim; d++) {
      x[d - from] = q[d];
      y[d - from] = mean[d];
    }
    return V::sum(V::mul(V::load(x), load(y)));
  }
};

}  // namespace
}  // namespace tqext::cpu
