#include "rotate.h"

#include <cmath>
#include <map>
#include <mutex>
#include <numeric>

#include "check_arrays.h"
#include "cpu/environment.h"
#include "fixed_shapes.h"
#include "mlx/ops.h"

namespace tqext {

Rotation resolve_rotation(const std::string& name, int dim, const char* op) {
  if (name == "none") return Rotation::kNone;
  if (name == "orthogonal") return Rotation::kOrthogonal;
  check(name == "hadamard", "[", op, "] rotation: expected \"hadamard\", \"orthogonal\" or \"none\", got \"", name, "\"");
  return hadamard_factor(dim) ? Rotation::kHadamard : Rotation::kOrthogonal;
}

namespace {

std::vector<float> make_orthogonal(int dim) {
  std::vector<double> rows(size_t(dim) * dim);
  // A sum of four 16-bit integers is near enough to a normal number for a matrix without a preferred direction.
  for (size_t i = 0; i < rows.size(); i++) {
    double sum = 0;
    for (int k = 0; k < 2; k++) {
      const uint32_t word = sign_word(TQ_ROTATION_SEED ^ uint32_t(dim), int(2 * i + k));
      sum += double(word & 0xffff) + double(word >> 16);
    }
    rows[i] = sum - 2.0 * 65535.0;
  }
  for (int i = 0; i < dim; i++) {
    double* row = &rows[size_t(i) * dim];
    // Twice: one pass of Gram-Schmidt leaves errors of the size of the matrix's condition number.
    for (int pass = 0; pass < 2; pass++) {
      for (int j = 0; j < i; j++) {
        const double* other = &rows[size_t(j) * dim];
        double dot = 0;
        for (int d = 0; d < dim; d++) dot += row[d] * other[d];
        for (int d = 0; d < dim; d++) row[d] -= dot * other[d];
      }
    }
    double square = 0;
    for (int d = 0; d < dim; d++) square += row[d] * row[d];
    for (int d = 0; d < dim; d++) row[d] /= std::sqrt(square);
  }
  return {rows.begin(), rows.end()};
}

}  // namespace

const mx::array& orthogonal_matrix(int dim, int n) {
  static std::mutex mutex;
  // Leaked: an array must not be freed after MLX's allocator is gone at exit.
  static auto* matrices = new std::map<std::pair<int, int>, mx::array>;
  std::lock_guard lock(mutex);
  auto found = matrices->find({dim, n});
  if (found == matrices->end()) {
    const std::vector<float> all = make_orthogonal(dim);
    std::vector<float> values;
    for (int row = 0; row < dim; row++) values.insert(values.end(), &all[size_t(row) * dim], &all[size_t(row) * dim] + n);
    found = matrices->emplace(std::pair{dim, n}, mx::array(values.begin(), mx::Shape{dim, n}, mx::float32)).first;
  }
  return found->second;
}

mx::array apply_orthogonal(const mx::array& x, int dim, int n, bool inverse, mx::Stream stream) {
  // Without the columns of zeros, and without the slice that would take them off again: shapeless compilation knows neither
  // pad nor slice.
  const mx::array& matrix = orthogonal_matrix(dim, n);
  // Nor does it look at the inner axis of a product again.
  std::vector<int> leading(x.ndim() - 1);
  std::iota(leading.begin(), leading.end(), 0);
  const mx::array fixed = fixed_shapes(mx::astype(x, mx::float32, stream), {{"x", x, leading}}, "rotate", stream);
  return mx::matmul(fixed, inverse ? matrix : mx::transpose(matrix, stream), stream);
}

mx::array pad_last(const mx::array& x, int dim, mx::Stream stream) {
  const int missing = dim - x.shape(-1);
  if (missing == 0) return x;
  return mx::pad(x, std::vector<int>{-1}, mx::Shape{0}, mx::Shape{missing}, mx::array(0, x.dtype()), "constant", stream);
}

namespace {

int check_rotated(const mx::array& x) {
  check_activation(x, "rotate", "x");
  check(x.ndim() >= 1, "[rotate] x: expected at least 1 axis, got a scalar");
  const int dim = x.shape(-1);
  check(dim % kUnit == 0 && dim >= kMinDim && dim <= kMaxDim, "[rotate] x: expected a last axis that is a multiple of ",
        int(kUnit), " from ", int(kMinDim), " to ", int(kMaxDim), ", got shape ", x.shape());
  return dim;
}

}  // namespace

mx::array rotate(const mx::array& x, bool inverse, const std::string& rotation, mx::StreamOrDevice s) {
  const int dim = check_rotated(x);
  const mx::Stream stream = mx::to_stream(s);
  switch (resolve_rotation(rotation, dim, "rotate")) {
    case Rotation::kNone:
      return x;
    case Rotation::kOrthogonal:
      return mx::astype(apply_orthogonal(x, dim, dim, inverse, stream), x.dtype(), stream);
    default:
      // The kernels count at most four axes.
      if (x.ndim() > 4) {
        const mx::array fixed = fixed_shapes(x, {{"x", x, {}}}, "rotate", stream);
        const mx::array rows = mx::reshape(fixed, {int(x.size() / dim), dim}, stream);
        return mx::reshape(rotate(rows, inverse, rotation, stream), x.shape(), stream);
      }
      cpu::check_environment(stream);
      return mx::array(x.shape(), x.dtype(), std::make_shared<Rotate>(stream, inverse), {x});
  }
}

std::vector<mx::Shape> Rotate::output_shapes(const std::vector<mx::array>& inputs) {
  const int dim = check_rotated(inputs[0]);
  check(hadamard_factor(dim), "[rotate] x: expected a last axis with a Hadamard matrix, as compiled, got shape ",
        inputs[0].shape());
  return {inputs[0].shape()};
}

}  // namespace tqext
