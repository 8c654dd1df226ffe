// eval_gpu of q1_matmul, q1_quantize and q1_dequantize.
#include "q1_matmul.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "format.h"
#include "params.h"
#include "q1_quantize.h"
#include "runtime.h"

namespace tqext {

namespace {

using namespace cuda;  // NOLINT: the backend's own names

int type_code(mx::Dtype type) {
  return type == mx::float32 ? int(kTypeFloat32) : type == mx::float16 ? int(kTypeFloat16) : int(kTypeBFloat16);
}

std::string build(int operation, mx::Dtype type, int row_tiles, int column_tiles, int device) {
  return compile(
      "q1_matmul.cu",
      {{"OPERATION", operation}, {"TYPE", type_code(type)}, {"ROW_TILES", row_tiles}, {"COLUMN_TILES", column_tiles}}, true,
      device);
}

Kernel find_kernel(mx::Dtype type, int row_tiles, int column_tiles, int device) {
  static std::mutex mutex;
  static std::map<std::array<int, 4>, Kernel> kernels;
  const std::array<int, 4> key{type_code(type), row_tiles, column_tiles, device};
  std::lock_guard lock(mutex);
  const auto found = kernels.find(key);
  if (found != kernels.end()) return found->second;
  const Kernel kernel = load_kernel(build(kQ1Multiply, type, row_tiles, column_tiles, device), "q1_matmul",
                                    q1_shared_bytes(column_tiles), 32 * kQ1Warps, device);
  return kernels.emplace(key, kernel).first->second;
}

const std::string& find_binary(int operation, mx::Dtype type, int device) {
  static std::mutex mutex;
  static std::map<std::array<int, 3>, std::string> binaries;
  const std::array<int, 3> key{operation, type_code(type), device};
  std::lock_guard lock(mutex);
  const auto found = binaries.find(key);
  if (found != binaries.end()) return found->second;
  return binaries.emplace(key, build(operation, type, 1, 1, device)).first->second;
}

// An array as rows of its last axis: the stride between rows, when there is one for all.
struct Matrix {
  int64_t n_rows, row_stride, stride;
};
Matrix as_matrix(const mx::array& x, const char* op, const char* name) {
  Matrix m{1, 0, x.strides(-1)};
  for (int axis = int(x.ndim()) - 2; axis >= 0; axis--) {
    if (x.shape(axis) == 1) continue;
    if (m.n_rows == 1) {
      m.row_stride = x.strides(axis);
    } else if (x.strides(axis) != m.row_stride * m.n_rows) {
      throw std::runtime_error(
          std::string("[") + op + "] " + name +
          ": expected axes that follow each other in memory on CUDA (use mx.contiguous), got strides that do not");
    }
    m.n_rows *= x.shape(axis);
  }
  return m;
}

int as_int(int64_t x) {
  if (x != int32_t(x))
    throw std::runtime_error("[tqext] input: expected sizes and strides below 2^31 on CUDA, got " + std::to_string(x));
  return int(x);
}

}  // namespace

void Q1Matmul::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("q1_matmul");
  const int device = stream().device.index;
  allocate_output(out, device);
  if (out.size() == 0) return;
  const mx::array &x = inputs[0], &weight = inputs[1], &scales = inputs[2];
  const Matrix rows = as_matrix(x, "q1_matmul", "x");
  Q1Params p{};
  p.x = device_pointer(x);
  p.weight = static_cast<const uint32_t*>(device_pointer(weight));
  p.scales = static_cast<const uint16_t*>(device_pointer(scales));
  p.out = device_pointer(out);
  p.x_stride[0] = rows.row_stride;
  p.x_stride[1] = rows.stride;
  for (int axis = 0; axis < 2; axis++) {
    p.weight_stride[axis] = weight.strides(axis);
    p.scale_stride[axis] = scales.strides(axis);
  }
  p.n_inputs = as_int(rows.n_rows);
  p.n_rows = weight.shape(0);
  p.n_groups = scales.shape(1);

  const int columns = p.n_inputs * (x.dtype() == mx::float32 ? 2 : 1);
  const int column_tiles = columns <= 8 ? 1 : columns <= 16 ? 2 : 4;
  // Few rows: more shares of the groups, so that all multiprocessors have blocks.
  const int row_blocks = (p.n_rows + 15) / 16, wanted = 2 * device_info(device).n_multiprocessors;
  int row_tiles = 1;
  while (row_tiles < kQ1Warps && row_blocks / (2 * row_tiles) >= wanted) row_tiles *= 2;
  const Kernel kernel = find_kernel(x.dtype(), row_tiles, column_tiles, device);
  const int per_block = 8 * column_tiles / (x.dtype() == mx::float32 ? 2 : 1);

  auto& encoder = mx::cu::get_command_encoder(stream());
  for (const mx::array& input : inputs) encoder.set_input_array(input);
  encoder.set_output_array(out);
  void* arguments[] = {&p};
  encoder.add_kernel_node_raw(
      kernel.function,
      {unsigned((row_blocks + row_tiles - 1) / row_tiles), unsigned((p.n_inputs + per_block - 1) / per_block), 1},
      {32 * kQ1Warps, 1, 1}, {1, 1, 1}, kernel.shared_bytes, arguments);
}

void Q1Quantize::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  check_backend("q1_quantize");
  const int device = stream().device.index;
  if (outputs[0].size() == 0) {
    for (mx::array& x : outputs) allocate_output(x, device);
    return;
  }
  const mx::array& w = inputs[0];
  const Matrix rows = as_matrix(w, "q1_quantize", "w");
  const int n_groups = w.shape(-1) / kQ1Group, blocks = as_int((rows.n_rows * n_groups + kQ1Warps - 1) / kQ1Warps);
  run_allocating("q1_quantize", find_binary(cuda::kQ1Quantize, w.dtype(), device), inputs, outputs,
                 {as_int(rows.n_rows), n_groups, as_int(rows.row_stride), as_int(rows.stride)}, blocks, 32 * kQ1Warps,
                 stream());
}

void Q1Dequantize::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("q1_dequantize");
  const int device = stream().device.index;
  std::vector<mx::array> outputs{out};
  if (out.size() == 0) {
    allocate_output(out, device);
    return;
  }
  const Matrix words = as_matrix(inputs[0], "q1_dequantize", "weight"),
               halves = as_matrix(inputs[1], "q1_dequantize", "scales");
  const int n_groups = inputs[1].shape(-1), blocks = as_int((words.n_rows * n_groups + kQ1Warps - 1) / kQ1Warps);
  run_allocating("q1_dequantize", find_binary(cuda::kQ1Dequantize, out.dtype(), device), inputs, outputs,
                 {as_int(words.n_rows), n_groups, as_int(words.row_stride), as_int(words.stride), as_int(halves.row_stride),
                  as_int(halves.stride)},
                 blocks, 32 * kQ1Warps, stream());
}

}  // namespace tqext
