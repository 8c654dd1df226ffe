// Running a Dispatch through MLX's Metal device.
#pragma once

#include <string>
#include <vector>

#include "dispatch_plan.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace tqext::metal {

namespace mx = mlx::core;

struct Binding {
  int index;
  const mx::array* array;
  bool is_output;
};

// params: the kernel's argument struct, bound at params_index.
void launch(mx::Stream stream, const Dispatch& dispatch, const std::vector<Binding>& bindings, const void* params,
            size_t params_bytes, int params_index);

template <class Params>
void launch(mx::Stream stream, const Dispatch& dispatch, const std::vector<Binding>& bindings, const Params& params,
            int params_index) {
  launch(stream, dispatch, bindings, &params, sizeof(params), params_index);
}

// Compiles the pipeline of a dispatch, unless it is there.
void prepare(mx::Stream stream, const Dispatch& dispatch);

// An array that lives until the stream's commands are done.
mx::array scratch(mx::Stream stream, const mx::Shape& shape, mx::Dtype type);

// The packed array itself, or a contiguous copy when its last axis is strided or rows do not start at 4-byte words.
mx::array packed_input(mx::Stream stream, const mx::array& x);

// The array itself, or a contiguous copy; at most four axes.
mx::array contiguous(mx::Stream stream, const mx::array& x);

// Estimate from the architecture's name: MLX gives no count.
int gpu_cores(mx::Stream stream);

Type type_of(mx::Dtype dtype);

inline Strides4 strides4(const mx::array& x) { return {x.strides(0), x.strides(1), x.strides(2), x.strides(3)}; }
// Axes of one element repeat.
inline Strides4 broadcast_strides(const mx::array& x) {
  auto step = [&](int axis) { return x.shape(axis) == 1 ? 0 : x.strides(axis); };
  return {step(0), step(1), step(2), step(3)};
}
// In units of `unit` elements.
inline Strides3 strides3(const mx::array& x, int unit = 1) {
  return {x.strides(0) / unit, x.strides(1) / unit, x.strides(2) / unit};
}
inline BalanceStrides balance_strides(const mx::array& x) { return {x.strides(0), x.strides(1)}; }

}  // namespace tqext::metal
