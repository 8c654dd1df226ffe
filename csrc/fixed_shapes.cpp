#include "fixed_shapes.h"

#include <memory>

#include "check_arrays.h"

namespace tqext {

mx::array fixed_shapes(const mx::array& x, const std::vector<FixedArray>& arrays, const char* op, mx::Stream stream) {
  bool traced = false;
  std::vector<mx::array> inputs{x};
  std::vector<std::string> names;
  std::vector<mx::Shape> shapes;
  for (const FixedArray& fixed : arrays) {
    traced |= fixed.array.is_tracer();
    inputs.push_back(fixed.array);
    names.push_back(fixed.name);
    shapes.push_back(fixed.array.shape());
    for (int axis : fixed.free_axes) shapes.back()[axis] = -1;
  }
  if (!traced) return x;
  return mx::array(x.shape(), x.dtype(), std::make_shared<FixedShapes>(stream, op, names, shapes), inputs);
}

std::vector<mx::Shape> FixedShapes::output_shapes(const std::vector<mx::array>& inputs) {
  for (size_t i = 0; i < shapes_.size(); i++) {
    const mx::Shape& shape = inputs[i + 1].shape();
    bool same = shape.size() == shapes_[i].size();
    for (size_t axis = 0; same && axis < shape.size(); axis++) {
      same = shapes_[i][axis] == shape[axis] || (shapes_[i][axis] < 0 && shape[axis] > 0);
    }
    check(same, "[", op_, "] ", names_[i], ": expected shape ", shapes_[i],
          " (-1: any but 0), which this function was compiled with, got shape ", shape, "; compile it without shapeless");
  }
  return {inputs[0].shape()};
}

}  // namespace tqext
