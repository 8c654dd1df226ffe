#include "prompt_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_arguments.h"
#include "codebook.h"
#include "mlx/types/half_types.h"
#include "once_map.h"
#include "prompt_params.h"
#include "runtime.h"
#include "softmax.h"

namespace tqext::cuda {

namespace {

// What decides a kernel: the compile-time names of prompt_attention.cu.
struct Variant {
  int key_dim, value_dim, key_bits, value_bits;
  bool lloyd;
  int type, mask;
  int rows = 0, slots = 0, blocks = 1;
  bool warpgroups = false;
  int tiles = kTilesInBlock;

  uint64_t id() const {
    uint64_t x = key_dim / 32;
    for (int y :
         {value_dim / 32, key_bits, value_bits, int(lloyd), type, mask, rows / 16, slots, blocks, int(warpgroups), tiles}) {
      x = x * 17 + y;
    }
    return x;
  }
  int shared_bytes() const { return PromptLayout(key_dim, value_dim, rows, type, slots).total; }
  // A tile of keys and one of values, wherever they are.
  int tile_bytes() const { return 2 * PromptLayout(key_dim, value_dim, rows, type, slots).slot; }
  int threads() const { return 32 * (producer_teams(rows, type, warpgroups, tiles) * kProducerWarps + rows / 16); }
  int dim() const { return std::max(key_dim, value_dim); }

  // Products of warpgroups where the device has them and their 64 rows fit into a block's shared memory. False: no choice fits.
  bool choose(int n_rows, const DeviceInfo& device) {
    warpgroups = device.architecture == 90;
    if (choose_rows(n_rows, device)) return true;
    warpgroups = false;
    return choose_rows(n_rows, device);
  }
  // Rows and slots for n_rows query rows.
  bool choose_rows(int n_rows, const DeviceInfo& device) {
    // Registers bound the rows of large heads: accumulators of 128 rows and 256 dimensions leave no room for scores.
    const int most = dim() <= 128 ? 128 : 64, least = warpgroups ? 64 : 16;
    // With fp32 rows a tile of exact keys takes two slots, and the values before it a third.
    const int fewest = type == kTypeFloat32 ? 3 : 2;
    rows = least;
    while (rows < n_rows && rows < most) rows *= 2;
    for (; rows >= least; rows /= 2) {
      // Two blocks of 64 rows hide each other's waits.
      for (blocks = warpgroups && rows == 64 && dim() <= 128 && type != kTypeFloat32 ? 2 : 1; blocks >= 1; blocks--) {
        constexpr int kReserved = 1024;  // by the system, of each block
        const int room = (device.shared_bytes + kReserved) / blocks - kReserved;
        for (slots = kMaxPromptSlots; slots >= fewest; slots--) {
          if (shared_bytes() <= room) return true;
        }
      }
    }
    return false;
  }

  Kernel build(int device) const {
    const std::string binary = compile("prompt_attention.cu",
                                       {{"KEY_DIM", key_dim},
                                        {"VALUE_DIM", value_dim},
                                        {"KEY_BITS", key_bits},
                                        {"VALUE_BITS", value_bits},
                                        {"LLOYD", lloyd},
                                        {"ROWS", rows},
                                        {"TYPE", type},
                                        {"MASK", mask},
                                        {"SLOTS", slots},
                                        {"BLOCKS_PER_SM", blocks},
                                        {"WGMMA", warpgroups},
                                        {"TILES", tiles}},
                                       true, device, warpgroups);
    if (tiles == kTilesMade) {
      return load_kernel(binary, "prompt_tiles", tile_bytes() + PromptLayout::kAlignment, 64 * kProducerWarps, device);
    }
    return load_kernel(binary, "prompt_attention", shared_bytes(), threads(), device);
  }
};

Kernel find_kernel(const Variant& variant, int device) {
  static OnceMap<uint64_t, Kernel> kernels;
  return kernels.get(variant.id() * 64 + device, [&] { return variant.build(device); });
}

// Shares of the tiles of each row tile. Time, in tiles: the waves of blocks times a block's tiles and what it does before and
// after them; the last block of a row tile reads all shares' results.
int count_splits(int64_t row_tiles, int n_tiles, int resident_blocks, size_t result_bytes) {
  constexpr int kAround = 4, kJoin = 2, kMinTiles = 4;
  constexpr size_t kMostBytes = size_t(64) << 20;  // of results: what a call may take beside its output
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= kMaxPromptSplits; splits++) {
    if (splits > 1 && (splits * kMinTiles > n_tiles || splits * result_bytes > kMostBytes)) break;
    const int64_t waves = (row_tiles * splits + resident_blocks - 1) / resident_blocks;
    const int64_t tiles = (n_tiles + splits - 1) / splits;  // of a block
    const double time = double(waves) * double(tiles + kAround) + (splits > 1 ? splits + kJoin : 0);
    if (splits == 1 || time < least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

// Of how many heads at once tiles are decoded before they are multiplied; 0: by the blocks that multiply them. Worth it where
// many row tiles read them and the blocks of so many heads fill the device.
int decoded_heads(int n_heads, int row_tiles, size_t head_bytes, int n_multiprocessors) {
  constexpr size_t kMostBytes = size_t(144) << 20;
  constexpr int kFewTiles = 8;
  if (row_tiles < kFewTiles) return 0;
  for (int heads = 1; heads <= n_heads && heads * head_bytes <= kMostBytes; heads++) {
    const int blocks = heads * row_tiles, places = (blocks + n_multiprocessors - 1) / n_multiprocessors * n_multiprocessors;
    if (n_heads % heads == 0 && 10 * blocks >= 9 * places) return heads;
  }
  return 0;
}

// Rows of elements next to each other that start at multiples of `bytes`.
bool rows_aligned(const mx::array& x, int bytes) {
  if (x.strides(3) != 1 && x.shape(3) != 1) return false;
  bool aligned = reinterpret_cast<uintptr_t>(device_pointer(x)) % bytes == 0;
  for (int axis = 0; axis < 3; axis++) {
    aligned = aligned && (x.strides(axis) * int64_t(x.itemsize()) % bytes == 0 || x.shape(axis) == 1);
  }
  return aligned;
}

// The largest power of two up to 16 that divides.
int alignment_of(int row_bytes) {
  int bytes = 16;
  while (row_bytes % bytes) bytes /= 2;
  return bytes;
}

}  // namespace

void pack_half_levels(const Codebook& book, uint32_t (&words)[4]) {
  uint8_t bytes[16] = {};
  for (int i = 0; i < book.n_levels; i++) {
    if (book.bits == 4) {
      bytes[i] = uint8_t(book.levels[i] + 128);
    } else {
      const mx::float16_t half = float(book.levels[i]) / 128;
      uint16_t bits;
      std::memcpy(&bits, &half, sizeof bits);
      bytes[i] = uint8_t(bits >> 8);
      bytes[8 + i] = uint8_t(bits);
    }
  }
  for (int i = 0; i < 16; i++) words[i / 4] |= uint32_t(bytes[i]) << (8 * (i % 4));
}

bool prompt_attention(const TurboQuantAttention::State& state, const AttentionInputs& in, const std::vector<mx::array>& inputs,
                      mx::array& out, mx::Stream stream) {
  const int device = stream.device.index;
  const mx::array& q = in.q;
  PromptParams p{};
  set_inputs(p, state, in);
  p.sign = float((state.scale > 0) - (state.scale < 0));
  p.scale = state.scale == 0 ? 1.0f : std::abs(state.scale) * kLog2e;

  const int n_rows = p.n_repeats * p.n_queries;
  Variant variant{.key_dim = padded_dim(p.head_dim),
                  .value_dim = padded_dim(p.value_dim),
                  .key_bits = state.key_bits,
                  .value_bits = state.value_bits,
                  .lloyd = state.value_coding == kValueLloyd,
                  .type = type_code(q.dtype()),
                  .mask = mask_code(in.mask)};
  if (!variant.choose(n_rows, device_info(device))) return false;
  const int n_heads = q.shape(0) * p.n_kv_heads, row_tiles = (n_rows + variant.rows - 1) / variant.rows;
  auto tiles_of = [](int n_tokens) { return (n_tokens + kPromptTile - 1) / kPromptTile; };
  const int n_tiles = tiles_of(p.n_first + p.n_tail) + tiles_of(p.n_coded);
  const int n_multiprocessors = device_info(device).n_multiprocessors;
  // Each row attends to all coded tokens: what none attends to must not be read.
  int together = 0;
  if (variant.warpgroups && variant.rows == 128 && variant.type != kTypeFloat32 && !in.left_padding && !in.lengths &&
      (!p.causal || p.n_tail >= p.n_queries)) {
    together = decoded_heads(n_heads, row_tiles, size_t(n_tiles) * variant.tile_bytes(), n_multiprocessors);
  }
  if (together > 0) variant.tiles = kTilesCopied;
  const Kernel kernel = find_kernel(variant, device);

  p.wide_keys = rows_aligned(in.key_codes, alignment_of(4 * code_words(variant.key_dim, variant.key_bits)));
  p.wide_values = rows_aligned(in.value_codes, alignment_of(4 * code_words(variant.value_dim, variant.value_bits))) &&
                  (variant.lloyd || rows_aligned(in.value_params, 4));
  p.wide_means = p.means_kind == kMeansFloat16 && p.head_dim % 8 == 0 && rows_aligned(*in.means, 16);
  p.wide_exact = true;
  for (const mx::array* exact : {in.first_keys, in.first_values, in.tail_keys, in.tail_values}) {
    p.wide_exact = p.wide_exact && (!exact || rows_aligned(*exact, 16));
  }
  pack_half_levels(codebook(state.key_bits, variant.key_dim), p.key_levels);
  if (variant.lloyd) pack_half_levels(codebook(state.value_bits, variant.value_dim), p.value_levels);

  const int resident = n_multiprocessors * kernel.blocks_per_multiprocessor;
  const int64_t blocks = int64_t(n_heads) * row_tiles;
  const size_t result = size_t(variant.rows) * (variant.value_dim + 2) * sizeof(float);
  const int splits = together > 0 ? 1 : count_splits(blocks, n_tiles, resident, result * blocks);

  limit_work_ahead(q, stream);

  // What is large is MLX's, which counts it and gives it back; what is small costs less as this backend's own.
  constexpr size_t kSmallOutput = size_t(1) << 20, kSmallResults = size_t(1) << 22;
  const size_t result_bytes = splits > 1 ? result * blocks * splits : 0;
  std::optional<mx::array> results;
  std::vector<mx::array> large;
  if (out.nbytes() > kSmallOutput) {
    large.push_back(out);
  } else {
    allocate_output(out, device);
  }
  if (result_bytes > kSmallResults) {
    results.emplace(mx::Shape{splits, int(blocks), int(result / sizeof(float))}, mx::float32, nullptr,
                    std::vector<mx::array>{});
    large.push_back(*results);
  }
  std::optional<mx::array> tiles;
  if (together > 0) {
    tiles.emplace(mx::Shape{together, n_tiles, variant.tile_bytes()}, mx::uint8, nullptr, std::vector<mx::array>{});
    large.push_back(*tiles);
  }
  if (!large.empty()) allocate_through_mlx(large, q, stream);
  p.out = device_pointer(out);
  auto& encoder = mx::cu::get_command_encoder(stream);
  void* arguments[] = {&p};
  if (tiles) {
    Variant made = variant;
    made.tiles = kTilesMade;
    made.mask = kMaskNone;
    const Kernel make = find_kernel(made, device);
    p.tiles = static_cast<char*>(device_pointer(*tiles));
    p.n_tiles = n_tiles;
    encoder.add_completed_handler([kept = *tiles] {});  // until the kernels have run
    for (p.head0 = 0; p.head0 < n_heads; p.head0 += together) {
      // Each kernel says that it writes the tiles, which orders them.
      depend_on(encoder, inputs);
      encoder.set_output_array(*tiles);
      add_kernel(encoder, "prompt_tiles", make, {unsigned(n_tiles), unsigned(together), 1}, 64 * kProducerWarps,
                 make.shared_bytes, arguments, inputs);
      depend_on(encoder, inputs);
      encoder.set_output_array(*tiles);
      encoder.set_output_array(out);
      add_kernel(encoder, "prompt_attention", kernel, {unsigned(row_tiles), 1, unsigned(together)}, unsigned(variant.threads()),
                 kernel.shared_bytes, arguments, inputs);
    }
    return true;
  }
  depend_on(encoder, inputs);
  encoder.set_output_array(out);
  if (splits > 1) {
    const Workspace scratch = workspace(stream, sizeof(uint32_t) * blocks, results ? 0 : result_bytes);
    char* memory = static_cast<char*>(device_pointer(scratch.memory));
    p.counters = reinterpret_cast<uint32_t*>(memory);
    p.partial_out = results ? static_cast<float*>(device_pointer(*results)) : reinterpret_cast<float*>(memory + scratch.zeroed);
    p.partial_state = p.partial_out + size_t(splits) * blocks * variant.rows * variant.value_dim;
    encoder.set_output_array(scratch.memory);
    if (results) encoder.set_output_array(*results);
  }
  add_counting_kernel(stream, "prompt_attention", kernel, {unsigned(row_tiles), unsigned(splits), unsigned(n_heads)},
                      unsigned(variant.threads()), kernel.shared_bytes, arguments, inputs);
  // Until the kernel has run.
  if (results) encoder.add_completed_handler([kept = *results] {});
  return true;
}

}  // namespace tqext::cuda
