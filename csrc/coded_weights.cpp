#include "coded_weights.h"

#include <limits>

#include "check_arrays.h"
#include "format.h"

namespace tqext {

void check_coded(const mx::array& weight, const mx::array& scales, int bits, const char* op) {
  const int words = kQ1Group * bits / 32;
  check_dtype(weight, mx::uint32, op, "weight");
  check_dtype(scales, mx::float16, op, "scales");
  check(weight.ndim() >= 1 && weight.shape(-1) % words == 0, "[", op, "] weight: expected a last axis that is a multiple of ",
        words, " words (", int(kQ1Group), " weights), got shape ", weight.shape());
  // Views of one word have any shape.
  check(int64_t(weight.shape(-1)) * 32 / bits <= std::numeric_limits<int>::max(), "[", op,
        "] weight: expected fewer columns than 2^31, got shape ", weight.shape());
  mx::Shape shape = weight.shape();
  shape.back() /= words;
  check_shape(scales, shape, op, "scales");
}

int coded_columns(const mx::array& weight, int bits) { return weight.shape(-1) / bits * 32; }

mx::Shape product_shape(const std::vector<mx::array>& inputs, int bits, const char* op) {
  const mx::array &x = inputs[0], &weight = inputs[1];
  check_activation(x, op, "x");
  check(weight.ndim() == 2, "[", op, "] weight: expected 2 axes, got shape ", weight.shape());
  check_coded(weight, inputs[2], bits, op);
  const int columns = coded_columns(weight, bits);
  check(x.ndim() >= 1 && x.shape(-1) == columns, "[", op, "] x: expected a last axis of ", columns, ", got shape ", x.shape());
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  return shape;
}

}  // namespace tqext
