// rotate: the orthogonal map that is applied to keys, values and queries before coding (format.h).
#pragma once

#include <string>

#include "format.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

enum class Rotation {
  kNone,        // the caller's vectors are in the rotated space already
  kHadamard,    // random signs, then the orthonormal Walsh-Hadamard transform
  kOrthogonal,  // dense matrix, seeded
};

// "none", "hadamard" or "orthogonal"; a head dimension without a Hadamard matrix gets the dense matrix.
// dim: padded head dimension.
Rotation resolve_rotation(const std::string& name, int dim, const char* op);

// First n columns of the dense orthogonal matrix [dim, dim], fp32: Gram-Schmidt in float64 on rows of integers drawn with
// sign_word's generator.
const mx::array& orthogonal_matrix(int dim, int n);

// x [..., n] -> [..., dim], as x padded with zeros to dim; inverse: x [..., dim] -> the first n of [..., dim]. fp32.
mx::array apply_orthogonal(const mx::array& x, int dim, int n, bool inverse, mx::Stream stream);

// x [..., n] with n <= dim, zero-padded on the last axis.
mx::array pad_last(const mx::array& x, int dim, mx::Stream stream);

// x [..., dim], float32, float16 or bfloat16 -> the same shape and dtype.
mx::array rotate(const mx::array& x, bool inverse, const std::string& rotation, mx::StreamOrDevice s);

// kHadamard only; computes in fp32.
class Rotate : public mx::UnaryPrimitive {
 public:
  Rotate(mx::Stream stream, bool inverse) : UnaryPrimitive(stream), inverse_(inverse) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(Rotate)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override { return inverse_ == static_cast<const Rotate&>(other).inverse_; }
  bool inverse() const { return inverse_; }

 private:
  bool inverse_;
};

}  // namespace tqext
