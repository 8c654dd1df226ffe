// Checks of arrays, in the form of check.h.
#pragma once

#include "check.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

inline bool is_half(mx::Dtype type) { return type == mx::float16 || type == mx::bfloat16; }
inline bool is_activation(mx::Dtype type) { return type == mx::float32 || is_half(type); }

inline void check_activation(const mx::array& x, const char* op, const char* name) {
  check(is_activation(x.dtype()), "[", op, "] ", name, ": expected float32, float16 or bfloat16, got ", x.dtype());
}
inline void check_dtype(const mx::array& x, mx::Dtype type, const char* op, const char* name) {
  check(x.dtype() == type, "[", op, "] ", name, ": expected ", type, ", got ", x.dtype());
}
inline void check_shape(const mx::array& x, const mx::Shape& shape, const char* op, const char* name) {
  check(x.shape() == shape, "[", op, "] ", name, ": expected shape ", shape, ", got shape ", x.shape());
}

}  // namespace tqext
