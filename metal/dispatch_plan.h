// What is launched for an operation: kernel, grid, threadgroup memory, constants. Plain C++: the Metal host code and the
// tests on the simulated GPU use the same functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
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
  int32_t n_cores;  // of the GPU
  float scale;
  Strides4 q, means, first_keys, first_values, tail_keys, tail_values, mask;
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
  kPromptRange = 512,    // fewest tokens of a threadgroup of the prompt kernel that are worth a rotation of its rows
};

// Whether the attention kernels take these shapes. Others are composed of MLX's own operations.
inline bool has_attention_kernel(int head_dim, int value_dim, bool hadamard) {
  const int k = padded_dim(head_dim), v = padded_dim(value_dim);
  return k <= kMaxMetalDim && v <= kMaxMetalDim && (!hadamard || (hadamard_factor(k) && hadamard_factor(v)));
}

// Cost of the kernels for many rows: core cycles per KV head, by the operations in their loops and published throughputs. Two
// threadgroups share the four schedulers of a core; a product of 8x8 matrices takes one of them 17 cycles (metal-benchmarks).
// Instructions are per tile of 32 tokens and eight rows. Not measured.
struct AttentionCost {
  static constexpr double kProduct = 17;
  static constexpr double kScores = 110;         // masks, maxima, exponentials, weights: 8 scores a lane
  static constexpr double kMatrixOperand = 6.5;  // decoding an operand: bytes, addresses, look-ups
  static constexpr double kPromptOperand = 4;    // two halves and their conversion, weights of groups
  static constexpr double kDecode = 2.5;         // per dimension, for all rows: bytes, addresses, look-ups, stores
  static constexpr double kExact = 27.0 / 256;   // per dimension, row and exact token of the matrix kernel, no products
  static constexpr double kStage = 8;            // per dimension of exact tokens, for all rows
  static constexpr int kSchedulers = 4;

  int n_rows, dims, split;  // dims: of key and value; split: simdgroups that share rows in the prompt kernel
  double coded, exact;      // tiles

  static int divide_up(int a, int b) { return (a + b - 1) / b; }
  // Simdgroups of a threadgroup that a scheduler runs.
  static double turns(int simdgroups) { return divide_up(2 * simdgroups, kSchedulers) / 2.0; }

  // row_blocks: simdgroups that share a staged tile. groups: of them in a threadgroup.
  double matrix(int row_blocks, int groups) const {
    const double eight_rows = dims / 2 * (kProduct + kMatrixOperand) + kScores;
    const double n_blocks = divide_up(n_rows, 8 * row_blocks) * turns(row_blocks * groups) / groups;
    return n_blocks * eight_rows * coded + n_rows * kExact * dims * 32 * exact / kSchedulers;
  }
  double prompt(int block_rows) const {
    const double share = dims / 2 * (kProduct + kPromptOperand) / split + kScores;  // of a simdgroup
    double cycles = 0;
    for (int first = 0; first < n_rows; first += block_rows) {
      const int working = divide_up(std::min(block_rows, n_rows - first), 8) * split;
      cycles += turns(working) * share * (coded + exact) + dims * (kDecode * coded + kStage * exact) / kSchedulers;
    }
    return cycles;
  }
};

// How the matrix kernel uses a threadgroup.
struct MatrixShape {
  int row_blocks, groups, group_words, query_bytes;
};

inline MatrixShape matrix_shape(const AttentionShape& s, int k, int v, int n_rows, bool own_table) {
  MatrixShape m;
  const bool lloyd = s.value_coding == kValueLloyd;
  const int row_bytes = k * int(sizeof(float)) * (s.has_residual ? 2 : 1);
  m.row_blocks = std::min({(n_rows + 7) / 8, std::max(1, kQueryMemory / (8 * row_bytes)), int(kMaxRowBlocks)});
  const int tile_words = 32 * (code_words(k, s.key_bits) + code_words(v, s.value_bits) + (lloyd ? 1 : v / kGroup) + 1 +
                               (s.has_residual ? 1 + sign_words(k) : 0));
  const int mean_words = s.means_kind == kMeansNone ? 0 : kStagedBlocks * k / (s.means_kind == kMeansHalf ? 2 : 1);
  m.group_words = std::max(tile_words, mean_words);
  m.query_bytes = 8 * m.row_blocks * row_bytes;
  // The tables and some room for the compiler.
  const int tile_room = kThreadgroupMemory - m.query_bytes - 256 * 8 * (own_table ? 2 : 1) - 512;
  m.groups = std::max(1, kMatrixGroups / m.row_blocks);
  while (m.groups > 1 && m.groups * m.group_words * 4 > tile_room) m.groups--;
  return m;
}

inline AttentionPlan plan_attention(const AttentionShape& s) {
  const int k = padded_dim(s.head_dim), v = padded_dim(s.value_dim);
  AttentionPlan plan{};
  AttentionParams& p = plan.params;
  p.q = s.q;
  p.means = s.means;
  p.first_keys = s.first_keys;
  p.first_values = s.first_values;
  p.tail_keys = s.tail_keys;
  p.tail_values = s.tail_values;
  p.mask = s.mask;
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
  const bool lloyd = s.value_coding == kValueLloyd;
  if (lloyd) copy_levels(p.value_codebook, s.value_bits, v);
  // Values of the keys' dimension and bits are decoded by the keys' table.
  const bool own_table = lloyd && (v != k || s.value_bits != s.key_bits);

  const int heads = s.batch * s.n_kv_heads;
  const int wanted = std::max(1, (kThreadgroupsPerCore * s.n_cores + heads - 1) / heads);
  auto divide_up = [](int a, int b) { return (a + b - 1) / b; };
  const int tiles = divide_up(s.n_coded, kSplitTokens);
  const int tiles_per_range = std::max(1, divide_up(tiles, wanted));
  p.range_tokens = tiles_per_range * kSplitTokens;
  int n_threadgroups = divide_up(tiles, tiles_per_range);  // over the coded tokens of a KV head
  const int n_exact = s.n_first + s.n_tail;
  const bool split = p.n_rows <= kSplitRows;
  const MatrixShape matrix = matrix_shape(s, k, v, p.n_rows, own_table);
  int prompt_rows = 0;  // of a threadgroup
  if (!split) {
    const AttentionCost cost{p.n_rows, k + v, std::max(k, v) > kPromptDim ? 2 : 1, s.n_coded / 32.0, n_exact / 32.0};
    double least = cost.matrix(matrix.row_blocks, matrix.groups);
    for (int rows : {32, 64}) {
      if ((rows == 64 && std::max(k, v) > kPromptDim) || cost.prompt(rows) >= least) continue;
      least = cost.prompt(rows);
      prompt_rows = rows;
    }
  }
  bool direct = split && n_threadgroups <= 1 && n_exact <= kExactTokens;
  if (prompt_rows) {
    // Ranges of coded tokens and of exact ones, equally long, where the row blocks alone do not fill the GPU.
    const int row_blocks = heads * divide_up(p.n_rows, prompt_rows);
    const int n_ranges = std::max(1, kPromptThreadgroupsPerCore * s.n_cores / row_blocks);
    const int tokens = divide_up(s.n_coded + n_exact, n_ranges);
    p.range_tokens = std::max<int>(kPromptRange, divide_up(tokens, kBlockTokens) * kBlockTokens);
    direct = s.n_coded + n_exact <= p.range_tokens;
    n_threadgroups = divide_up(s.n_coded, p.range_tokens);
  }
  p.n_exact_ranges = direct ? n_exact > 0 : prompt_rows ? divide_up(n_exact, p.range_tokens) : divide_up(n_exact, kExactRange);

  const Few<Constant, kNumFunctionConstants> constants{{kConstHadamard, false, s.hadamard},
                                                       {kConstMeans, true, s.means_kind},
                                                       {kConstBalance, false, s.has_balance},
                                                       {kConstResidual, false, s.has_residual},
                                                       {kConstMask, true, s.mask_kind},
                                                       {kConstSinks, false, s.has_sinks},
                                                       {kConstLeftPadding, false, s.has_left_padding},
                                                       {kConstLengths, false, s.has_lengths},
                                                       {kConstCausal, false, s.causal},
                                                       {kConstDirect, false, direct}};
  const char* source = "turboquant_attention";

  Dispatch attend;
  if (split) {
    const int rows = p.n_rows <= 2 ? p.n_rows : kSplitRows;
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
    attend.grid[2] = divide_up(p.n_rows, 8 * p.row_blocks);
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

// What a generation launches beside a chunk of its prompt of shape s: chunks and follow-ups of other lengths, decoding steps,
// short and long contexts. Pipelines that are compiled with the prompt do not interrupt the generation.
inline std::vector<Dispatch> pipelines_of_a_generation(AttentionShape s, bool has_means) {
  constexpr int kLong = 1 << 17;
  const int n_repeats = s.n_q_heads / s.n_kv_heads;
  std::vector<Dispatch> all;
  s.n_first = s.n_first + s.n_tail > 0 ? std::max(s.n_first, 1) : 0;
  // One token; drafts and follow-ups for the split kernel's 2 and 4 rows, for the matrix kernel, for blocks of 32 and 64 rows.
  const auto rows = [&](int n) { return std::max(2, (n + n_repeats - 1) / n_repeats); };
  for (int n_queries : {1, 2, std::max(2, kSplitRows / n_repeats), rows(8), rows(12), rows(16), rows(17), rows(24), rows(40),
                        32, 64, s.n_queries}) {
    for (int n_coded : {0, int(kBlockTokens), kLong}) {
      for (int n_tail : {n_queries, n_queries + 2 * kBlockTokens}) {
        s.n_queries = n_queries;
        s.n_coded = n_coded;
        s.n_tail = n_tail;
        s.causal = n_queries > 1;
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
// token_type: of the keys and values that are encoded.
inline std::vector<Dispatch> pipelines_of_a_layer(AttentionShape s, bool has_means, Type token_type) {
  std::vector<Dispatch> all;
  auto add = [&](const Dispatch& d) {
    const bool known = std::any_of(all.begin(), all.end(), [&](const Dispatch& x) { return x.same_pipeline(d); });
    if (!known) all.push_back(d);
  };
  if (has_attention_kernel(s.head_dim, s.value_dim, s.hadamard)) {
    // Prompts of a few tokens, and chunks of long ones.
    for (int n_queries : {16, 128, 512, 2048}) {
      s.n_queries = n_queries;
      s.n_first = s.n_coded = 0;
      s.n_tail = n_queries;
      for (const Dispatch& d : pipelines_of_a_generation(s, has_means)) add(d);
    }
  }
  EncodeShape tokens{};
  tokens.type = token_type;
  tokens.batch = tokens.n_heads = tokens.n_tokens = 1;
  tokens.head_dim = s.head_dim;
  tokens.bits = s.key_bits;
  add(plan_encode(EncodeOp::kQuantizeKeys, tokens).dispatch);
  tokens.head_dim = s.value_dim;
  tokens.bits = s.value_bits;
  const bool lloyd = s.value_coding == kValueLloyd;
  add(plan_encode(lloyd ? EncodeOp::kQuantizeValuesLloyd : EncodeOp::kQuantizeValuesGroups, tokens).dispatch);
  return all;
}

// --- 1-bit weights ----------------------------------------------------------------------------------------------------

enum class Q1Op : int32_t { kMatmul, kQuantize, kDequantize };

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
  if (op == Q1Op::kMatmul && p.n_inputs <= kQ1VecInputs) {
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
