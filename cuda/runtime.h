// Kernels compiled at run time and launched through MLX's command encoder, without CUDA headers or libraries at build time.
//
// MLX's own fast::cuda_kernel copies and hashes its source at every call (15 us and more); the encoder's functions, which the
// CUDA build of libmlx.so exports, take a kernel as it is. The build links against any libmlx.so: where the functions are
// missing (the CPU library) the weak symbols below are null, and no GPU stream exists that could reach them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/stream.h"

struct CUfunc_st;
struct dim3 {
  unsigned x, y, z;
};

namespace mlx::core::cu {

// The part of MLX's class that is used here (mlx/backend/cuda/device.h, which needs CUDA headers).
class CommandEncoder {
 public:
  __attribute__((weak)) void set_input_array(const array& x);
  __attribute__((weak)) void set_output_array(const array& x);
  __attribute__((weak)) void add_completed_handler(std::function<void()> handler);
  __attribute__((weak)) void add_kernel_node_raw(CUfunc_st* kernel, dim3 grid, dim3 block, dim3 cluster, uint32_t shared_bytes,
                                                 void** arguments);
  __attribute__((weak)) void commit();
};
__attribute__((weak)) CommandEncoder& get_command_encoder(Stream stream);

}  // namespace mlx::core::cu

namespace tqext::cuda {

namespace mx = mlx::core;

// Throws where MLX has no CUDA backend.
void check_backend(const char* op);

// Compute capability, 10 * major + minor, number of multiprocessors, and the shared memory that a block can have.
struct DeviceInfo {
  int architecture, n_multiprocessors, shared_bytes;
};
const DeviceInfo& device_info(int device);

// Binary of a kernel source for the device's architecture.
struct Define {
  const char* name;
  int value;
};
// only_here: with the instructions that this architecture has and later ones may not.
std::string compile(const char* file, const std::vector<Define>& defines, bool contract, int device, bool only_here = false);

struct Kernel {
  CUfunc_st* function;
  int shared_bytes, blocks_per_multiprocessor;
};
// threads: per block, for the occupancy.
Kernel load_kernel(const std::string& binary, const char* name, int shared_bytes, int threads, int device);

// TYPE and the kind of means in the kernels' terms (params.h).
int type_code(mx::Dtype type);
int means_code(const mx::array* means);

// Address of an array's first element in device memory.
void* device_pointer(const mx::array& x);

// Of the first n axes.
template <size_t n>
void copy_strides(const mx::array& x, int64_t (&to)[n]) {
  for (size_t i = 0; i < n; i++) to[i] = x.strides(int(i));
}

// Gives a small output device memory from a pool of our own: the allocator of MLX that makes device memory is not exported,
// and the exported one makes managed memory, which the GPU would have to fault in.
void allocate_output(mx::array& out, int device);

// Gives outputs device memory from MLX's allocator, by an empty kernel of MLX's own primitive: a node of the graph more than
// allocate_output. input: any array.
void allocate_through_mlx(std::vector<mx::array>& outputs, const mx::array& input, mx::Stream stream);

// Scratch of a stream, kept and grown; all kernels of the stream share it, which orders them. The first `zeroed` bytes are zero
// before every kernel, and must be after it.
struct Workspace {
  mx::array memory;
  size_t zeroed, bytes;  // bytes: behind the zeroed ones
};
Workspace workspace(mx::Stream stream, size_t zeroed, size_t bytes);

// Before the attention of a prompt's layer: starts what the stream has to do so far, and waits until all but two such parts are
// done. MLX starts a hundred kernels at once and waits after ten times as many, which is most of a model's layers: all their
// temporary arrays would be in memory together. Few query tokens have small ones, and nothing is done for them.
void limit_work_ahead(const mx::array& q, mx::Stream stream);

// Says that the next kernel reads these arrays. Of arrays without elements MLX may have none in memory.
void depend_on(mx::cu::CommandEncoder& encoder, const std::vector<mx::array>& inputs);

// Adds a kernel to the stream's work, and logs it.
void add_kernel(mx::cu::CommandEncoder& encoder, const char* name, const Kernel& kernel, dim3 grid, unsigned threads,
                int shared_bytes, void** arguments, const std::vector<mx::array>& inputs);
// The same of a kernel that uses zeroed bytes of the stream's workspace. After a launch that failed it is not known whether
// they are zero: the next kernel gets other memory.
void add_counting_kernel(mx::Stream stream, const char* name, const Kernel& kernel, dim3 grid, unsigned threads,
                         int shared_bytes, void** arguments, const std::vector<mx::array>& inputs);

// Runs a kernel whose outputs are large, through MLX's own primitive, so that its allocator provides them. Arguments of the
// kernel: inputs, outputs, scalars.
struct Scalar {
  bool is_float;
  int32_t integer;
  float real;
  Scalar(int32_t x) : is_float(false), integer(x), real(0) {}
  Scalar(float x) : is_float(true), integer(0), real(x) {}
};
void run_allocating(const char* name, const std::string& binary, const std::vector<mx::array>& inputs,
                    std::vector<mx::array>& outputs, const std::vector<Scalar>& scalars, int blocks, int threads,
                    mx::Stream stream);

}  // namespace tqext::cuda
