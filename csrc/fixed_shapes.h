// Arrays whose shapes a compiled function keeps: for parts of an operator that MLX's shapeless compilation would run as they
// were traced, whatever comes in.
#pragma once

#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

// An argument of an operator, and the axes of it that may have another size in a later call, though not none: where MLX
// broadcasts, a shapeless graph makes one of none.
struct FixedArray {
  std::string name;
  mx::array array;
  std::vector<int> free_axes = {};
};

// x itself outside of a trace. Inside of one: x, and an error in a later call of the compiled function where one of `arrays`
// has another shape than now. `op` leads the message.
mx::array fixed_shapes(const mx::array& x, const std::vector<FixedArray>& arrays, const char* op, mx::Stream stream);

// Inputs: x, then the arrays. Output: x.
class FixedShapes : public mx::UnaryPrimitive {
 public:
  FixedShapes(mx::Stream stream, std::string op, std::vector<std::string> names, std::vector<mx::Shape> shapes)
      : UnaryPrimitive(stream), op_(std::move(op)), names_(std::move(names)), shapes_(std::move(shapes)) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override { out.copy_shared_buffer(inputs[0]); }
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override { out.copy_shared_buffer(inputs[0]); }
  DEFINE_NAME(FixedShapes)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = static_cast<const FixedShapes&>(other);
    return op_ == o.op_ && names_ == o.names_ && shapes_ == o.shapes_;
  }

 private:
  std::string op_;
  std::vector<std::string> names_;
  std::vector<mx::Shape> shapes_;  // -1: any size but 0
};

}  // namespace tqext
