#include "launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <mutex>
#include <set>
#include <stdexcept>

#include "gpu_memory.h"
#include "log.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "pipelines.h"
#include "sources.h"

namespace tqext::metal {

namespace {

// tqext.metallib beside this module, or "".
const std::string& library_path() {
  static const std::string path = [] {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void*>(&library_path), &info)) return std::string();
    const auto file = std::filesystem::path(info.dli_fname).parent_path() / "tqext.metallib";
    return std::filesystem::exists(file) ? file.string() : std::string();
  }();
  return path;
}

bool is_in_library(const std::string& kernel) {
  static const std::set<std::string> names{
#define TQ_INSTANCE(name, ...) name,
#include "instances.inc"
#undef TQ_INSTANCE
  };
  return !library_path().empty() && names.count(kernel);
}

// Every pipeline of this process. MLX's device owns them and clears none of these; found here, a launch builds no name.
struct Seen {
  struct Entry {
    mx::metal::Device* device;
    Dispatch dispatch;
    MTL::ComputePipelineState* kernel;
  };
  std::mutex mutex;
  std::vector<Entry> entries;       // some dozens at most
  std::vector<Pipeline> pipelines;  // in the order of first use
};

Seen& seen() {
  static Seen all;
  return all;
}

MTL::ComputePipelineState* pipeline(mx::metal::Device& device, const Dispatch& dispatch) {
  const std::lock_guard lock(seen().mutex);
  for (const Seen::Entry& entry : seen().entries) {
    if (entry.device == &device && entry.dispatch.same_pipeline(dispatch)) return entry.kernel;
  }
  const auto start = std::chrono::steady_clock::now();
  const std::string function = dispatch.kernel();
  MTL::Library* library =
      is_in_library(function) ? device.get_library("tqext", library_path()) : device.get_library("tqext_" + function, [&] {
        return kernel_source(dispatch.source) + dispatch.instance() + "\n";
      });
  std::string name = function;
  std::vector<uint8_t> bools(dispatch.constants.size());
  mx::metal::MTLFCList constants;
  for (size_t i = 0; i < dispatch.constants.size(); i++) {
    const Constant& constant = dispatch.constants[i];
    bools[i] = constant.value != 0;
    if (constant.is_int) {
      constants.emplace_back(&constant.value, MTL::DataType::DataTypeInt, constant.id);
    } else {
      constants.emplace_back(&bools[i], MTL::DataType::DataTypeBool, constant.id);
    }
    name += "_" + std::to_string(constant.value);
  }
  MTL::ComputePipelineState* kernel = device.get_kernel(function, library, name, constants);
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
  seen().entries.push_back({&device, dispatch, kernel});
  seen().pipelines.push_back({name, time.count(), uint32_t(kernel->maxTotalThreadsPerThreadgroup()), dispatch.threads,
                              uint32_t(kernel->threadExecutionWidth()), uint32_t(kernel->staticThreadgroupMemoryLength())});
  return kernel;
}

}  // namespace

void launch(mx::Stream stream, const Dispatch& dispatch, const std::vector<Binding>& bindings, const void* params,
            size_t params_bytes, int params_index) {
  if (dispatch.grid[0] == 0 || dispatch.grid[1] == 0 || dispatch.grid[2] == 0) return;
  const KernelLog log("queued", [&] {
    std::vector<mx::array> inputs;
    for (const Binding& binding : bindings) {
      if (!binding.is_output) inputs.push_back(*binding.array);
    }
    return dispatch.kernel() + " (Metal), " +
           grid_of(unsigned(dispatch.grid[0]), unsigned(dispatch.grid[1]), unsigned(dispatch.grid[2]),
                   unsigned(dispatch.threads)) +
           ", " + shapes_of(inputs);
  });
  auto& device = mx::metal::device(stream.device);
  MTL::ComputePipelineState* kernel = pipeline(device, dispatch);
  if (kernel->maxTotalThreadsPerThreadgroup() < dispatch.threads) {
    throw std::runtime_error("[tqext] kernel " + dispatch.kernel() + ": expected room for " + std::to_string(dispatch.threads) +
                             " threads per threadgroup, got " + std::to_string(kernel->maxTotalThreadsPerThreadgroup()));
  }
  auto& encoder = mx::metal::get_command_encoder(stream);
  encoder.set_compute_pipeline_state(kernel);
  for (const Binding& binding : bindings) {
    if (binding.is_output) {
      encoder.set_output_array(const_cast<mx::array&>(*binding.array), binding.index);
    } else {
      encoder.set_input_array(*binding.array, binding.index);
    }
  }
  encoder.set_bytes(static_cast<const uint8_t*>(params), int(params_bytes), params_index);
  for (size_t i = 0; i < dispatch.threadgroup_bytes.size(); i++) {
    encoder.set_threadgroup_memory_length(dispatch.threadgroup_bytes[i], int(i));
  }
  encoder.dispatch_threadgroups(MTL::Size(dispatch.grid[0], dispatch.grid[1], dispatch.grid[2]),
                                MTL::Size(dispatch.threads, 1, 1));
}

void prepare(mx::Stream stream, const Dispatch& dispatch) { pipeline(mx::metal::device(stream.device), dispatch); }

mx::array scratch(mx::Stream stream, const mx::Shape& shape, mx::Dtype type) {
  mx::array x(shape, type, nullptr, {});
  x.set_data(mx::allocator::malloc(x.nbytes()));
  mx::metal::get_command_encoder(stream).add_temporary(x);
  return x;
}

namespace {

mx::array copy(mx::Stream stream, const mx::array& x) {
  int shape[4] = {1, 1, 1, 1};
  int64_t strides[4] = {};
  const int ndim = int(x.ndim());
  for (int axis = 0; axis < ndim; axis++) {
    shape[4 - ndim + axis] = x.shape(axis);
    strides[4 - ndim + axis] = x.strides(axis);
  }
  mx::array out = scratch(stream, x.shape(), x.dtype());
  const EncodePlan plan =
      plan_compact(int(x.itemsize()), shape[0], shape[1], shape[2], shape[3], {strides[0], strides[1], strides[2], strides[3]});
  launch(stream, plan.dispatch, {{kEncodeIn, &x, false}, {kEncodeOut, &out, true}}, plan.params, kEncodeParams);
  return out;
}

}  // namespace

mx::array packed_input(mx::Stream stream, const mx::array& x) {
  // Two fp16 parameters are read as one word.
  const int per_word = x.shape(-1) > 1 && x.itemsize() == 2 ? 2 : 1;
  bool fits = x.shape(-1) == 1 || x.strides(-1) == 1;
  for (int axis = 0; axis < 3; axis++) fits = fits && (x.shape(axis) == 1 || x.strides(axis) % per_word == 0);
  fits = fits && (per_word == 1 || x.offset() % 4 == 0);
  return fits || x.size() == 0 ? x : copy(stream, x);
}

mx::array contiguous(mx::Stream stream, const mx::array& x) {
  return x.flags().row_contiguous || x.size() == 0 ? x : copy(stream, x);
}

int gpu_cores(mx::Stream stream) {
  switch (mx::metal::device(stream.device).get_architecture().back()) {
    case 'p':
      return 6;  // phones
    case 's':
      return 40;  // Max
    case 'd':
      return 76;  // Ultra
    default:
      return 16;  // base and Pro
  }
}

Type type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? Type::kFloat32 : dtype == mx::float16 ? Type::kFloat16 : Type::kBFloat16;
}

}  // namespace tqext::metal

namespace tqext {

size_t clear_gpu_memory() { return 0; }  // all of it is MLX's

std::vector<Pipeline> pipelines() {
  const std::lock_guard lock(metal::seen().mutex);
  return metal::seen().pipelines;
}

}  // namespace tqext
