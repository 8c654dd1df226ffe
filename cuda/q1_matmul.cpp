// eval_gpu of q1_matmul, ternary_matmul, q1_quantize and q1_dequantize.
#include "q1_matmul.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <stdexcept>

#include "format.h"
#include "once_map.h"
#include "params.h"
#include "q1_quantize.h"
#include "runtime.h"
#include "ternary_matmul.h"

namespace tqext {

namespace {

using namespace cuda;  // NOLINT: the backend's own names

std::string build(int operation, mx::Dtype type, int row_tiles, int column_tiles, int device) {
  return compile(
      "q1_matmul.cu",
      {{"OPERATION", operation}, {"TYPE", type_code(type)}, {"ROW_TILES", row_tiles}, {"COLUMN_TILES", column_tiles}}, true,
      device);
}

// kQ1Multiply or kQ1Prepare.
Kernel find_kernel(int operation, mx::Dtype type, int row_tiles, int column_tiles, int device) {
  static OnceMap<std::array<int, 5>, Kernel> kernels;
  return kernels.get({operation, type_code(type), row_tiles, column_tiles, device}, [&] {
    const std::string binary = build(operation, type, row_tiles, column_tiles, device);
    return operation == kQ1Prepare ? load_kernel(binary, "q1_prepare", 0, 32 * kQ1Warps, device)
                                   : load_kernel(binary, "q1_matmul", q1_prepared_bytes(column_tiles), 32 * kQ1Warps, device);
  });
}

// The kernel for a few rows of x, and its launch.
struct Matvec {
  int weight_bits, inputs, warps, stages, shared_bytes;
};

// The largest ring that the device's shared memory leaves room for; shared_bytes 0: none. n_groups: of 128 bits.
Matvec plan_matvec(int weight_bits, int n_inputs, int n_groups, bool is_float32, int device_bytes) {
  Matvec m{weight_bits, 1, 0, 0, 0};
  while (m.inputs < n_inputs) m.inputs *= 2;
  for (const auto& [warps, stages] : {std::pair{16, 4}, {16, 3}, {8, 4}, {8, 3}, {8, 2}}) {
    const int bytes = Q1MatvecLayout(m.inputs, is_float32, warps, stages).total(n_groups, m.inputs);
    if (bytes <= device_bytes) return {weight_bits, m.inputs, warps, stages, bytes};
  }
  return m;
}

Kernel find_matvec(mx::Dtype type, const Matvec& m, int device) {
  static OnceMap<std::array<int, 6>, Kernel> kernels;
  return kernels.get({type_code(type), m.inputs, m.warps, m.stages, m.weight_bits, device}, [&] {
    const std::string binary = compile("q1_matvec.cu",
                                       {{"TYPE", type_code(type)},
                                        {"INPUTS", m.inputs},
                                        {"WARPS", m.warps},
                                        {"STAGES", m.stages},
                                        {"WEIGHT_BITS", m.weight_bits}},
                                       true, device);
    return load_kernel(binary, "q1_matvec", device_info(device).shared_bytes, 32 * m.warps, device);
  });
}

const std::string& find_binary(int operation, mx::Dtype type, int device) {
  static OnceMap<std::array<int, 3>, std::string> binaries;
  return binaries.get({operation, type_code(type), device}, [&] { return build(operation, type, 1, 1, device); });
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

// Few rows of x and weights as they are stored: true when the binary tensor cores take them.
bool run_matvec(const Q1Params& q, int weight_bits, mx::Dtype type, const std::vector<mx::array>& inputs, mx::array& out,
                mx::Stream stream) {
  const int device = stream.device.index;
  const DeviceInfo& info = device_info(device);
  auto multiple = [](const void* pointer, int of) { return reinterpret_cast<uintptr_t>(pointer) % of == 0; };
  if (q.n_inputs > kMatvecInputs || q.n_groups % 2 || q.weight_stride[1] != 1 || q.scale_stride[1] != 1 ||
      q.weight_stride[0] % kQ1Words || q.scale_stride[0] % 2 || !multiple(q.weight, 16) || !multiple(q.scales, 4)) {
    return false;
  }
  const int n_groups = weight_bits * q.n_groups;  // of 128 bits
  const Matvec plan = plan_matvec(weight_bits, q.n_inputs, n_groups, type == mx::float32, info.shared_bytes);
  if (!plan.shared_bytes) return false;
  const Kernel kernel = find_matvec(type, plan, device);

  Q1MatvecParams p{};
  p.x = q.x;
  p.weight = q.weight;
  p.scales = q.scales;
  p.out = q.out;
  std::copy_n(q.x_stride, 2, p.x_stride);
  p.weight_stride = q.weight_stride[0];
  p.scale_stride = q.scale_stride[0];
  p.n_inputs = q.n_inputs;
  p.n_rows = q.n_rows;
  p.n_groups = n_groups;
  // As many warps share a tile as make the busiest one do least; few, where that is equal.
  const int n_tiles = (p.n_rows + 15) / 16;
  int64_t least = 0;
  for (int shares = 1; shares <= plan.warps; shares *= 2) {
    const int pair = 2 * weight_bits;  // scales come in pairs
    const int groups = (p.n_groups / pair + shares - 1) / shares * pair, seats = info.n_multiprocessors * (plan.warps / shares);
    // The first tiles cost about four groups on top of their own, what joins the shares; later ones hide it.
    const int64_t tiles = (n_tiles + seats - 1) / seats, cost = tiles * groups + 4 * std::min<int64_t>(tiles, 4);
    if (shares > 1 && cost >= least) continue;
    least = cost;
    p.shares = shares;
    p.share_groups = groups;
  }
  const int seats = plan.warps / p.shares;

  auto& encoder = mx::cu::get_command_encoder(stream);
  depend_on(encoder, inputs);
  encoder.set_output_array(out);
  void* arguments[] = {&p};
  add_kernel(encoder, "q1_matvec", kernel, {unsigned(std::min(info.n_multiprocessors, (n_tiles + seats - 1) / seats)), 1, 1},
             unsigned(32 * plan.warps), plan.shared_bytes, arguments, inputs);
  return true;
}

// The kernel for many rows of x, and its launch.
struct Gemm {
  int columns = 0, column_tiles = 0, shares = 0, n_spans = 0, row_tiles = 0, n_stages = 0;
  bool warpgroups = false;

  // shares 0: none fits.
  Gemm(int n_inputs, int n_rows, int n_groups, const DeviceInfo& device) : warpgroups(device.architecture == 90) {
    const int most = warpgroups ? 128 : 64;  // without warpgroups the products' other operand takes registers too
    const int fewest = (n_inputs + most - 1) / most;
    constexpr int kWidths[] = {16, 32, 64, 96, 128};
    const int widest = *std::find_if(std::begin(kWidths), std::end(kWidths), [&](int x) { return x * fewest >= n_inputs; });
    choose(n_inputs, n_rows, n_groups, widest, false, device);
    // Narrower tiles decode weights more often, which costs nothing where all tiles are in work at once.
    for (int x : kWidths) {
      if (x < widest) choose(n_inputs, n_rows, n_groups, x, true, device);
    }
  }
  int shared_bytes() const { return Q1GemmLayout(columns, shares, n_stages).total; }
  size_t prepared_bytes() const { return size_t(column_tiles) * n_spans * kGemmSpan * columns * 2 * kQ1Group; }

 private:
  int64_t least = 0;  // the choice's time, in cycles

  // narrow: only if it saves an eighth.
  void choose(int n_inputs, int n_rows, int n_groups, int width, bool narrow, const DeviceInfo& device) {
    // The products of a span for all groups of warps (few columns: the making of their factors); what joins shares and writes a
    // tile.
    const int64_t product = warpgroups ? 64 * std::max(width, 40) : 128 * std::max(width, 20), join = 1000;
    const int n_column_tiles = (n_inputs + width - 1) / width;
    for (int n = 1; n <= kGemmGroups; n *= 2) {
      const int spans = (n_groups + kGemmSpan * n - 1) / (kGemmSpan * n) * n, rows = 64 * kGemmGroups / n;
      const int tiles = (n_rows + rows - 1) / rows;
      const int stages = std::min(16, (device.shared_bytes - Q1GemmLayout(width, n, 0).total) /
                                          (Q1GemmLayout(width, n, 1).total - Q1GemmLayout(width, n, 0).total));
      if (stages < 2 * n) continue;
      const int64_t waves = (int64_t(tiles) * n_column_tiles + device.n_multiprocessors - 1) / device.n_multiprocessors;
      if (narrow && waves > 1) continue;
      const int64_t time = waves * (spans / n * product + join * n);
      if (shares && (narrow ? 8 * time >= 7 * least : time >= least)) continue;
      least = time;
      columns = width, column_tiles = n_column_tiles, shares = n, n_spans = spans, row_tiles = tiles, n_stages = stages;
    }
  }
};

Kernel find_gemm(int operation, mx::Dtype type, const Gemm& m, int device) {
  static OnceMap<std::array<int, 5>, Kernel> kernels;
  const bool prepare = operation == kQ1GemmPrepare;
  return kernels.get({operation, type_code(type), prepare ? 0 : m.columns, m.warpgroups, device}, [&] {
    std::vector<Define> defines{{"OPERATION", operation}, {"TYPE", type_code(type)}};
    if (prepare) {
      return load_kernel(compile("q1_gemm.cu", defines, true, device), "q1_gemm_prepare", 0, kGemmPrepareThreads, device);
    }
    defines.insert(defines.end(), {{"COLUMNS", m.columns}, {"WGMMA", m.warpgroups}});
    return load_kernel(compile("q1_gemm.cu", defines, true, device, m.warpgroups), "q1_gemm", device_info(device).shared_bytes,
                       kGemmThreads, device);
  });
}

// Many rows of x of 16 bits, weights as they are stored. The output has no memory yet; true: it is written.
bool run_gemm(const Q1Params& q, const std::vector<mx::array>& inputs, mx::array& out, mx::Stream stream) {
  const mx::array& x = inputs[0];
  const int device = stream.device.index;
  if (x.dtype() == mx::float32 || q.n_inputs <= kMatvecInputs || q.n_groups == 0 || q.weight_stride[1] != 1 ||
      q.scale_stride[1] != 1 || q.weight_stride[0] % kQ1Words || reinterpret_cast<uintptr_t>(q.weight) % 16) {
    return false;
  }
  const Gemm m(q.n_inputs, q.n_rows, q.n_groups, device_info(device));
  if (!m.shares) return false;
  const Kernel prepare = find_gemm(kQ1GemmPrepare, x.dtype(), m, device), multiply = find_gemm(kQ1Gemm, x.dtype(), m, device);

  // What is large is MLX's, which counts it and gives it back; what is small costs less as this backend's own.
  constexpr size_t kSmallOutput = size_t(1) << 20, kSmallPrepared = size_t(1) << 22;
  const int padded = m.column_tiles * m.columns;
  const size_t bytes = m.prepared_bytes() + sizeof(float) * padded;
  std::optional<mx::array> large_prepared;
  std::vector<mx::array> large;
  if (out.nbytes() > kSmallOutput) {
    large.push_back(out);
  } else {
    allocate_output(out, device);
  }
  if (bytes > kSmallPrepared) {
    large_prepared.emplace(mx::Shape{padded, int(bytes / padded)}, mx::uint8, nullptr, std::vector<mx::array>{});
    large.push_back(*large_prepared);
  }
  if (!large.empty()) allocate_through_mlx(large, x, stream);
  const Workspace scratch = large_prepared ? Workspace{*large_prepared, 0, bytes} : workspace(stream, 0, bytes);

  Q1GemmParams p{};
  p.x = q.x;
  p.weight = q.weight;
  p.scales = q.scales;
  p.out = device_pointer(out);
  p.prepared = static_cast<char*>(device_pointer(scratch.memory)) + scratch.zeroed;
  p.factors = reinterpret_cast<float*>(static_cast<char*>(p.prepared) + m.prepared_bytes());
  std::copy_n(q.x_stride, 2, p.x_stride);
  p.weight_stride = q.weight_stride[0];
  p.scale_stride = q.scale_stride[0];
  p.n_inputs = q.n_inputs;
  p.n_rows = q.n_rows;
  p.n_groups = q.n_groups;
  p.columns = m.columns;
  p.n_spans = m.n_spans;
  p.row_tiles = m.row_tiles;
  p.column_tiles = m.column_tiles;
  p.shares = m.shares;
  p.n_stages = m.n_stages;

  auto& encoder = mx::cu::get_command_encoder(stream);
  void* arguments[] = {&p};
  encoder.set_input_array(x);
  encoder.set_output_array(scratch.memory);
  // The largest of a bf16 row is looked for first: its block takes all of it.
  const int units = m.n_spans * kGemmSpan * 16;
  const unsigned parts = x.dtype() == mx::bfloat16 ? 1 : (units + kGemmPrepareThreads - 1) / kGemmPrepareThreads;
  add_kernel(encoder, "q1_gemm_prepare", prepare, {unsigned(padded), parts, 1}, kGemmPrepareThreads, 0, arguments, {x});
  encoder.set_input_array(inputs[1]);
  encoder.set_input_array(inputs[2]);
  encoder.set_output_array(scratch.memory);  // whoever writes it next waits
  encoder.set_output_array(out);
  const int64_t tiles = int64_t(m.row_tiles) * m.column_tiles;
  add_kernel(encoder, "q1_gemm", multiply, {unsigned(std::min<int64_t>(tiles, device_info(device).n_multiprocessors)), 1, 1},
             kGemmThreads, m.shared_bytes(), arguments, inputs);
  if (large_prepared) encoder.add_completed_handler([kept = *large_prepared] {});
  return true;
}

}  // namespace

namespace {

// All but the output.
Q1Params params_of(const std::vector<mx::array>& inputs, const char* op) {
  const mx::array &x = inputs[0], &weight = inputs[1], &scales = inputs[2];
  const Matrix rows = as_matrix(x, op, "x");
  Q1Params p{};
  p.x = device_pointer(x);
  p.weight = static_cast<const uint32_t*>(device_pointer(weight));
  p.scales = static_cast<const uint16_t*>(device_pointer(scales));
  p.x_stride[0] = rows.row_stride;
  p.x_stride[1] = rows.stride;
  for (int axis = 0; axis < 2; axis++) {
    p.weight_stride[axis] = weight.strides(axis);
    p.scale_stride[axis] = scales.strides(axis);
  }
  p.n_inputs = as_int(rows.n_rows);
  p.n_rows = weight.shape(0);
  p.n_groups = scales.shape(1);
  return p;
}

}  // namespace

void Q1Matmul::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("q1_matmul");
  const int device = stream().device.index;
  if (out.size() == 0) {
    allocate_output(out, device);
    return;
  }
  const mx::array &x = inputs[0], &weight = inputs[1], &scales = inputs[2];
  Q1Params p = params_of(inputs, "q1_matmul");

  if (run_gemm(p, inputs, out, stream())) return;
  allocate_output(out, device);
  p.out = device_pointer(out);
  if (run_matvec(p, 1, x.dtype(), inputs, out, stream())) return;
  const int parts = x.dtype() == mx::float32 ? 2 : 1, columns = p.n_inputs * parts;
  const int column_tiles = columns <= 8 ? 1 : columns <= 16 ? 2 : 4;
  // Few rows: more shares of the groups, so that all multiprocessors have blocks.
  const int row_blocks = (p.n_rows + 15) / 16, wanted = device_info(device).n_multiprocessors;
  int row_tiles = 1;
  while (row_tiles < kQ1Warps && row_blocks / (2 * row_tiles) >= wanted) row_tiles *= 2;
  const int per_block = 8 * column_tiles / parts, column_blocks = (p.n_inputs + per_block - 1) / per_block;
  const int n_chunks = (p.n_groups + kQ1Chunk - 1) / kQ1Chunk;
  const Kernel prepare = find_kernel(kQ1Prepare, x.dtype(), 1, column_tiles, device);
  const Kernel multiply = find_kernel(kQ1Multiply, x.dtype(), row_tiles, column_tiles, device);
  const Workspace scratch = workspace(stream(), 0, size_t(column_blocks) * n_chunks * q1_prepared_bytes(column_tiles));
  p.prepared = static_cast<char*>(device_pointer(scratch.memory)) + scratch.zeroed;

  auto& encoder = mx::cu::get_command_encoder(stream());
  void* arguments[] = {&p};
  const int units = as_int(int64_t(column_blocks) * per_block * p.n_groups);
  encoder.set_input_array(x);
  encoder.set_output_array(scratch.memory);
  add_kernel(encoder, "q1_prepare", prepare, {unsigned((units + kQ1Warps - 1) / kQ1Warps), 1, 1}, 32 * kQ1Warps, 0, arguments,
             {x});
  encoder.set_input_array(weight);
  encoder.set_input_array(scales);
  encoder.set_output_array(scratch.memory);  // whoever writes it next waits
  encoder.set_output_array(out);
  add_kernel(encoder, "q1_multiply", multiply, {unsigned((row_blocks + row_tiles - 1) / row_tiles), unsigned(column_blocks), 1},
             32 * kQ1Warps, multiply.shared_bytes, arguments, inputs);
}

bool gpu_multiplies_bits(const mx::array& x, mx::Stream stream) {
  // Of fp32 rows the other way would lose bits: MLX multiplies them in TF32.
  if (x.dtype() == mx::float32) return true;
  // From here on dequantising the weights for the call, and MLX's own product, take less time.
  constexpr int64_t kManyRows = 384, kManyRowsOfWarpgroups = 4096;
  const int64_t rows = device_info(stream.device.index).architecture == 90 ? kManyRowsOfWarpgroups : kManyRows;
  return int64_t(x.size()) < rows * x.shape(-1);
}

void TernaryMatmul::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("ternary_matmul");
  const int device = stream().device.index;
  allocate_output(out, device);
  if (out.size() == 0) return;
  Q1Params p = params_of(inputs, "ternary_matmul");
  p.out = device_pointer(out);
  const mx::Dtype type = inputs[0].dtype();
  // Of a wide weight, shared memory holds fewer rows of x: several launches, each of which reads the weights.
  int rows = kMatvecInputs;
  while (rows > 1 &&
         !plan_matvec(2, rows, 2 * p.n_groups, type == mx::float32, device_info(device).shared_bytes).shared_bytes) {
    rows /= 2;
  }
  int done = 0;
  for (; done < p.n_inputs; done += rows) {
    Q1Params part = p;
    part.n_inputs = std::min(rows, p.n_inputs - done);
    part.x = static_cast<const char*>(p.x) + done * p.x_stride[0] * int64_t(type.size());
    part.out = static_cast<char*>(p.out) + done * int64_t(p.n_rows) * int64_t(type.size());
    if (!run_matvec(part, 2, type, inputs, out, stream())) break;
  }
  if (done >= p.n_inputs) return;

  static OnceMap<std::array<int, 2>, Kernel> kernels;
  const Kernel kernel = kernels.get({type_code(type), device}, [&] {
    return load_kernel(compile("ternary_matmul.cu", {{"TYPE", type_code(type)}}, true, device), "ternary_matmul", 0,
                       32 * kQ1Warps, device);
  });
  auto& encoder = mx::cu::get_command_encoder(stream());
  depend_on(encoder, inputs);
  encoder.set_output_array(out);
  void* arguments[] = {&p};
  const unsigned blocks = (p.n_rows + kQ1Warps - 1) / kQ1Warps, inputs_y = (p.n_inputs + kTernaryInputs - 1) / kTernaryInputs;
  add_kernel(encoder, "ternary_matmul", kernel, {blocks, inputs_y, 1}, 32 * kQ1Warps, 0, arguments, inputs);
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
  const int n_groups = inputs[1].shape(-1), units = as_int(words.n_rows * n_groups);  // of 16 threads
  const int blocks = (units + 2 * kQ1Warps - 1) / (2 * kQ1Warps);
  run_allocating("q1_dequantize", find_binary(cuda::kQ1Dequantize, out.dtype(), device), inputs, outputs,
                 {as_int(words.n_rows), n_groups, as_int(words.row_stride), as_int(words.stride), as_int(halves.row_stride),
                  as_int(halves.stride)},
                 blocks, 32 * kQ1Warps, stream());
}

}  // namespace tqext
