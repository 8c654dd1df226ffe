#include "latent_kernel.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "codebook.h"
#include "latent_params.h"
#include "once_map.h"
#include "prompt_attention.h"
#include "runtime.h"

namespace tqext {

namespace cuda {

namespace {

// What decides a kernel: the compile-time names of latent_attention.cu.
struct Variant {
  int dim, bits, mask;
  int rows = 0, buffers = 0;

  // The most of n_rows rows, so that a tile is decoded for as many as can be, and two buffers of it if they fit.
  bool choose(int n_rows, const DeviceInfo& device) {
    rows = n_rows > 32 ? 64 : n_rows > 16 ? 32 : 16;
    for (; rows >= 16; rows /= 2) {
      for (buffers = 2; buffers >= 1; buffers--) {
        if (shared_bytes() <= device.shared_bytes) return true;
      }
    }
    return false;
  }
  int shared_bytes() const { return LatentLayout(dim, rows, buffers).total; }
  uint64_t id() const {
    uint64_t x = dim / 32;
    for (int y : {bits, mask, rows / 16, buffers}) x = x * 17 + y;
    return x;
  }
};

struct Kernels {
  Kernel attention, join;
};

const Kernels& find_kernels(const Variant& v, int device) {
  static OnceMap<uint64_t, Kernels> kernels;
  return kernels.get(v.id() * 64 + device, [&] {
    const std::string binary =
        compile("latent_attention.cu",
                {{"DIM", v.dim}, {"BITS", v.bits}, {"ROWS", v.rows}, {"MASK", v.mask}, {"BUFFERS", v.buffers}}, true, device);
    return Kernels{load_kernel(binary, "latent_attention", v.shared_bytes(), 32 * kLatentWarps, device),
                   load_kernel(binary, "latent_join", 0, kLatentJoinThreads, device)};
  });
}

bool rows_are_wide(const mx::array* x) {
  if (!x) return true;
  bool wide = x->strides(3) == 1 && reinterpret_cast<uintptr_t>(device_pointer(*x)) % 16 == 0;
  for (int axis = 0; axis < 3; axis++) wide = wide && (x->strides(axis) % 4 == 0 || x->shape(axis) == 1);
  return wide;
}

}  // namespace

void latent_attention(const TurboQuantAttention::State& state, const AttentionInputs& in, const std::vector<mx::array>& inputs,
                      mx::array& out, mx::Stream stream) {
  const int device = stream.device.index;
  LatentParams p{};
  p.n_kv_heads = in.n_kv_heads();
  p.n_repeats = in.n_repeats();
  p.n_queries = in.n_queries();
  p.n_first = in.n_first();
  p.n_coded = in.n_coded();
  p.n_tail = in.n_tail();
  p.causal = state.causal;
  p.scale = state.scale * float(M_LOG2E);
  const int n_rows = p.n_repeats * p.n_queries, n_heads = in.batch() * p.n_kv_heads;
  Variant variant{.dim = padded_dim(state.head_dim),
                  .bits = state.key_bits,
                  .mask = !in.mask                        ? int(kMaskNone)
                          : in.mask->dtype() == mx::bool_ ? int(kMaskBool)
                                                          : int(kMaskFloat)};
  variant.choose(n_rows, device_info(device));
  const Kernels& kernels = find_kernels(variant, device);

  p.q = static_cast<const float*>(device_pointer(in.q));
  copy_strides(in.q, p.q_stride);
  p.codes = static_cast<const uint32_t*>(device_pointer(in.key_codes));
  copy_strides(in.key_codes, p.code_stride);
  p.norms = static_cast<const uint16_t*>(device_pointer(in.key_norms));
  copy_strides(in.key_norms, p.norm_stride);
  if (in.means) {
    p.means = static_cast<const float*>(device_pointer(*in.means));
    copy_strides(*in.means, p.mean_stride);
  }
  if (in.first_keys) {
    p.first = static_cast<const float*>(device_pointer(*in.first_keys));
    copy_strides(*in.first_keys, p.first_stride);
  }
  if (in.tail_keys) {
    p.tail = static_cast<const float*>(device_pointer(*in.tail_keys));
    copy_strides(*in.tail_keys, p.tail_stride);
  }
  p.wide = rows_are_wide(in.first_keys) && rows_are_wide(in.tail_keys);
  if (in.mask) {
    p.mask = device_pointer(*in.mask);
    for (int axis = 0; axis < 4; axis++) p.mask_stride[axis] = in.mask->shape(axis) == 1 ? 0 : in.mask->strides(axis);
  }
  pack_half_levels(codebook(state.key_bits, variant.dim), p.levels);

  auto tiles_of = [](int n_tokens) { return (n_tokens + kLatentTile - 1) / kLatentTile; };
  const int n_tiles = tiles_of(p.n_first + p.n_tail) + tiles_of(p.n_coded);
  p.row_tiles = (n_rows + variant.rows - 1) / variant.rows;
  // A block of its own for each multiprocessor; what a block does before and after its tiles takes as long as two of them.
  const int blocks = n_heads * p.row_tiles;
  const int most = std::max(1, std::min(device_info(device).n_multiprocessors / blocks, n_tiles / 2));
  p.splits = std::min<int>(most, kMaxLatentSplits);

  limit_work_ahead(in.q, stream);

  constexpr size_t kSmall = size_t(1) << 20;
  const size_t results_size = size_t(blocks) * p.splits * variant.rows * (variant.dim + 2);
  mx::array results({int(blocks), p.splits, variant.rows * (variant.dim + 2)}, mx::float32, nullptr, std::vector<mx::array>{});
  std::vector<mx::array> large{results};
  if (out.nbytes() > kSmall) {
    large.push_back(out);
  } else {
    allocate_output(out, device);
  }
  allocate_through_mlx(large, in.q, stream);
  p.out = static_cast<float*>(device_pointer(out));
  p.partial_out = static_cast<float*>(device_pointer(results));
  p.partial_state = p.partial_out + results_size / (variant.dim + 2) * variant.dim;

  auto& encoder = mx::cu::get_command_encoder(stream);
  void* arguments[] = {&p};
  depend_on(encoder, inputs);
  encoder.set_output_array(results);
  add_kernel(encoder, "latent_attention", kernels.attention, {unsigned(p.splits), unsigned(p.row_tiles), unsigned(n_heads)},
             32 * kLatentWarps, kernels.attention.shared_bytes, arguments, inputs);
  encoder.set_input_array(results);
  encoder.set_output_array(out);
  add_kernel(encoder, "latent_join", kernels.join, {unsigned(n_rows), unsigned(n_heads), 1}, kLatentJoinThreads, 0, arguments,
             inputs);
  // Until the kernels have run.
  encoder.add_completed_handler([kept = results] {});
}

}  // namespace cuda

bool gpu_has_latent_kernel(int head_dim, int n_rows, int n_heads, mx::Stream stream) {
  // Above that many rows their sums take more memory than pieces of MLX's operations.
  constexpr int64_t kMostRows = int64_t(1) << 16;
  const int dim = padded_dim(head_dim);
  if ((dim != 256 && dim != 512) || int64_t(n_rows) * n_heads > kMostRows || n_heads == 0 || n_rows == 0) return false;
  return cuda::Variant{.dim = dim, .bits = 3, .mask = 0}.choose(n_rows, cuda::device_info(stream.device.index));
}

}  // namespace tqext
