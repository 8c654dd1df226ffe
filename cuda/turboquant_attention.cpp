// eval_gpu of turboquant_attention: one launch, of the kernel for few query rows or of that for many (prompt_attention.cpp).
#include "turboquant_attention.h"

#include <algorithm>
#include <cmath>

#include "attention_arguments.h"
#include "check_arrays.h"
#include "codebook.h"
#include "latent_kernel.h"
#include "once_map.h"
#include "params.h"
#include "prompt_attention.h"
#include "runtime.h"
#include "softmax.h"

namespace tqext {

namespace {

using namespace cuda;  // NOLINT: the backend's own names

constexpr int kMaxKernelDim = 256;  // padded; beyond it a block's accumulators do not fit into registers
constexpr int kMaxGrid = 65535;     // of a grid's second and third axis

struct Variant {
  int key_dim, value_dim, key_bits, value_bits;
  bool lloyd;
  int rows, type, mask;
  bool signs, strided, listed;
  int stages = 4;  // of the copy pipeline: choose_occupancy

  int blocks = 3;  // per multiprocessor, which bounds the registers of a thread: choose_occupancy

  uint64_t id() const {
    uint64_t x = key_dim / 32;
    for (int y : {value_dim / 32, key_bits, value_bits, int(lloyd), rows, type, mask, int(signs), int(strided), int(listed)})
      x = x * 17 + y;
    return x;
  }
  AttentionLayout layout() const {
    return {key_dim, value_dim, key_bits, value_bits, lloyd, rows, type, signs, listed, stages};
  }
  // Three blocks, two with 8 columns more or dimensions beyond 128; fewer where a multiprocessor's shared memory does not hold
  // so many (100 KB on 8.6, 8.9 and 12.0): the registers are then free for more. Four stages, or three where only then the
  // blocks fit; three, four and five were as fast (H200, 64 KV heads x 32768 keys).
  void choose_occupancy(int device) {
    constexpr int kReserved = 1024;  // by the system, of each block
    for (blocks = rows == 16 || std::max(key_dim, value_dim) > 128 ? 2 : 3; blocks > 0; blocks--) {
      for (stages = 4; stages >= 3; stages--) {
        if (layout().total <= (device_info(device).shared_bytes + kReserved) / blocks - kReserved) return;
      }
    }
    blocks = 1, stages = 4;
  }
  Kernel build(int device) {
    choose_occupancy(device);
    const std::string binary = compile("turboquant_attention.cu",
                                       {{"KEY_DIM", key_dim},
                                        {"VALUE_DIM", value_dim},
                                        {"KEY_BITS", key_bits},
                                        {"VALUE_BITS", value_bits},
                                        {"LLOYD", lloyd},
                                        {"ROWS", rows},
                                        {"TYPE", type},
                                        {"MASK", mask},
                                        {"SIGNS", signs},
                                        {"STRIDED", strided},
                                        {"LISTED", listed},
                                        {"STAGES", stages},
                                        {"BLOCKS_PER_SM", blocks}},
                                       true, device);
    return load_kernel(binary, "turboquant_attention", layout().total, 32 * kAttentionWarps, device);
  }
};

Kernel find_kernel(Variant variant, int device) {
  static OnceMap<uint64_t, Kernel> kernels;
  return kernels.get(variant.id() * 64 + device, [&] { return variant.build(device); });
}

// Shares of a head's tokens, so that the blocks fill the device in whole waves.
int count_splits(int n_heads, int n_tiles, int n_exact_blocks, int resident_blocks, bool listed) {
  // A share of fewer tiles costs more in its joining than it saves (H200: 4 and 16 were slower at 8 heads x 4096 keys). Listed
  // tokens take longer to come.
  const int min_tiles = listed ? 4 : 8;
  const int most = std::clamp((n_tiles + min_tiles - 1) / min_tiles + n_exact_blocks, 1, int(kMaxSplits));
  int splits = std::clamp(resident_blocks / n_heads, 1, most);
  if (n_heads > resident_blocks) {
    double best = 0;
    for (int candidate = 1; candidate <= std::min(most, 16); candidate++) {
      const int64_t blocks = int64_t(n_heads) * candidate, waves = (blocks + resident_blocks - 1) / resident_blocks;
      const double filled = double(blocks) / double(waves * resident_blocks);
      if (filled > best + 0.05) {
        best = filled;
        splits = candidate;
      }
    }
  }
  return std::max(splits, n_exact_blocks);
}

// Tokens directly one after the other, as the bulk copies need them: of 16 bytes, or several, from a multiple of 16 on, others
// from a multiple of `unit` bytes, which the kernel reads at once.
bool rows_follow(const mx::array& x, int64_t unit) {
  if ((x.strides(3) != 1 && x.shape(3) != 1) || x.strides(2) != x.shape(3)) return false;
  const int64_t size = x.itemsize(), from = x.shape(3) * size % 16 == 0 ? 16 : unit;
  bool aligned = reinterpret_cast<uintptr_t>(device_pointer(x)) % from == 0;
  for (int axis = 0; axis < 2; axis++) aligned = aligned && (x.strides(axis) * size % from == 0 || x.shape(axis) == 1);
  return aligned;
}

// As the kernel looks levels up: with 4 bits the negative ones are lower by one.
void pack_levels(Codebook book, uint32_t (&words)[4]) {
  for (int i = 0; i < 8 && book.bits == 4; i++) book.levels[i]--;
  for (int i = 0; i < kMaxKeyLevels; i++) words[i / 4] |= uint32_t(uint8_t(book.levels[i])) << (8 * (i % 4));
}

bool can_load_eight(const mx::array& x) {
  bool can = x.strides(3) == 1 && x.shape(3) % 8 == 0 && reinterpret_cast<uintptr_t>(device_pointer(x)) % 16 == 0;
  for (int axis = 0; axis < 3; axis++) can = can && (x.strides(axis) % 8 == 0 || x.shape(axis) == 1);
  return can;
}

}  // namespace

bool gpu_has_kernel(const TurboQuantAttention::State& state, const mx::array& q) {
  // As many heads in a batch as a grid can have only come with prompts of their size.
  const bool fits = int64_t(q.shape(0)) * q.shape(1) <= kMaxGrid || (state.present >> kSigns & 1);
  if (state.latent) return state.turned;
  return fits && padded_dim(state.head_dim) <= kMaxKernelDim && padded_dim(state.value_dim) <= kMaxKernelDim;
}

void TurboQuantAttention::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("turboquant_attention");
  const int device = stream().device.index;
  if (out.size() == 0) {
    allocate_output(out, device);
    return;
  }
  const AttentionInputs in = named(inputs);
  if (state_.latent) {
    latent_attention(state_, in, inputs, out, stream());
    return;
  }
  // Residual signs are decoded by the kernel for few rows alone; it takes any number of them.
  if (!in.signs && !in.indices && !state_.lse && in.n_repeats() * in.n_queries() > kMaxFewRows &&
      prompt_attention(state_, in, inputs, out, stream()))
    return;
  allocate_output(out, device);
  AttentionParams p{};
  set_inputs(p, state_, in);
  p.scale = state_.scale * kLog2e;
  p.lse = state_.lse;

  Variant variant{padded_dim(p.head_dim),
                  padded_dim(p.value_dim),
                  state_.key_bits,
                  state_.value_bits,
                  state_.value_coding == kValueLloyd,
                  8,
                  type_code(in.q.dtype()),
                  mask_code(in.mask),
                  in.signs != nullptr,
                  false,
                  in.indices != nullptr};
  p.n_lists = in.lists_per_query() ? p.n_queries : 1;
  const int n_rows = p.n_repeats * p.n_queries / p.n_lists;
  if (n_rows <= 4) variant.rows = 4;
  if (n_rows > 8 && std::max(variant.key_dim, variant.value_dim) <= 128) variant.rows = 16;
  // Scale and bias of a group are read as one word.
  variant.strided = p.n_coded > 0 && !(rows_follow(in.key_codes, 4) && rows_follow(in.key_norms, 2) &&
                                       rows_follow(in.value_codes, 4) && rows_follow(in.value_params, variant.lloyd ? 2 : 4) &&
                                       (!in.signs || (rows_follow(*in.signs, 4) && rows_follow(*in.residual_norms, 2))));
  const Kernel kernel = find_kernel(variant, device);

  set_input(in.signs, p.signs, p.sign_stride);
  set_input(in.residual_norms, p.residual_norms, p.residual_norm_stride);
  p.means_aligned = p.means_kind == kMeansFloat16 && can_load_eight(*in.means);
  p.exact_aligned = true;
  for (const mx::array* exact : {in.first_keys, in.first_values, in.tail_keys, in.tail_values}) {
    p.exact_aligned = p.exact_aligned && (!exact || can_load_eight(*exact));
  }
  pack_levels(codebook(state_.key_bits, variant.key_dim), p.codebook);
  if (variant.lloyd) pack_levels(codebook(state_.value_bits, variant.value_dim), p.value_codebook);
  p.two_16 = 1u << 16;
  p.two_up = state_.value_bits == 2 ? 1u << 22 : 1u << 24;
  p.out = device_pointer(out);

  if (in.indices) {
    p.indices = static_cast<const int32_t*>(device_pointer(*in.indices));
    for (int axis = 0; axis < 4; axis++) p.index_stride[axis] = in.indices->shape(axis) == 1 ? 0 : in.indices->strides(axis);
    p.n_listed = p.n_coded > 0 ? in.indices->shape(3) : 0;
  }
  p.row_tiles = (n_rows + variant.rows - 1) / variant.rows;
  const int n_heads = in.batch() * p.n_kv_heads, row_tiles = p.row_tiles * p.n_lists;
  check(n_heads <= kMaxGrid && row_tiles <= kMaxGrid, "[turboquant_attention] q: expected at most ", int(kMaxGrid),
        " KV heads in all sequences and tiles of query rows on CUDA, got ", n_heads, " and ", row_tiles);
  const int n_tiles = ((in.indices ? p.n_listed : p.n_coded) + kTileTokens - 1) / kTileTokens;
  const int resident = device_info(device).n_multiprocessors * kernel.blocks_per_multiprocessor;
  // Eight exact tokens for each warp, more where that would be too many blocks: every list has its own.
  const int n_exact = p.n_first + p.n_tail, exact_steps = (n_exact + kExactStep - 1) / kExactStep;
  const int most_exact =
      p.n_lists > 1 ? std::clamp(resident / (n_heads * row_tiles), 1, int(kMaxExactBlocks)) : kMaxExactBlocks;
  p.exact_tokens = kExactStep * std::max(1, (exact_steps + most_exact - 1) / most_exact);
  p.n_exact_blocks = (n_exact + p.exact_tokens - 1) / p.exact_tokens;
  p.exact_tiles = 8 * p.exact_tokens / kExactStep;
  const int splits = count_splits(n_heads * row_tiles, n_tiles, p.n_exact_blocks, resident, variant.listed);
  const size_t results = size_t(n_heads) * row_tiles * (splits + p.n_exact_blocks * kAttentionWarps) * variant.rows;
  const Workspace scratch =
      workspace(stream(), sizeof(uint32_t) * n_heads * row_tiles, results * (variant.value_dim + 2) * sizeof(float));
  char* memory = static_cast<char*>(device_pointer(scratch.memory));
  p.counters = reinterpret_cast<uint32_t*>(memory);
  p.partial_out = reinterpret_cast<float*>(memory + scratch.zeroed);
  p.partial_state = p.partial_out + results * variant.value_dim;

  auto& encoder = mx::cu::get_command_encoder(stream());
  depend_on(encoder, inputs);
  encoder.set_output_array(out);
  encoder.set_output_array(scratch.memory);
  void* arguments[] = {&p};
  add_counting_kernel(stream(), "turboquant_attention", kernel, {unsigned(splits), unsigned(n_heads), unsigned(row_tiles)},
                      32 * kAttentionWarps, kernel.shared_bytes, arguments, inputs);
}

}  // namespace tqext
