#include "runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "binary_cache.h"
#include "gpu_memory.h"
#include "log.h"
#include "mlx/allocator.h"
#include "mlx/fast.h"
#include "mlx/memory.h"
#include "mlx/primitives.h"
#include "mlx_compat.h"
#include "once_map.h"
#include "params.h"
#include "pipelines.h"
#include "sources.h"
#include "workspace_sizes.h"

namespace tqext::cuda {

namespace {

// ---- The driver and the run-time compiler, which libmlx.so has loaded ----

using CUdevice = int;
using CUdeviceptr = unsigned long long;
struct Driver {
  int (*get_error_string)(int, const char**);
  int (*device_get)(CUdevice*, int);
  int (*device_get_attribute)(int*, int, CUdevice);
  int (*module_load_data)(void**, const void*);
  int (*module_unload)(void*);
  int (*module_get_function)(CUfunc_st**, void*, const char*);
  int (*func_set_attribute)(CUfunc_st*, int, int);
  int (*occupancy)(int*, CUfunc_st*, int, size_t);
  int (*mem_alloc)(CUdeviceptr*, size_t);
  int (*mem_alloc_async)(CUdeviceptr*, size_t, void*);
  int (*mem_free)(CUdeviceptr);
  int (*memset_d8)(CUdeviceptr, unsigned char, size_t);
  int (*stream_synchronize)(void*);
  int (*context_synchronize)();
};

enum : int {  // cuda.h
  kAttributeMultiprocessors = 16,
  kAttributeMajor = 75,
  kAttributeMinor = 76,
  kAttributeSharedMemory = 97,  // that a block can opt in to
  kAttributeMemoryPools = 115,
  kFunctionMaxDynamicShared = 8,
};

void* open_library(const char* name) {
  void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
  if (!library) library = dlopen(name, RTLD_NOW);
  if (!library) throw std::runtime_error(std::string("[tqext] cannot load ") + name + ": " + dlerror());
  return library;
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("[tqext] missing function ") + name);
}

const Driver& driver() {
  static const Driver functions = [] {
    void* library = open_library("libcuda.so.1");
    Driver d;
    find(library, "cuGetErrorString", d.get_error_string);
    find(library, "cuDeviceGet", d.device_get);
    find(library, "cuDeviceGetAttribute", d.device_get_attribute);
    find(library, "cuModuleLoadData", d.module_load_data);
    find(library, "cuModuleUnload", d.module_unload);
    find(library, "cuModuleGetFunction", d.module_get_function);
    find(library, "cuFuncSetAttribute", d.func_set_attribute);
    find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", d.occupancy);
    find(library, "cuMemAlloc_v2", d.mem_alloc);
    find(library, "cuMemAllocAsync", d.mem_alloc_async);
    find(library, "cuMemFree_v2", d.mem_free);
    find(library, "cuMemsetD8_v2", d.memset_d8);
    find(library, "cuStreamSynchronize", d.stream_synchronize);
    find(library, "cuCtxSynchronize", d.context_synchronize);
    return d;
  }();
  return functions;
}

void check_driver(int result, const char* what) {
  if (result == 0) return;
  const char* text = "unknown error";
  driver().get_error_string(result, &text);
  throw std::runtime_error(std::string("[tqext] ") + what + ": " + text);
}

struct Compiler {
  int (*create)(void**, const char*, const char*, int, const char* const*, const char* const*);
  int (*destroy)(void**);
  int (*compile)(void*, int, const char* const*);
  int (*log_size)(void*, size_t*);
  int (*log)(void*, char*);
  int (*binary_size)(void*, size_t*);
  int (*binary)(void*, char*);
  int (*ptx_size)(void*, size_t*);
  int (*ptx)(void*, char*);
  int (*n_architectures)(int*);
  int (*architectures)(int*);
  int (*version)(int*, int*);
};

const Compiler& compiler() {
  static const Compiler functions = [] {
    void* library = open_library("libnvrtc.so.13");
    Compiler c;
    find(library, "nvrtcCreateProgram", c.create);
    find(library, "nvrtcDestroyProgram", c.destroy);
    find(library, "nvrtcCompileProgram", c.compile);
    find(library, "nvrtcGetProgramLogSize", c.log_size);
    find(library, "nvrtcGetProgramLog", c.log);
    find(library, "nvrtcGetCUBINSize", c.binary_size);
    find(library, "nvrtcGetCUBIN", c.binary);
    find(library, "nvrtcGetPTXSize", c.ptx_size);
    find(library, "nvrtcGetPTX", c.ptx);
    find(library, "nvrtcGetNumSupportedArchs", c.n_architectures);
    find(library, "nvrtcGetSupportedArchs", c.architectures);
    find(library, "nvrtcVersion", c.version);
    return c;
  }();
  return functions;
}

// MLX's handle of a block of device memory (mlx/backend/cuda/allocator.h): what an array's buffer points to.
struct Block {
  void* data;
  size_t size;
  int device;  // -1: managed memory
};

// Null where the device has no memory left.
void* try_allocate(size_t bytes, int device) {
  constexpr int kOutOfMemory = 2;  // cuda.h
  int pools = 0;
  check_driver(driver().device_get_attribute(&pools, kAttributeMemoryPools, device), "cuDeviceGetAttribute");
  CUdeviceptr pointer = 0;
  // From the pool that MLX frees to when it moves an array to the host.
  const int result = pools ? driver().mem_alloc_async(&pointer, bytes, nullptr) : driver().mem_alloc(&pointer, bytes);
  if (result == kOutOfMemory) return nullptr;
  check_driver(result, pools ? "cuMemAllocAsync" : "cuMemAlloc");
  if (pools) check_driver(driver().stream_synchronize(nullptr), "cuStreamSynchronize");
  return reinterpret_cast<void*>(pointer);  // NOLINT(performance-no-int-to-ptr): the driver's pointers are numbers
}

void* allocate_device_memory(size_t bytes, int device) {
  void* memory = try_allocate(bytes, device);
  if (!memory) {
    // What is kept for later, here and by MLX, may be just what is missing.
    clear_gpu_memory();
    mx::clear_cache();
    memory = try_allocate(bytes, device);
  }
  if (!memory) throw std::runtime_error("[tqext] out of device memory: expected " + std::to_string(bytes) + " free bytes");
  return memory;
}

// Free blocks by size, a power of two. Where they are more than kMostKept bytes, which no decoding step needs, and none of them
// has the size that is asked for, they are freed.
class Pool {
 public:
  Block* take(size_t bytes, int device) {
    size_t size = 512;
    while (size < bytes) size *= 2;
    {
      std::lock_guard lock(mutex_);
      auto& blocks = free_[{device, size}];
      if (!blocks.empty()) {
        Block* block = blocks.back();
        blocks.pop_back();
        kept_ -= block->size;
        return block;
      }
    }
    if (n_kept() > kMostKept) clear();
    return new Block{allocate_device_memory(size, device), size, device};
  }
  void give_back(Block* block) {
    if (block->device < 0) {  // MLX moved it to managed memory for the host, and has waited for that
      release(block);
      return;
    }
    std::lock_guard lock(mutex_);
    free_[{block->device, block->size}].push_back(block);
    kept_ += block->size;
  }
  // Returns the number of bytes freed; 0 where the device cannot be waited for.
  size_t clear() {
    std::map<std::pair<int, size_t>, std::vector<Block*>> blocks;
    size_t bytes = 0;
    {
      std::lock_guard lock(mutex_);
      // A kernel may be writing to an array that its owner has dropped.
      if (kept_ == 0 || driver().context_synchronize() != 0) return 0;
      std::swap(blocks, free_);
      std::swap(bytes, kept_);
    }
    for (const auto& [key, list] : blocks) {
      for (Block* block : list) release(block);
    }
    return bytes;
  }

 private:
  static constexpr size_t kMostKept = size_t(256) << 20;
  size_t n_kept() {
    std::lock_guard lock(mutex_);
    return kept_;
  }
  static void release(Block* block) {
    driver().mem_free(reinterpret_cast<CUdeviceptr>(block->data));
    delete block;
  }
  size_t kept_ = 0;
  std::mutex mutex_;
  std::map<std::pair<int, size_t>, std::vector<Block*>> free_;
};

Pool& pool() {
  static auto* pool = new Pool;  // leaked: arrays may be freed after static objects are
  return *pool;
}

}  // namespace

void check_backend(const char* op) {
  if (!kHasCudaEncoder) {
    throw std::runtime_error(std::string("[") + op +
                             "] stream: expected a CPU stream, got a GPU stream; on CUDA tqext needs mlx 0.32.4 or later");
  }
  static const bool available = mx::cu::is_available() && &mx::cu::get_command_encoder;
  if (!available) {
    throw std::runtime_error(std::string("[") + op +
                             "] stream: expected a CPU stream, got a GPU stream; the installed MLX has no CUDA backend");
  }
}

const DeviceInfo& device_info(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> infos;
  std::lock_guard lock(mutex);
  auto found = infos.find(device);
  if (found == infos.end()) {
    CUdevice handle;
    int major, minor, count, shared;
    check_driver(driver().device_get(&handle, device), "cuDeviceGet");
    check_driver(driver().device_get_attribute(&major, kAttributeMajor, handle), "cuDeviceGetAttribute");
    check_driver(driver().device_get_attribute(&minor, kAttributeMinor, handle), "cuDeviceGetAttribute");
    check_driver(driver().device_get_attribute(&count, kAttributeMultiprocessors, handle), "cuDeviceGetAttribute");
    check_driver(driver().device_get_attribute(&shared, kAttributeSharedMemory, handle), "cuDeviceGetAttribute");
    if (major < 8) {
      throw std::runtime_error("[tqext] device: expected compute capability 8.0 or later, got " + std::to_string(major) + "." +
                               std::to_string(minor));
    }
    found = infos.emplace(device, DeviceInfo{10 * major + minor, count, shared}).first;
  }
  return found->second;
}

namespace {

bool driver_accepts(const std::string& binary) {
  void* module = nullptr;
  if (driver().module_load_data(&module, binary.data()) != 0) return false;
  driver().module_unload(module);
  return true;
}

std::string compile_source(const Compiler& c, const char* file, const char* source, const std::vector<const char*>& names,
                           const std::vector<const char*>& texts, const std::vector<const char*>& arguments, bool exact) {
  void* program = nullptr;
  if (c.create(&program, source, file, int(names.size()), texts.data(), names.data()) != 0) {
    throw std::runtime_error("[tqext] nvrtcCreateProgram failed");
  }
  const int result = c.compile(program, int(arguments.size()), arguments.data());
  size_t size = 0;
  std::string text;
  if (result != 0) {
    c.log_size(program, &size);
    text.resize(size);
    c.log(program, text.data());
    c.destroy(&program);
    throw std::runtime_error(std::string("[tqext] compiling ") + file + " failed:\n" + text);
  }
  (exact ? c.binary_size : c.ptx_size)(program, &size);
  text.resize(size);
  (exact ? c.binary : c.ptx)(program, text.data());
  c.destroy(&program);
  return text;
}

}  // namespace

std::string compile(const char* file, const std::vector<Define>& defines, bool contract, int device, bool only_here) {
  const Compiler& c = compiler();
  const int wanted = device_info(device).architecture;
  int count = 0;
  c.n_architectures(&count);
  std::vector<int> known(count);
  c.architectures(known.data());
  const bool exact = std::find(known.begin(), known.end(), wanted) != known.end();
  int architecture = 80;
  for (int x : known) {
    if (x <= wanted) architecture = std::max(architecture, x);
  }
  // A device newer than the compiler gets code that the driver translates.
  std::vector<std::string> options{
      std::string("--gpu-architecture=") + (exact ? "sm_" : "compute_") + std::to_string(architecture) + (only_here ? "a" : ""),
      "--std=c++17", "--device-as-default-execution-space"};
  if (!contract) options.push_back("--fmad=false");
  for (const Define& d : defines) options.push_back(std::string("-D") + d.name + "=" + std::to_string(d.value));
  std::vector<const char*> arguments;
  arguments.reserve(options.size());
  for (const std::string& x : options) arguments.push_back(x.c_str());

  const char* source = nullptr;
  std::vector<const char*> names, texts;
  for (const Source& s : kernel_sources()) {
    if (std::string(s.name) == file) {
      source = s.text;
    } else {
      names.push_back(s.name);
      texts.push_back(s.text);
    }
  }
  std::string key = std::string(file) + '\n' + source;
  for (const char* x : texts) key += x;
  for (const std::string& x : options) key += '\n' + x;
  int major = 0, minor = 0;
  c.version(&major, &minor);
  const BinaryCache cache(key + '\n' + std::to_string(major) + '.' + std::to_string(minor));
  return cache.read_or_make(driver_accepts, [&] { return compile_source(c, file, source, names, texts, arguments, exact); });
}

Kernel load_kernel(const std::string& binary, const char* name, int shared_bytes, int threads, int device) {
  (void)device;  // MLX has made it current
  void* module;
  Kernel kernel{nullptr, shared_bytes, 0};
  check_driver(driver().module_load_data(&module, binary.data()), "cuModuleLoadData");
  check_driver(driver().module_get_function(&kernel.function, module, name), "cuModuleGetFunction");
  check_driver(driver().func_set_attribute(kernel.function, kFunctionMaxDynamicShared, shared_bytes), "cuFuncSetAttribute");
  check_driver(driver().occupancy(&kernel.blocks_per_multiprocessor, kernel.function, threads, shared_bytes), "cuOccupancy");
  return kernel;
}

int type_code(mx::Dtype type) {
  return type == mx::float32 ? int(kTypeFloat32) : type == mx::float16 ? int(kTypeFloat16) : int(kTypeBFloat16);
}

int means_code(const mx::array* means) {
  return !means ? int(kMeansNone) : means->dtype() == mx::float16 ? int(kMeansFloat16) : int(kMeansFloat32);
}

void* device_pointer(const mx::array& x) {
  if (x.size() == 0) return nullptr;
  const auto* block = static_cast<const Block*>(const_cast<mx::array&>(x).buffer().ptr());
  return static_cast<char*>(block->data) + x.offset();
}

void allocate_output(mx::array& out, int device) {
  set_foreign_data(out, mx::allocator::Buffer(pool().take(out.nbytes(), device)),
                   [](mx::allocator::Buffer b) { pool().give_back(static_cast<Block*>(b.ptr())); });
}

namespace {

struct Workspaces {
  std::mutex mutex;
  std::map<mx::Stream, Workspace> by_stream;
};
Workspaces& workspaces() {
  // Leaked, as are outgrown ones: kernels that are not finished may use them.
  static auto* all = new Workspaces;
  return *all;
}

}  // namespace

void allocate_through_mlx(std::vector<mx::array>& outputs, const mx::array& input, mx::Stream stream) {
  static OnceMap<int, std::string> binaries;
  const int device = stream.device.index;
  const std::string& binary = binaries.get(device, [&] { return compile("reserve.cu", {}, true, device); });
  run_allocating("reserve", binary, {input}, outputs, {}, 1, 1, stream);
}

Workspace workspace(mx::Stream stream, size_t zeroed, size_t bytes) {
  std::lock_guard lock(workspaces().mutex);
  auto& by_stream = workspaces().by_stream;
  auto found = by_stream.find(stream);
  if (found == by_stream.end() || found->second.bytes < bytes || found->second.zeroed < zeroed) {
    const auto [zeros, size] = workspace_sizes(zeroed, bytes);
    const int device = stream.device.index;
    auto* block = new Block{allocate_device_memory(zeros + size, device), zeros + size, device};
    check_driver(driver().memset_d8(reinterpret_cast<CUdeviceptr>(block->data), 0, zeros), "cuMemsetD8");
    check_driver(driver().stream_synchronize(nullptr), "cuStreamSynchronize");
    const auto rows = workspace_rows(zeros, size);
    mx::array memory(mx::Shape(rows.begin(), rows.end()), mx::uint32, nullptr, {});
    set_foreign_data(memory, mx::allocator::Buffer(block), [](mx::allocator::Buffer) {});
    if (found != by_stream.end()) by_stream.erase(found);
    found = by_stream.emplace(stream, Workspace{memory, zeros, size}).first;
  }
  return found->second;
}

namespace {

// Parts of a stream's work that have been started by limit_work_ahead and are not done.
struct WorkAhead {
  std::mutex mutex;
  std::condition_variable done;
  std::map<mx::Stream, int> parts;
};
WorkAhead& work_ahead() {
  static auto* all = new WorkAhead;  // leaked: handlers may run while the process ends
  return *all;
}

}  // namespace

void limit_work_ahead(const mx::array& q, mx::Stream stream) {
  constexpr int kMostParts = 2, kFewTokens = 64;
  constexpr size_t kSmall = size_t(2) << 20;
  constexpr std::chrono::seconds kPatience{5};  // a device that has failed calls no handlers, and MLX reports it
  if (q.shape(2) < kFewTokens || q.nbytes() < kSmall) return;
  WorkAhead& ahead = work_ahead();
  auto& encoder = mx::cu::get_command_encoder(stream);
  {
    std::lock_guard lock(ahead.mutex);
    ahead.parts[stream]++;
  }
  encoder.add_completed_handler([stream, &ahead] {
    std::lock_guard lock(ahead.mutex);
    ahead.parts[stream]--;
    ahead.done.notify_all();
  });
  encoder.commit();
  std::unique_lock lock(ahead.mutex);
  ahead.done.wait_for(lock, kPatience, [&] { return ahead.parts[stream] <= kMostParts; });
}

void depend_on(mx::cu::CommandEncoder& encoder, const std::vector<mx::array>& inputs) {
  for (const mx::array& x : inputs) {
    if (x.size() > 0) encoder.set_input_array(x);
  }
}

void add_kernel(mx::cu::CommandEncoder& encoder, const char* name, const Kernel& kernel, dim3 grid, unsigned threads,
                int shared_bytes, void** arguments, const std::vector<mx::array>& inputs) {
  const KernelLog log("queued", [&] {
    return std::string(name) + " (CUDA), " + grid_of(grid.x, grid.y, grid.z, threads) + ", " + shapes_of(inputs);
  });
  encoder.add_kernel_node_raw(kernel.function, grid, {threads, 1, 1}, {1, 1, 1}, uint32_t(shared_bytes), arguments);
}

void add_counting_kernel(mx::Stream stream, const char* name, const Kernel& kernel, dim3 grid, unsigned threads,
                         int shared_bytes, void** arguments, const std::vector<mx::array>& inputs) {
  try {
    add_kernel(mx::cu::get_command_encoder(stream), name, kernel, grid, threads, shared_bytes, arguments, inputs);
  } catch (...) {
    std::lock_guard lock(workspaces().mutex);
    workspaces().by_stream.erase(stream);
    throw;
  }
}

void run_allocating(const char* name, const std::string& binary, const std::vector<mx::array>& inputs,
                    std::vector<mx::array>& outputs, const std::vector<Scalar>& scalars, int blocks, int threads,
                    mx::Stream stream) {
  const KernelLog log("queued", [&] {
    return std::string(name) + " (CUDA), " + grid_of(unsigned(blocks), 1, 1, unsigned(threads)) + ", " + shapes_of(inputs);
  });
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const mx::array& x : outputs) {
    shapes.push_back(x.shape());
    dtypes.push_back(x.dtype());
  }
  std::vector<mx::fast::ScalarArg> arguments;
  for (const Scalar& s : scalars) {
    if (s.is_float) {
      arguments.emplace_back(s.real);
    } else {
      arguments.emplace_back(int(s.integer));
    }
  }
  const auto made = mx::fast::precompiled_cuda_kernel(name, binary, inputs, shapes, dtypes, arguments, {blocks * threads, 1, 1},
                                                      {threads, 1, 1}, 0, std::nullopt, false, stream);
  made[0].primitive().eval_gpu(inputs, outputs);
}

}  // namespace tqext::cuda

namespace tqext {

size_t clear_gpu_memory() { return cuda::pool().clear(); }

std::vector<Pipeline> pipelines() { return {}; }
int prepare_pipelines(const LayerShapes&) { return 0; }

}  // namespace tqext
