// What is launched for an operation: kernel, grid, threadgroup memory, constants. Plain C++: the Metal host code and the
// tests on the simulated GPU use the same functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "codebook.h"
#include "format.h"
#include "params.h"
#include "q1_params.h"

namespace tqext::metal {

enum class Type : int32_t { kFloat32, kFloat16, kBFloat16 };

inline const char* metal_type(Type type) {
  return type == Type::kFloat32 ? "float" : type == Type::kFloat16 ? "half" : "bfloat";
}
inline const char* type_name(Type type) {
  return type == Type::kFloat32 ? "float32" : type == Type::kFloat16 ? "float16" : "bfloat16";
}

struct Constant {
  int id;
  bool is_int;
  int value;
};

// At most N of something, without memory of its own.
template <class T, int N>
struct Few {
  T items[N] = {};
  size_t n = 0;
  Few() = default;
  Few(std::initializer_list<T> list) {
    for (const T& x : list) items[n++] = x;
  }
  size_t size() const { return n; }
  const T* begin() const { return items; }
  const T* end() const { return items + n; }
  const T& operator[](size_t i) const { return items[i]; }
};

enum class Suffix : int32_t { kPlain, kDims, kDimsRows, kDim, kValueDim, kDimKeyBits, kDimValueBits, kDimBits, kInputs };

// A launch makes no text: names are built when a pipeline is made.
struct Dispatch {
  const char* op;
  const char* source;     // file of the kernel, without .metal
  const char* macro;      // instantiates it: MACRO("NAME", TYPE, ARGUMENTS) behind the source
  const char* type;       // in Metal's words
  const char* type_name;  // in the kernel's name; null: not there
  Suffix suffix;
  Few<int, 6> arguments;
  uint32_t grid[3];  // threadgroups
  uint32_t threads;  // per threadgroup
  Few<Constant, kNumFunctionConstants> constants;
  Few<uint32_t, 2> threadgroup_bytes;  // of threadgroup arguments 0, 1

  // Host name: "OP_TYPE_d128...".
  std::string kernel() const {
    std::string name = op;
    if (type_name) name += std::string("_") + type_name;
    auto number = [&](size_t i) { return std::to_string(arguments[i]); };
    switch (suffix) {
      case Suffix::kPlain:
        break;
      case Suffix::kDims:
      case Suffix::kDimsRows:
        name += "_d" + number(0) + "v" + number(1) + "_k" + number(2) + "v" + number(3);
        if (arguments[4] == kValueLloyd) name += "_lloyd";
        if (suffix == Suffix::kDimsRows) name += "_r" + number(5);
        break;
      case Suffix::kDim:
        name += "_d" + number(0);
        break;
      case Suffix::kValueDim:
        name += "_v" + number(0);
        break;
      case Suffix::kDimKeyBits:
        name += "_d" + number(0) + "_k" + number(1);
        break;
      case Suffix::kDimValueBits:
        name += "_d" + number(0) + "_v" + number(1);
        break;
      case Suffix::kDimBits:
        name += "_d" + number(0) + "_b" + number(1);
        break;
      case Suffix::kInputs:
        name += "_n" + number(0);
        break;
    }
    return name;
  }
  // The line that instantiates it.
  std::string instance() const {
    std::string line = std::string(macro) + "(\"" + kernel() + "\", " + type;
    for (int x : arguments) line += ", " + std::to_string(x);
    return line + ")";
  }
  // Whether the pipeline is the same.
  bool same_pipeline(const Dispatch& other) const {
    return op == other.op && type == other.type && same(arguments, other.arguments, [](int x, int y) { return x == y; }) &&
           same(constants, other.constants,
                [](const Constant& x, const Constant& y) { return x.id == y.id && x.value == y.value; });
  }

 private:
  template <class Items, class Equal>
  static bool same(const Items& a, const Items& b, Equal equal) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), equal);
  }
};

static_assert(std::is_trivially_copyable_v<Dispatch>, "no text, no memory of its own");

inline Dispatch make_dispatch(const char* op, const char* source, const char* macro, Type type, Suffix suffix,
                              Few<int, 6> arguments) {
  Dispatch d{};
  d.op = op;
  d.source = source;
  d.macro = macro;
  d.type = metal_type(type);
  d.type_name = type_name(type);
  d.suffix = suffix;
  d.arguments = arguments;
  return d;
}

inline void copy_levels(int8_t* levels, int bits, int dim) {
  const Codebook book = codebook(bits, dim);
  std::copy(book.levels, book.levels + kMaxKeyLevels, levels);
}

// As the CPU rounds it: the rotated numbers decide bytes.
inline float rotation_scale(int dim) { return 1.0f / std::sqrt(float(dim)); }

// --- turboquant_attention ---------------------------------------------------------------------------------------------

struct AttentionShape {
  Type type;
  int32_t batch, n_q_heads, n_kv_heads, n_queries, head_dim, value_dim, n_first, n_coded, n_tail;
  int32_t key_bits, value_bits, value_coding, hadamard, causal;
  int32_t means_kind, has_balance, has_residual, mask_kind, has_sinks, has_left_padding, has_lengths;
  int32_t latent;  // values are the keys
  int32_t has_indices, n_listed, n_lists;
  int32_t n_cores;  // of the GPU
  float scale;
  Strides4 q, means, first_keys, first_values, tail_keys, tail_values, mask, indices;
  Strides3 key_codes, key_norms, key_signs, residual_norms, value_codes, value_params;
  BalanceStrides balance;
};

struct AttentionPlan {
  std::vector<Dispatch> dispatches;
  AttentionParams params;
  int64_t n_part_numbers, n_state_numbers;  // fp32 scratch
};

enum : int {
  kMaxMetalDim = 256,              // padded; a lane's share of larger vectors does not fit the registers
  kSplitRows = 4,                  // rows of the split kernel: 8 heads per simdgroup spill at D = 128 (mlx pull request 4077)
  kSplitTokens = 256,              // a tile for each of its eight simdgroups
  kThreadgroupsPerCore = 4,        // occupancy saturates at 24 simdgroups per core (metal-benchmarks); one more for the tail
  kPromptThreadgroupsPerCore = 2,  // of eight simdgroups, each with most of its 128 registers
  kThreadgroupMemory = 32768,
  kQueryMemory = 16384,  // of it for the matrix kernel's queries
  kMaxRowBlocks = 8,     // of the matrix kernel: 64 rows, 256 threads
  kMatrixGroups = 4,     // simdgroups per threadgroup that the matrix kernel aims at
  kListedQueries = 16,   // a draft's; more: MLX's operations gather the tokens for the prompt kernel
  kLatentQueries = 64,   // a step's, as caches have it; a prompt's are products of matrices by MLX's own kernels
  kPromptRange = 512,    // fewest tokens of a threadgroup of the prompt kernel that are worth a rotation of its rows
};

// Whether the attention kernels take these shapes. Others are composed of MLX's own operations.
inline bool has_attention_kernel(int head_dim, int value_dim, bool hadamard) {
  const int k = padded_dim(head_dim), v = padded_dim(value_dim);
  return k <= kMaxMetalDim && v <= kMaxMetalDim && (!hadamard || (hadamard_factor(k) && hadamard_factor(v)));
}

// Whether one of them reads lists of tokens.
inline bool has_listed_kernel(int n_queries) { return n_queries <= kListedQueries; }

// The same for latents, which are keys and values.
inline bool has_latent_kernel(int head_dim, int n_queries) {
  const int dim = padded_dim(head_dim);
  return (dim == 256 || dim == 512) && n_queries <= kLatentQueries;
}

inline int divide_up(int a, int b) { return (a + b - 1) / b; }
inline int power_of_two(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// What a compiler makes of an attention kernel: clang 19 for AMD's gfx1030 with 128 registers, 3-bit keys and 3-bit Lloyd-Max
// values of one dimension, fp16, means and balance. Instructions are of simdgroups of 32 lanes, loads and stores among them,
// products of matrices not. tests/metal_sim/test_metal_registers.py compiles the kernels and compares.
struct KernelFigures {
  int dims;          // of a key and a value together
  int registers;     // that a lane would use
  int tile;          // for 32 coded tokens, by a simdgroup with all its rows
  int staged;        // to stage such a tile, by all simdgroups that share it
  int exact;         // for 32 exact tokens; in the prompt kernel by a simdgroup, else by all, with all rows of the template
  int exact_staged;  // to stage those
  int around;   // in no loop: the beginning and the end, by each simdgroup; without those for exact tokens in the split kernel
  int row;      // to prepare a query row, in the prompt kernel also to rotate its sums
  int traffic;  // bytes of threadgroup memory that a lane reads and writes in a tile
};

constexpr int kFigureDims = 3;
// For 1, 2 and 4 rows.
constexpr KernelFigures kSplitFigures[3][kFigureDims] = {{{128, 104, 830, 0, 3327, 0, 931, 157, 304},
                                                          {256, 132, 1482, 0, 5527, 0, 936, 273, 584},
                                                          {512, 207, 3017, 0, 6711, 0, 1079, 502, 1144}},
                                                         {{128, 129, 1036, 0, 4094, 0, 909, 157, 340},
                                                          {256, 146, 1863, 0, 6478, 0, 1127, 274, 644},
                                                          {512, 186, 3568, 0, 9758, 0, 1260, 502, 1252}},
                                                         {{128, 159, 1516, 0, 7132, 0, 1135, 158, 476},
                                                          {256, 175, 2843, 0, 11228, 0, 1141, 274, 892},
                                                          {512, 196, 5778, 0, 17196, 0, 1419, 502, 1724}}};
// For 8 rows.
constexpr KernelFigures kMatrixFigures[kFigureDims] = {{128, 117, 769, 434, 14320, 0, 1138, 168, 680},
                                                       {256, 154, 1215, 842, 22216, 0, 1272, 277, 1328},
                                                       {512, 191, 2182, 1636, 37656, 0, 1532, 499, 2624}};
// For blocks of 32 and 64 rows; above dimension 128 there are none of 64.
constexpr KernelFigures kPromptFigures[2][kFigureDims] = {{{128, 125, 605, 744, 743, 8768, 1359, 313, 456},
                                                           {256, 171, 910, 1400, 1075, 17536, 2057, 558, 840},
                                                           {512, 150, 1374, 2800, 1382, 35072, 2186, 892, 912}},
                                                          {{128, 118, 605, 744, 743, 8784, 1328, 313, 392},
                                                           {256, 157, 910, 1400, 1083, 17536, 1985, 558, 712},
                                                           {256, 157, 910, 1400, 1083, 17536, 1985, 558, 712}}};
// Instructions of the joining kernel: for each row, and for each part of it.
constexpr int kCombineAround = 288, kCombinePart = 51;

// A kernel's figures at other dimensions, on straight lines through those that were compiled. Registers of fewer dimensions
// than these are taken for as many: fewer of them might be below full occupancy, which nothing has compiled.
inline KernelFigures figures_at(const KernelFigures (&known)[kFigureDims], int dims) {
  const int i = dims > known[1].dims && known[2].dims > known[1].dims;
  const KernelFigures &a = known[i], &b = known[i + 1];
  KernelFigures f{};
  f.dims = dims;
  for (auto x : {&KernelFigures::registers, &KernelFigures::tile, &KernelFigures::staged, &KernelFigures::exact,
                 &KernelFigures::exact_staged, &KernelFigures::around, &KernelFigures::row, &KernelFigures::traffic}) {
    f.*x = a.*x + (b.*x - a.*x) * (dims - a.dims) / (b.dims - a.dims);
  }
  f.registers = std::max(f.registers, dims < known[0].dims ? known[0].registers : 0);
  return f;
}

// Threadgroups of a kernel that share the tokens of a KV head, for each of its row blocks.
struct Shares {
  int coded, exact;  // those of coded tokens; those that take exact ones only
  bool direct;       // one threadgroup does all and writes the result
};

// Cost of the kernels: cycles of a call, by the figures above and throughputs of philipturner/metal-benchmarks. Two
// threadgroups share the four schedulers of a core; a product of 8x8 matrices takes one of them 17 cycles. Waiting for memory
// is not in it. Not measured.
struct AttentionCost {
  static constexpr double kProduct = 17;
  static constexpr int kSchedulers = 4;
  // A lane with more registers leaves a core 12 simdgroups: an instruction takes 1.6 cycles of a scheduler instead of 1.
  static constexpr int kFullOccupancyRegisters = 104;
  static constexpr double kFewSimdgroups = 1.6;
  static constexpr double kThreadgroupBytes = 128;  // of threadgroup memory in a cycle, as other GPUs deliver; Apple's: unknown
  static constexpr double kLaunch = 6500;           // for a launch that waits for the one before: some 5 us

  int n_heads, n_cores;          // KV heads of all sequences
  int n_rows, dims, split_dims;  // of a KV head; of key and value; those that the split kernel has lanes for, powers of two
  int sharing;                   // simdgroups that share rows in the prompt kernel
  double coded, exact;           // tiles of 32 tokens

  // Simdgroups of a threadgroup that a scheduler runs.
  static double turns(int simdgroups) { return divide_up(2 * simdgroups, kSchedulers) / 2.0; }
  // Cycles of a scheduler for an instruction that is no product.
  static double slower(const KernelFigures& f) { return f.registers > kFullOccupancyRegisters ? kFewSimdgroups : 1.0; }
  static double issue(const KernelFigures& f, double instructions) { return slower(f) * instructions / kSchedulers; }
  static double traffic(const KernelFigures& f, double simdgroups) { return simdgroups * 32 * f.traffic / kThreadgroupBytes; }

  // Of core cycles per KV head that so many threadgroups share, and of joining n_parts of them.
  double time(double cycles, int n_threadgroups, bool direct, int n_parts) const {
    const double heads_per_core = double(n_heads) / n_cores;
    const double joined = kLaunch + n_rows * (kCombineAround + double(kCombinePart) * n_parts) / kSchedulers * heads_per_core;
    return cycles * std::max(heads_per_core, 1.0 / std::max(1, n_threadgroups)) + (direct ? 0.0 : joined);
  }

  // rows: of the template.
  double split_kernel(int rows, const Shares& shares) const {
    const KernelFigures f = figures_at(kSplitFigures[rows / 2], split_dims);
    const double tile = std::max(issue(f, f.tile), traffic(f, 1));
    const double start = std::max(int(shares.direct), shares.coded) * issue(f, 8.0 * f.around + rows * f.row);
    const int n = shares.coded + shares.exact;
    return time(coded * tile + exact * issue(f, f.exact) + start, n, shares.direct, n);
  }
  // row_blocks: simdgroups that share a staged tile. groups: of them in a threadgroup.
  double matrix_kernel(int row_blocks, int groups, const Shares& shares) const {
    const KernelFigures f = figures_at(kMatrixFigures, dims);
    const int n_blocks = divide_up(n_rows, 8 * row_blocks);
    const int n_products = dims / 2;
    const double multiplied = n_products * kProduct + slower(f) * (f.tile + double(f.staged) / row_blocks);
    const double tile = std::max(turns(row_blocks * groups) / groups * multiplied, traffic(f, row_blocks));
    const double start = shares.coded * issue(f, double(row_blocks) * (groups * f.around + 8 * f.row));
    const double exact_rows = divide_up(n_rows, 8) * exact * issue(f, f.exact);
    return time(n_blocks * (coded * tile + start) + exact_rows, n_blocks * (shares.coded + shares.exact), false,
                shares.coded * groups + shares.exact);
  }
  double prompt_kernel(int block_rows, const Shares& shares) const {
    const KernelFigures f = figures_at(kPromptFigures[block_rows == 64], dims);
    const int n_products = dims / 2 / sharing;
    const int n = shares.direct ? 1 : shares.coded + shares.exact;
    auto block = [&](int rows) {
      const int working = divide_up(rows, 8) * sharing;
      const double tile = turns(working) * (n_products * kProduct + slower(f) * f.tile) + issue(f, f.staged);
      const double exact_tile = turns(working) * (n_products * kProduct + slower(f) * f.exact) + issue(f, f.exact_staged);
      const double start = n * turns(block_rows / 8 * sharing) * slower(f) * (f.around + 8 * f.row);
      return coded * std::max(tile, traffic(f, working)) + exact * exact_tile + start;
    };
    const int whole = n_rows / block_rows, rest = n_rows % block_rows;
    const double cycles = whole * block(block_rows) + (rest ? block(rest) : 0.0);
    return time(cycles, divide_up(n_rows, block_rows) * n, shares.direct, n);
  }
};

// How the matrix kernel uses a threadgroup.
struct MatrixShape {
  int row_blocks, groups, group_words, query_bytes;
};

// Lists of tokens of a KV head, each for the rows of a query, or one for all rows; without lists as with one.
inline int n_lists(const AttentionShape& s) { return s.has_indices ? s.n_lists : 1; }

// n_rows: of a list.
inline MatrixShape matrix_shape(const AttentionShape& s, int k, int v, int n_rows) {
  MatrixShape m;
  const bool lloyd = s.value_coding == kValueLloyd;
  // Values of the keys' dimension and bits are decoded by the keys' table.
  const bool own_table = lloyd && (v != k || s.value_bits != s.key_bits);
  const int row_bytes = k * int(sizeof(float)) * (s.has_residual ? 2 : 1);
  m.row_blocks = std::min({(n_rows + 7) / 8, std::max(1, kQueryMemory / (8 * row_bytes)), int(kMaxRowBlocks)});
  const int tile_words = 32 * (code_words(k, s.key_bits) + code_words(v, s.value_bits) + (lloyd ? 1 : v / kGroup) + 1 +
                               (s.has_residual ? 1 + sign_words(k) : 0));
  const int mean_words = s.means_kind == kMeansNone ? 0 : kStagedBlocks * k / (s.means_kind == kMeansHalf ? 2 : 1);
  m.group_words = std::max(tile_words, mean_words) + (s.has_indices ? 32 : 0);
  m.query_bytes = 8 * m.row_blocks * row_bytes;
  // The tables and some room for the compiler.
  const int tile_room = kThreadgroupMemory - m.query_bytes - 256 * 8 * (own_table ? 2 : 1) - 512;
  m.groups = std::max(1, kMatrixGroups / m.row_blocks);
  while (m.groups > 1 && m.groups * m.group_words * 4 > tile_room) m.groups--;
  return m;
}

// Coded tokens of a KV head, and exact ones of the prompt kernel, shared out over threadgroups.
struct CodedRanges {
  int tokens, n;  // of a range; ranges
  bool direct;    // one threadgroup does all and writes the result
};

enum class AttentionKernel : int32_t { kSplit, kMatrix, kPrompt32, kPrompt64 };
enum : int { kNumAttentionKernels = 4 };
constexpr double kCloseCosts = 1.1;  // times the least one; the model is not better than that

struct AttentionChoice {
  AttentionKernel kernel;
  double cycles[kNumAttentionKernels];  // by AttentionCost; infinite for a kernel that does not take the shape
  MatrixShape matrix;
  CodedRanges split_ranges;      // also of the matrix kernel
  CodedRanges prompt_ranges[2];  // for blocks of 32 and 64 rows

  int prompt_rows() const { return kernel == AttentionKernel::kPrompt32 ? 32 : kernel == AttentionKernel::kPrompt64 ? 64 : 0; }
};

// Rows of the split kernel's template.
inline int split_rows(int n_rows) { return n_rows <= 2 ? n_rows : int(kSplitRows); }

// The kernel that costs least. Of those whose costs are close, the one that reads the packed bytes in fewer passes.
inline AttentionChoice choose_attention(const AttentionShape& s) {
  const int k = padded_dim(s.head_dim), v = padded_dim(s.value_dim), heads = s.batch * s.n_kv_heads;
  const int n_rows = s.n_q_heads / s.n_kv_heads * s.n_queries, n_exact = s.n_first + s.n_tail;
  AttentionChoice c{};
  const int wanted = std::max(1, divide_up(kThreadgroupsPerCore * s.n_cores, heads * n_lists(s)));
  const int n_coded = s.has_indices ? s.n_listed : s.n_coded;
  const int tiles = divide_up(n_coded, kSplitTokens), tiles_per_range = std::max(1, divide_up(tiles, wanted));
  c.split_ranges = {tiles_per_range * kSplitTokens, divide_up(tiles, tiles_per_range), false};
  c.split_ranges.direct = c.split_ranges.n <= 1 && n_exact <= kExactTokens;
  for (int wide : {0, 1}) {
    // Ranges of coded tokens and of exact ones, equally long, where the row blocks alone do not fill the GPU.
    const int row_blocks = std::max(1, heads * divide_up(n_rows, wide ? 64 : 32));
    const int n_ranges = std::max(1, kPromptThreadgroupsPerCore * s.n_cores / row_blocks);
    const int tokens =
        std::max<int>(kPromptRange, divide_up(divide_up(s.n_coded + n_exact, n_ranges), kBlockTokens) * kBlockTokens);
    c.prompt_ranges[wide] = {tokens, divide_up(s.n_coded, tokens), s.n_coded + n_exact <= tokens};
  }
  c.matrix = matrix_shape(s, k, v, n_rows / n_lists(s));
  if (s.has_indices) {  // the one kernel that copies bytes of tokens before it decodes them
    c.kernel = AttentionKernel::kMatrix;
    return c;
  }

  const AttentionCost cost{heads,
                           s.n_cores,
                           n_rows,
                           k + v,
                           32 * (power_of_two(k / 32) + power_of_two(v / 32)),
                           std::max(k, v) > kPromptDim ? 2 : 1,
                           s.n_coded / 32.0,
                           n_exact / 32.0};
  const Shares shares{c.split_ranges.n, divide_up(n_exact, kExactRange), c.split_ranges.direct};
  auto prompt = [&](int rows) {
    const CodedRanges& r = c.prompt_ranges[rows == 64];
    return cost.prompt_kernel(rows, {r.n, divide_up(n_exact, r.tokens), r.direct});
  };
  std::fill(c.cycles, c.cycles + kNumAttentionKernels, std::numeric_limits<double>::infinity());
  auto cycles = [&](AttentionKernel kernel) -> double& { return c.cycles[int(kernel)]; };
  if (n_rows <= kSplitRows) cycles(AttentionKernel::kSplit) = cost.split_kernel(split_rows(n_rows), shares);
  cycles(AttentionKernel::kMatrix) = cost.matrix_kernel(c.matrix.row_blocks, c.matrix.groups, shares);
  cycles(AttentionKernel::kPrompt32) = prompt(32);
  if (std::max(k, v) <= kPromptDim) cycles(AttentionKernel::kPrompt64) = prompt(64);
  // How often each packed byte is read.
  const int passes[kNumAttentionKernels] = {1, divide_up(n_rows, 8 * c.matrix.row_blocks), divide_up(n_rows, 32),
                                            divide_up(n_rows, 64)};
  const double least = *std::min_element(c.cycles, c.cycles + kNumAttentionKernels);
  int best = -1;
  for (int i = 0; i < kNumAttentionKernels; i++) {
    if (c.cycles[i] > kCloseCosts * least) continue;
    const bool fewer = best < 0 || passes[i] < passes[best];
    if (fewer || (passes[i] == passes[best] && c.cycles[i] < c.cycles[best])) best = i;
  }
  c.kernel = AttentionKernel(best);
  return c;
}

// What a call's kernels are told, but for how its tokens are shared out.
inline AttentionParams attention_params(const AttentionShape& s) {
  const int k = padded_dim(s.head_dim), v = padded_dim(s.value_dim);
  AttentionParams p{};
  p.q = s.q;
  p.means = s.means;
  p.first_keys = s.first_keys;
  p.first_values = s.first_values;
  p.tail_keys = s.tail_keys;
  p.tail_values = s.tail_values;
  p.mask = s.mask;
  p.indices = s.indices;
  p.n_listed = s.n_listed;
  p.n_lists = n_lists(s);
  p.key_codes = s.key_codes;
  p.key_norms = s.key_norms;
  p.key_signs = s.key_signs;
  p.residual_norms = s.residual_norms;
  p.value_codes = s.value_codes;
  p.value_params = s.value_params;
  p.balance = s.balance;
  p.n_kv_heads = s.n_kv_heads;
  p.n_queries = s.n_queries;
  p.n_rows = s.n_q_heads / s.n_kv_heads * s.n_queries;
  p.head_dim = s.head_dim;
  p.value_dim = s.value_dim;
  p.n_first = s.n_first;
  p.n_coded = s.n_coded;
  p.n_tail = s.n_tail;
  p.score_scale = float(s.scale * 1.4426950408889634);
  p.residual_scale = float(s.scale * 1.4426950408889634 * std::sqrt(1.5707963267948966 / k));
  p.key_rotation_scale = rotation_scale(k);
  p.value_rotation_scale = rotation_scale(v);
  copy_levels(p.codebook, s.key_bits, k);
  if (s.value_coding == kValueLloyd) copy_levels(p.value_codebook, s.value_bits, v);
  return p;
}

inline Few<Constant, kNumFunctionConstants> attention_constants(const AttentionShape& s, bool direct) {
  return {{kConstHadamard, false, s.hadamard},
          {kConstMeans, true, s.means_kind},
          {kConstBalance, false, s.has_balance},
          {kConstResidual, false, s.has_residual},
          {kConstMask, true, s.mask_kind},
          {kConstSinks, false, s.has_sinks},
          {kConstLeftPadding, false, s.has_left_padding},
          {kConstLengths, false, s.has_lengths},
          {kConstCausal, false, s.causal},
          {kConstIndices, false, s.has_indices},
          {kConstDirect, false, direct}};
}

// choice: as choose_attention() makes it; another kernel in it that takes the shape gives the same result.
inline AttentionPlan plan_attention(const AttentionShape& s, const AttentionChoice& choice) {
  const int k = padded_dim(s.head_dim), v = padded_dim(s.value_dim);
  AttentionPlan plan{};
  AttentionParams& p = plan.params;
  p = attention_params(s);

  const int heads = s.batch * s.n_kv_heads;
  const bool split = choice.kernel == AttentionKernel::kSplit;
  const int prompt_rows = choice.prompt_rows(), n_exact = s.n_first + s.n_tail;
  const MatrixShape& matrix = choice.matrix;
  const CodedRanges& ranges = prompt_rows ? choice.prompt_ranges[prompt_rows == 64] : choice.split_ranges;
  const bool direct = ranges.direct && choice.kernel != AttentionKernel::kMatrix;
  const int n_threadgroups = ranges.n;
  p.range_tokens = ranges.tokens;
  p.n_exact_ranges = direct ? n_exact > 0 : prompt_rows ? divide_up(n_exact, p.range_tokens) : divide_up(n_exact, kExactRange);

  const Few<Constant, kNumFunctionConstants> constants = attention_constants(s, direct);
  const char* source = "turboquant_attention";

  Dispatch attend;
  if (split) {
    const int rows = split_rows(p.n_rows);
    attend = make_dispatch("turboquant_attention_split", source, "TQ_SPLIT", s.type, Suffix::kDimsRows,
                           {k, v, s.key_bits, s.value_bits, s.value_coding, rows});
    attend.threads = 256;
    attend.threadgroup_bytes = {s.has_residual ? uint32_t(rows * k * sizeof(float)) : 16u};
    p.n_ranges = n_threadgroups;
    p.row_blocks = 1;
    attend.grid[0] = direct ? 1 : n_threadgroups + p.n_exact_ranges;
    attend.grid[2] = 1;
  } else if (prompt_rows) {
    attend = make_dispatch("turboquant_attention_prompt", "turboquant_prompt", "TQ_PROMPT", s.type, Suffix::kDimsRows,
                           {k, v, s.key_bits, s.value_bits, s.value_coding, prompt_rows});
    attend.threads = uint32_t(prompt_rows / 8 * 32 * (std::max(k, v) > kPromptDim ? 2 : 1));
    p.n_ranges = n_threadgroups;
    p.row_blocks = 1;
    attend.grid[0] = direct ? 1 : n_threadgroups + p.n_exact_ranges;
    attend.grid[2] = divide_up(p.n_rows, prompt_rows);
  } else {
    attend = make_dispatch("turboquant_attention_matrix", source, "TQ_MATRIX", s.type, Suffix::kDims,
                           {k, v, s.key_bits, s.value_bits, s.value_coding});
    p.row_blocks = matrix.row_blocks;
    p.group_words = matrix.group_words;
    const int groups = matrix.groups;
    attend.threads = uint32_t(32 * p.row_blocks * groups);
    // Also for exact tokens, 8 rows of numbers per thread, and for the rotation, a row per simdgroup.
    const int tile_bytes = std::max({groups * p.group_words * 4, 8 * int(attend.threads) * 4, p.row_blocks * groups * k * 4});
    attend.threadgroup_bytes = {uint32_t(matrix.query_bytes), uint32_t(tile_bytes)};
    p.n_ranges = n_threadgroups * groups;
    attend.grid[0] = n_threadgroups + p.n_exact_ranges;
    attend.grid[2] = p.n_lists * divide_up(p.n_rows / p.n_lists, 8 * p.row_blocks);
  }
  attend.grid[1] = heads;
  attend.constants = constants;
  p.n_parts = p.n_ranges + p.n_exact_ranges;
  plan.dispatches.push_back(attend);

  if (!direct) {
    Dispatch combine = make_dispatch("turboquant_attention_combine", source, "TQ_COMBINE", s.type, Suffix::kValueDim, {v});
    combine.grid[0] = p.n_rows;
    combine.grid[1] = heads;
    combine.grid[2] = 1;
    combine.threads = 32;
    combine.constants = constants;
    plan.dispatches.push_back(combine);
    plan.n_part_numbers = int64_t(heads) * p.n_parts * p.n_rows * v;
    plan.n_state_numbers = int64_t(heads) * p.n_parts * p.n_rows * 2;
  }
  return plan;
}

// Latents: 16 rows and a range of coded tokens for each threadgroup, others for exact tokens; then the parts are joined.
inline AttentionPlan plan_latent(const AttentionShape& s) {
  const int dim = padded_dim(s.head_dim), heads = s.batch * s.n_kv_heads, n_exact = s.n_first + s.n_tail;
  AttentionPlan plan{};
  AttentionParams& p = plan.params;
  p = attention_params(s);
  const int row_blocks = divide_up(p.n_rows, kLatentRows);
  // A core holds one threadgroup: its memory is filled. One more for the tail. A range's sums are worth some hundred tokens.
  const int wanted = std::max(1, kPromptThreadgroupsPerCore * s.n_cores / std::max(1, heads * row_blocks));
  p.range_tokens = std::max<int>(kPromptRange, divide_up(divide_up(s.n_coded, wanted), kBlockTokens) * kBlockTokens);
  p.n_ranges = divide_up(s.n_coded, p.range_tokens);
  p.n_exact_ranges = std::min(divide_up(n_exact, kExactRange), wanted);
  p.n_parts = p.n_ranges + p.n_exact_ranges;
  p.row_blocks = 1;
  plan.n_part_numbers = int64_t(heads) * p.n_parts * p.n_rows * dim;
  plan.n_state_numbers = int64_t(heads) * p.n_parts * p.n_rows * 2;
  const Few<Constant, kNumFunctionConstants> constants = attention_constants(s, false);

  Dispatch attend =
      make_dispatch("latent_attention", "latent_attention", "TQ_LATENT", s.type, Suffix::kDimKeyBits, {dim, s.key_bits});
  attend.grid[0] = p.n_parts;
  attend.grid[1] = heads;
  attend.grid[2] = row_blocks;
  attend.threads = 256;
  attend.constants = constants;
  Dispatch combine =
      make_dispatch("latent_attention_combine", "latent_attention", "TQ_LATENT_COMBINE", s.type, Suffix::kDim, {dim});
  combine.grid[0] = p.n_rows;
  combine.grid[1] = heads;
  combine.grid[2] = 1;
  combine.threads = 32;
  combine.constants = constants;
  if (p.n_parts > 0) plan.dispatches.push_back(attend);
  plan.dispatches.push_back(combine);
  return plan;
}

inline AttentionPlan plan_attention(const AttentionShape& s) {
  return s.latent ? plan_latent(s) : plan_attention(s, choose_attention(s));
}

// What a generation launches beside a chunk of its prompt of shape s: chunks and follow-ups of other lengths, decoding steps,
// short and long contexts. Pipelines that are compiled with the prompt do not interrupt the generation. window: in a sliding
// window that is full, one token is told where it begins, and several get a mask.
inline std::vector<Dispatch> pipelines_of_a_generation(AttentionShape s, bool has_means, bool window = false) {
  constexpr int kLong = 1 << 17;
  const int n_repeats = s.n_q_heads / s.n_kv_heads;
  std::vector<Dispatch> all;
  s.n_first = s.n_first + s.n_tail > 0 ? std::max(s.n_first, 1) : 0;
  // One token; drafts and follow-ups for the split kernel's 2 and 4 rows, for the matrix kernel, for blocks of 32 and 64 rows.
  const auto rows = [&](int n) { return std::max(2, (n + n_repeats - 1) / n_repeats); };
  for (int n_queries : {1, 2, std::max(2, kSplitRows / n_repeats), rows(8), rows(12), rows(16), rows(17), rows(24), rows(40),
                        32, 64, s.n_queries}) {
    for (int n_coded : {0, int(kBlockTokens), 512, 4096, kLong}) {
      for (int n_tail : {n_queries, n_queries + 2 * kBlockTokens}) {
        s.n_queries = n_queries;
        s.n_coded = n_coded;
        s.n_tail = n_tail;
        s.causal = n_queries > 1 && !window;
        if (window) {
          s.mask_kind = n_queries > 1 ? kMaskBool : kMaskNone;
          s.has_left_padding = n_queries == 1;
        }
        s.means_kind = !has_means || n_coded == 0 ? kMeansNone : s.hadamard ? kMeansHalf : kMeansFloat;
        for (const Dispatch& d : plan_attention(s).dispatches) {
          const bool known = std::any_of(all.begin(), all.end(), [&](const Dispatch& x) { return x.same_pipeline(d); });
          if (!known) all.push_back(d);
        }
      }
    }
  }
  return all;
}

// --- encode -----------------------------------------------------------------------------------------------------------

struct EncodeShape {
  Type type;  // of the vectors
  int32_t batch, n_heads, n_tokens, head_dim, bits;
  int32_t flags;  // EncodeFlag
  Strides4 in, means;
  Strides3 in_params;
  BalanceStrides balance;
};

struct EncodePlan {
  Dispatch dispatch;
  EncodeParams params;
};

enum : int { kEncodeSimdgroups = 4 };  // tokens per threadgroup

// Keys, and values coded as "lloyd", are dequantised from levels.
enum class EncodeOp : int32_t {
  kQuantizeKeys,
  kQuantizeValuesGroups,
  kQuantizeValuesLloyd,
  kDequantizeLevels,
  kDequantizeGroups,
  kRotate
};

inline EncodePlan plan_encode(EncodeOp op, const EncodeShape& s) {
  const int dim = padded_dim(s.head_dim);
  EncodePlan plan{};
  EncodeParams& p = plan.params;
  p.in = s.in;
  p.means = s.means;
  p.in_params = s.in_params;
  p.balance = s.balance;
  p.n_heads = s.n_heads;
  p.n_tokens = s.n_tokens;
  p.n_rows = s.batch * s.n_heads * s.n_tokens;
  p.head_dim = s.head_dim;
  p.flags = s.flags;
  p.rotation_scale = rotation_scale(dim);
  if (op == EncodeOp::kQuantizeKeys || op == EncodeOp::kQuantizeValuesLloyd || op == EncodeOp::kDequantizeLevels) {
    const Codebook book = codebook(s.bits, dim);
    copy_levels(p.codebook, s.bits, dim);
    for (int i = 0; i + 1 < book.n_levels; i++) {
      p.boundaries[i] = 0.5f * float(book.levels[i] + book.levels[i + 1]) / float(kCodebookTop) * book.scale;
    }
  }
  auto dispatch = [&](const char* name, const char* macro, Suffix suffix) {
    return make_dispatch(name, "turboquant_encode", macro, s.type, suffix, {dim, s.bits});
  };
  switch (op) {
    case EncodeOp::kQuantizeKeys:
      plan.dispatch = dispatch("quantize_keys", "TQ_QUANTIZE_KEYS", Suffix::kDimKeyBits);
      break;
    case EncodeOp::kQuantizeValuesGroups:
      plan.dispatch = dispatch("quantize_values_groups", "TQ_QUANTIZE_VALUES_GROUPS", Suffix::kDimValueBits);
      break;
    case EncodeOp::kQuantizeValuesLloyd:
      plan.dispatch = dispatch("quantize_values_lloyd", "TQ_QUANTIZE_VALUES_LLOYD", Suffix::kDimValueBits);
      break;
    case EncodeOp::kDequantizeLevels:
      plan.dispatch = dispatch("dequantize_levels", "TQ_DEQUANTIZE_LEVELS", Suffix::kDimBits);
      break;
    case EncodeOp::kDequantizeGroups:
      plan.dispatch = dispatch("dequantize_groups", "TQ_DEQUANTIZE_GROUPS", Suffix::kDimBits);
      break;
    case EncodeOp::kRotate:
      plan.dispatch = make_dispatch("rotate", "turboquant_encode", "TQ_ROTATE", s.type, Suffix::kDim, {dim});
      break;
  }
  plan.dispatch.grid[0] = uint32_t((p.n_rows + kEncodeSimdgroups - 1) / kEncodeSimdgroups);
  plan.dispatch.grid[1] = plan.dispatch.grid[2] = 1;
  plan.dispatch.threads = 32 * kEncodeSimdgroups;
  return plan;
}

// Contiguous copy of [B, H, n, last] elements of 2 or 4 bytes.
inline EncodePlan plan_compact(int item_bytes, int batch, int n_heads, int n_tokens, int last, const Strides4& strides) {
  EncodePlan plan{};
  EncodeParams& p = plan.params;
  p.in = strides;
  p.n_heads = n_heads;
  p.n_tokens = n_tokens;
  p.n_rows = batch * n_heads * n_tokens;
  p.head_dim = last;
  const bool words = item_bytes == 4;
  plan.dispatch.op = words ? "compact_uint32" : "compact_uint16";
  plan.dispatch.source = "turboquant_encode";
  plan.dispatch.macro = "TQ_COMPACT";
  plan.dispatch.type = words ? "uint" : "ushort";
  plan.dispatch.threads = 32 * kEncodeSimdgroups;
  plan.dispatch.grid[0] = uint32_t((int64_t(p.n_rows) * last + plan.dispatch.threads - 1) / plan.dispatch.threads);
  plan.dispatch.grid[1] = plan.dispatch.grid[2] = 1;
  return plan;
}

// What the generations of a layer launch, before anything is known of a prompt: s without numbers of tokens and of queries.
// token_type: of the keys and values that are encoded. window: whether the layer has a sliding window.
inline std::vector<Dispatch> pipelines_of_a_layer(AttentionShape s, bool has_means, Type token_type, bool window = false) {
  std::vector<Dispatch> all;
  auto add = [&](const Dispatch& d) {
    const bool known = std::any_of(all.begin(), all.end(), [&](const Dispatch& x) { return x.same_pipeline(d); });
    if (!known) all.push_back(d);
  };
  if (s.latent && has_latent_kernel(s.head_dim, 1)) {
    // Steps of any number of tokens, before and after the first block is coded. Scores of rotary keys come as a mask.
    s.n_queries = s.n_tail = 1;
    s.mask_kind = kMaskFloat;
    for (int n_coded : {0, int(kBlockTokens)}) {
      s.n_coded = n_coded;
      s.means_kind = has_means && n_coded > 0 ? kMeansHalf : kMeansNone;
      for (const Dispatch& d : plan_attention(s).dispatches) add(d);
    }
  } else if (!s.latent && has_attention_kernel(s.head_dim, s.value_dim, s.hadamard)) {
    // Prompts of a few tokens, and chunks of long ones.
    for (int n_queries : {16, 128, 512, 2048}) {
      s.n_queries = n_queries;
      s.n_first = s.n_coded = 0;
      s.n_tail = n_queries;
      for (const Dispatch& d : pipelines_of_a_generation(s, has_means)) add(d);
      if (!window) continue;
      for (const Dispatch& d : pipelines_of_a_generation(s, has_means, true)) add(d);
    }
  }
  EncodeShape tokens{};
  tokens.type = token_type;
  tokens.batch = tokens.n_heads = tokens.n_tokens = 1;
  tokens.head_dim = s.head_dim;
  tokens.bits = s.key_bits;
  add(plan_encode(EncodeOp::kQuantizeKeys, tokens).dispatch);
  if (s.latent) {
    // Pieces of a prompt are decoded in the type of the exact latents, those of composed attention in that of the scores, and
    // the tokens that a model's sparse attention has picked in fp32.
    for (Type type : {token_type, s.type, Type::kFloat32}) {
      tokens.type = type;
      add(plan_encode(EncodeOp::kDequantizeLevels, tokens).dispatch);
    }
    return all;
  }
  tokens.head_dim = s.value_dim;
  tokens.bits = s.value_bits;
  const bool lloyd = s.value_coding == kValueLloyd;
  add(plan_encode(lloyd ? EncodeOp::kQuantizeValuesLloyd : EncodeOp::kQuantizeValuesGroups, tokens).dispatch);
  return all;
}

// --- 1-bit and ternary weights
// ----------------------------------------------------------------------------------------------------

enum class Q1Op : int32_t { kMatmul, kQuantize, kDequantize, kTernary };

enum : int {
  kQ1VecInputs = 8,    // rows of x up to which the weight's bytes are the limit
  kQ1VecRows = 4 * 4,  // weight rows of a threadgroup: simdgroups times rows
  kQ1MatInputs = 32,
  kQ1MatRows = 8 * 16,  // of a threadgroup
  kQ1PackGroups = 4,    // groups of 128 per threadgroup
};

inline Dispatch plan_q1(Q1Op op, Type type, const Q1MatmulParams& p) {
  auto divide_up = [](int64_t a, int64_t b) { return uint32_t((a + b - 1) / b); };
  Dispatch d;
  if (op == Q1Op::kTernary) {
    const int inputs = p.n_inputs <= 2 ? p.n_inputs : p.n_inputs <= 4 ? 4 : 8, bytes = inputs <= 4 ? 4 : 2;
    d = make_dispatch("ternary_matvec", "q1_matmul", "TQ_TERNARY_MATVEC", type, Suffix::kInputs, {inputs, bytes});
    d.grid[0] = divide_up(p.n_rows, kQ1VecRows);
    d.grid[1] = divide_up(p.n_inputs, inputs);
    d.threads = 128;
  } else if (op == Q1Op::kMatmul && p.n_inputs <= kQ1VecInputs) {
    // As many bytes per lane as the registers hold with their columns of x: 32 or 64 numbers.
    const int inputs = p.n_inputs <= 2 ? p.n_inputs : p.n_inputs <= 4 ? 4 : 8, bytes = inputs <= 2 ? 4 : inputs == 4 ? 2 : 1;
    d = make_dispatch("q1_matvec", "q1_matmul", "TQ_Q1_MATVEC", type, Suffix::kInputs, {inputs, bytes});
    d.grid[0] = divide_up(p.n_rows, kQ1VecRows);
    d.grid[1] = 1;
    d.threads = 128;
  } else if (op == Q1Op::kMatmul) {
    d = make_dispatch("q1_matmul", "q1_matmul", "TQ_Q1_MATMUL", type, Suffix::kPlain, {});
    d.grid[0] = divide_up(p.n_rows, kQ1MatRows);
    d.grid[1] = divide_up(p.n_inputs, kQ1MatInputs);
    d.threads = 256;
  } else {
    const bool pack = op == Q1Op::kQuantize;
    d = make_dispatch(pack ? "q1_quantize" : "q1_dequantize", "q1_matmul", pack ? "TQ_Q1_QUANTIZE" : "TQ_Q1_DEQUANTIZE", type,
                      Suffix::kPlain, {});
    d.grid[0] = divide_up(int64_t(p.n_rows) * p.n_groups, kQ1PackGroups);
    d.grid[1] = 1;
    d.threads = 32 * kQ1PackGroups;
  }
  d.grid[2] = 1;
  return d;
}

}  // namespace tqext::metal
