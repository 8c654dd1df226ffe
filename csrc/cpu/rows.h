// Reading and writing rows of arrays of any activation dtype.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "half.h"
#include "mlx/array.h"

namespace tqext::cpu {

namespace mx = mlx::core;

// Calls use(load) with the load function of the dtype: the dtype is looked up once per row, not per element.
template <class Use>
void with_load(mx::Dtype type, const Use& use) {
  if (type == mx::float32) {
    use([](const void* data, ptrdiff_t i) { return static_cast<const float*>(data)[i]; });
  } else if (type == mx::float16) {
    use([](const void* data, ptrdiff_t i) { return half_to_float(static_cast<const uint16_t*>(data)[i]); });
  } else {
    use([](const void* data, ptrdiff_t i) { return bfloat_to_float(static_cast<const uint16_t*>(data)[i]); });
  }
}

inline void load_row(const void* data, mx::Dtype type, ptrdiff_t start, ptrdiff_t stride, int n, float* row) {
  with_load(type, [&](auto load) {
    if (stride == 1) {
      for (int d = 0; d < n; d++) row[d] = load(data, start + d);
    } else {
      for (int d = 0; d < n; d++) row[d] = load(data, start + d * stride);
    }
  });
}

// To contiguous elements.
inline void store_row(const float* row, int n, void* data, mx::Dtype type, ptrdiff_t start) {
  if (type == mx::float32) {
    std::copy_n(row, n, static_cast<float*>(data) + start);
  } else {
    uint16_t* out = static_cast<uint16_t*>(data) + start;
    if (type == mx::float16) {
      for (int d = 0; d < n; d++) out[d] = float_to_half(row[d]);
    } else {
      for (int d = 0; d < n; d++) out[d] = float_to_bfloat(row[d]);
    }
  }
}

// Start of row i of an array, rows counted over all axes but the last.
inline ptrdiff_t row_start(const mx::Shape& shape, const mx::Strides& strides, size_t row) {
  ptrdiff_t start = 0;
  for (int axis = int(shape.size()) - 2; axis >= 0; axis--) {
    start += ptrdiff_t(row % shape[axis]) * strides[axis];
    row /= shape[axis];
  }
  return start;
}

// What a task needs of an array: it outlives the array object, not its buffer.
struct View {
  const void* data;
  mx::Dtype type;
  mx::Shape shape;
  mx::Strides strides;

  explicit View(const mx::array& x) : data(x.data<void>()), type(x.dtype()), shape(x.shape()), strides(x.strides()) {}

  size_t n_rows() const {
    size_t n = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); axis++) n *= shape[axis];
    return n;
  }
  void load(size_t row, int n, float* out) const {
    load_row(data, type, row_start(shape, strides, row), strides.back(), n, out);
  }
};

// Rows per task of a parallel loop over rows.
inline int row_blocks(size_t n_rows, size_t rows_per_block) { return int((n_rows + rows_per_block - 1) / rows_per_block); }

}  // namespace tqext::cpu
