// eval_gpu of quantize_keys, quantize_values, dequantize and rotate.
#include "turboquant_encode.h"

#include <stdexcept>

#include "check_arrays.h"
#include "codebook.h"
#include "once_map.h"
#include "params.h"
#include "rotate.h"
#include "runtime.h"

namespace tqext {

namespace {

using namespace cuda;  // NOLINT: the backend's own names

// What decides a kernel: the compile-time names of turboquant_encode.cu.
struct Variant {
  int operation, dim, bits, type, hadamard = 0, means = 0, balance = 0, signs = 0;
  auto operator<=>(const Variant&) const = default;
};

struct Program {
  std::string binary;
  Kernel kernel;
};

const Program& find_program(const char* name, int threads, const Variant& variant, int device) {
  static OnceMap<std::pair<Variant, int>, Program> programs;
  return programs.get({variant, device}, [&] {
    const std::string binary = compile("turboquant_encode.cu",
                                       {{"OPERATION", variant.operation},
                                        {"DIM", variant.dim},
                                        {"BITS", variant.bits},
                                        {"TYPE", variant.type},
                                        {"HADAMARD", variant.hadamard},
                                        {"MEANS", variant.means},
                                        {"BALANCE", variant.balance},
                                        {"SIGNS", variant.signs}},
                                       false, device);
    return Program{binary, load_kernel(binary, name, 0, threads, device)};
  });
}

int as_int(int64_t x) {
  if (x != int32_t(x)) throw std::runtime_error("[tqext] input: expected strides below 2^31 on CUDA, got " + std::to_string(x));
  return int(x);
}

void add_strides(std::vector<Scalar>& scalars, const mx::array& x, int n) {
  for (int axis = 0; axis < n; axis++) scalars.push_back(as_int(x.strides(axis)));
}

// Four levels in each of four scalars.
void add_levels(std::vector<Scalar>& scalars, const Codebook& book) {
  for (int i = 0; i < kMaxKeyLevels; i += 4) {
    uint32_t word = 0;
    for (int k = 0; k < 4; k++) word |= uint32_t(uint8_t(book.levels[i + k])) << (8 * k);
    scalars.push_back(int32_t(word));
  }
}

// Means (where the kernel takes any) and balance of keys, as Centre in turboquant_encode.cu takes them.
void add_centre(std::vector<Scalar>& scalars, Variant& variant, const mx::array* means, const mx::array* balance,
                bool takes_means = true) {
  variant.means = means_code(means);
  variant.balance = balance != nullptr;
  for (const auto& [x, n] : {std::pair(means, takes_means ? 4 : 0), std::pair(balance, 2)}) {
    if (x) {
      add_strides(scalars, *x, n);
    } else {
      scalars.insert(scalars.end(), n, 0);
    }
  }
}

struct Rows {
  int count, heads, tokens;
};
Rows rows_of(const mx::array& x) { return {as_int(int64_t(x.shape(0)) * x.shape(1) * x.shape(2)), x.shape(1), x.shape(2)}; }

// Arguments of the kernel: inputs, outputs, scalars.
void run_blocks(const char* name, const Variant& variant, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
                const std::vector<Scalar>& scalars, int64_t blocks, int warps, mx::Stream stream) {
  // More than that is worth the 15 us or more that MLX's own primitive takes to copy and hash the binary.
  constexpr size_t kMostPooled = size_t(4) << 20;
  const int threads = 32 * warps, device = stream.device.index;
  as_int(blocks * threads);
  const Program& program = find_program(name, threads, variant, device);
  size_t bytes = 0;
  for (const mx::array& x : outputs) bytes += x.nbytes();
  if (bytes > kMostPooled) {
    run_allocating(name, program.binary, inputs, outputs, scalars, int(blocks), threads, stream);
    return;
  }
  auto& encoder = mx::cu::get_command_encoder(stream);
  std::vector<void*> pointers, arguments;
  pointers.reserve(inputs.size() + outputs.size());
  arguments.reserve(inputs.size() + outputs.size() + scalars.size());
  depend_on(encoder, inputs);
  for (const mx::array& x : inputs) pointers.push_back(device_pointer(x));
  for (mx::array& x : outputs) {
    allocate_output(x, device);
    encoder.set_output_array(x);
    pointers.push_back(device_pointer(x));
  }
  for (void*& x : pointers) arguments.push_back(static_cast<void*>(&x));
  for (const Scalar& s : scalars) {
    arguments.push_back(s.is_float ? const_cast<float*>(&s.real) : static_cast<void*>(const_cast<int32_t*>(&s.integer)));
  }
  add_kernel(encoder, name, program.kernel, {unsigned(blocks), 1, 1}, unsigned(threads), 0, arguments.data(), inputs);
}

void run(const char* name, const Variant& variant, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
         const std::vector<Scalar>& scalars, int n_rows, mx::Stream stream) {
  run_blocks(name, variant, inputs, outputs, scalars, (int64_t(n_rows) + kEncodeWarps - 1) / kEncodeWarps, kEncodeWarps,
             stream);
}

// Outputs of no bytes.
bool allocate_empty(std::vector<mx::array>& outputs, int device) {
  if (outputs[0].size() != 0) return false;
  for (mx::array& x : outputs) allocate_output(x, device);
  return true;
}

}  // namespace

bool gpu_codes_blocks() { return true; }

void QuantizeKeys::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  check_backend("quantize_keys");
  const int device = stream().device.index;
  if (allocate_empty(outputs, device)) return;
  const mx::array& k = inputs[0];
  const int dim = padded_dim(k.shape(3));
  const Rows rows = rows_of(k);
  const bool own_means = state_.own_means;
  Variant variant{.operation = own_means ? kQuantizeBlocks : kQuantizeKeys,
                  .dim = dim,
                  .bits = state_.bits,
                  .type = type_code(k.dtype()),
                  .hadamard = state_.hadamard,
                  .signs = state_.qjl};
  std::vector<Scalar> scalars{rows.heads, rows.tokens, k.shape(3)};
  if (!own_means) scalars.insert(scalars.begin(), rows.count);
  add_strides(scalars, k, 4);
  add_centre(scalars, variant, means(inputs), balance(inputs), !own_means);
  const Codebook book = codebook(state_.bits, dim);
  add_levels(scalars, book);
  scalars.push_back(book.scale);
  if (own_means) {
    const int64_t blocks = int64_t(k.shape(0)) * k.shape(1) * n_blocks(k.shape(2));
    run_blocks("quantize_blocks", variant, inputs, outputs, scalars, blocks, kBlockWarps, stream());
    return;
  }
  run("quantize_keys", variant, inputs, outputs, scalars, rows.count, stream());
}

void QuantizeValues::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  check_backend("quantize_values");
  const int device = stream().device.index;
  if (allocate_empty(outputs, device)) return;
  const mx::array& v = inputs[0];
  const int dim = padded_dim(v.shape(3));
  const bool lloyd = state_.coding == kValueLloyd;
  const Rows rows = rows_of(v);
  std::vector<Scalar> scalars{rows.count, rows.heads, rows.tokens, v.shape(3)};
  add_strides(scalars, v, 4);
  if (lloyd) {
    const Codebook book = codebook(state_.bits, dim);
    add_levels(scalars, book);
    scalars.push_back(book.scale);
  }
  const Variant variant{.operation = lloyd ? kQuantizeValuesLloyd : kQuantizeValues,
                        .dim = dim,
                        .bits = state_.bits,
                        .type = type_code(v.dtype()),
                        .hadamard = state_.hadamard};
  run("quantize_values", variant, inputs, outputs, scalars, rows.count, stream());
}

void Dequantize::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("dequantize");
  const int device = stream().device.index;
  std::vector<mx::array> outputs{out};
  if (allocate_empty(outputs, device)) return;
  const mx::array &codes = inputs[0], &params = inputs[1];
  const int dim = padded_dim(state_.head_dim);
  const Rows rows = rows_of(codes);
  Variant variant{.operation = state_.groups ? kDequantizeGroups : kDequantizeLevels,
                  .dim = dim,
                  .bits = state_.bits,
                  .type = type_code(out.dtype()),
                  .hadamard = state_.hadamard};
  std::vector<Scalar> scalars{rows.count, rows.heads, rows.tokens, state_.head_dim};
  add_strides(scalars, codes, 4);
  add_strides(scalars, params, 4);
  add_centre(scalars, variant, means(inputs), balance(inputs));
  add_levels(scalars, codebook(state_.bits, dim));
  run("dequantize", variant, inputs, outputs, scalars, rows.count, stream());
}

void Rotate::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("rotate");
  const int device = stream().device.index;
  std::vector<mx::array> outputs{out};
  if (allocate_empty(outputs, device)) return;
  const mx::array& x = inputs[0];
  // The last four axes; those before them must follow from the first of the four.
  const int n = int(x.ndim());
  int shape[4] = {1, 1, 1, x.shape(n - 1)};
  int64_t stride[4] = {0, 0, 0, x.strides(n - 1)};
  for (int axis = 1; axis < std::min(n, 4); axis++) {
    shape[3 - axis] = x.shape(n - 1 - axis);
    stride[3 - axis] = x.strides(n - 1 - axis);
  }
  for (int axis = n - 5; axis >= 0; axis--) {
    if (x.shape(axis) != 1 && x.strides(axis) != stride[0] * shape[0]) {
      throw std::runtime_error("[rotate] x: expected at most 4 axes that do not follow each other in memory on CUDA, got " +
                               std::to_string(n));
    }
    shape[0] *= x.shape(axis);
  }
  const int count = as_int(int64_t(shape[0]) * shape[1] * shape[2]);
  std::vector<Scalar> scalars{count, shape[1], shape[2]};
  for (int64_t s : stride) scalars.push_back(as_int(s));
  const Variant variant{
      .operation = kRotate, .dim = shape[3], .bits = 1, .type = type_code(x.dtype()), .hadamard = inverse_ ? 2 : 1};
  run("rotate", variant, inputs, outputs, scalars, count, stream());
}

}  // namespace tqext
