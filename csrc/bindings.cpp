#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "check_arrays.h"
#include "codebook.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "format.h"
#include "gpu_memory.h"
#include "history.h"
#include "latent_attention.h"
#include "pipelines.h"
#include "q1_matmul.h"
#include "q1_quantize.h"
#include "rotate.h"
#include "store_tokens.h"
#include "ternary_matmul.h"
#include "turboquant_attention.h"
#include "turboquant_encode.h"
#include "word_sum.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

namespace {

void bind_format(nb::module_& m) {
  nb::module_ format =
      m.def_submodule("format", "Packed format, version 2 (csrc/format.h): layout numbers, codebooks, random signs.");
  format.attr("VERSION") = int(tqext::kFormatVersion);
  format.attr("BLOCK") = int(tqext::kBlockTokens);
  format.attr("UNIT") = int(tqext::kUnit);
  format.attr("GROUP") = int(tqext::kGroup);
  format.attr("MIN_DIM") = int(tqext::kMinDim);
  format.attr("MAX_DIM") = int(tqext::kMaxDim);
  format.attr("DIM_STEP") = int(tqext::kDimStep);
  format.attr("CODEBOOK_TOP") = int(tqext::kCodebookTop);
  format.attr("Q1_GROUP") = int(tqext::kQ1Group);
  format.attr("TERNARY_GROUP") = int(tqext::kTernaryGroup);
  format.attr("ROTATION_SEED") = TQ_ROTATION_SEED;
  format.attr("RESIDUAL_SEED") = TQ_RESIDUAL_SEED;
  format.def("padded_dim", &tqext::padded_dim, "head_dim"_a, "Head dimension rounded up to a multiple of UNIT.");
  format.def("code_words", &tqext::code_words, "dim"_a, "bits"_a, "uint32 words of one token's codes; dim is padded.");
  format.def("sign_words", &tqext::sign_words, "dim"_a, "uint32 words of one token's residual signs; dim is padded.");
  format.def(
      "value_params",
      [](int dim, const std::string& coding) { return tqext::value_params(dim, tqext::value_coding(coding, "value_params")); },
      "dim"_a, "coding"_a = "groups", "float16 parameters of one token's value; dim is padded.");
  format.def("n_blocks", &tqext::n_blocks, "n_tokens"_a, "Blocks that `n_tokens` coded tokens fill.");
  format.def("value_shrink", &tqext::value_shrink, "bits"_a,
             "Share of a group's min-max range that the first quantisation of values spans.");
  format.def(
      "hadamard_factor", &tqext::hadamard_factor, "dim"_a,
      "1, 12, 20 or 28: order of the matrix that multiplies Sylvester's; 0 where none exists and the rotation is dense.");
  format.def("sign_word", &tqext::sign_word, "seed"_a, "i"_a, "Random signs of dimensions 32i to 32i + 31; bit 1 negates.");
  format.def(
      "codebook",
      [](int bits, int head_dim) {
        tqext::check_key_bits(bits, "codebook");
        tqext::check_head_dim(head_dim, "codebook", "head_dim");
        const tqext::Codebook book = tqext::codebook(bits, tqext::padded_dim(head_dim));
        return std::pair(std::vector<int>(book.levels, book.levels + book.n_levels), book.scale);
      },
      "bits"_a, "head_dim"_a,
      "Lloyd-Max codebook of a coordinate of a random unit vector: (levels, scale).\n\n"
      "centroid[code] = levels[code] / 127 * scale. levels are ascending int8 numbers, the outermost +-127.");
}

}  // namespace

namespace {

using OptionalArray = std::optional<mx::array>;

tqext::PackedKeys packed_keys(const mx::array& codes, const mx::array& norms, const OptionalArray& means,
                              const OptionalArray& balance, const OptionalArray& signs, const OptionalArray& residual_norms,
                              int bits, int head_dim, const std::string& rotation) {
  return {.codes = codes,
          .norms = norms,
          .means = means,
          .balance = balance,
          .signs = signs,
          .residual_norms = residual_norms,
          .bits = bits,
          .head_dim = head_dim,
          .rotation = rotation};
}

tqext::PackedValues packed_values(const mx::array& codes, const mx::array& params, int bits, int head_dim,
                                  const std::string& coding, const std::string& rotation, const char* op) {
  return {.codes = codes,
          .params = params,
          .bits = bits,
          .head_dim = head_dim,
          .coding = tqext::value_coding(coding, op),
          .rotation = rotation};
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "tqext: operators on packed keys and values as MLX primitives.";
  bind_format(m);

  m.def("rotate", &tqext::rotate, "x"_a, "inverse"_a = false, nb::kw_only(), "rotation"_a = "hadamard",
        "stream"_a = nb::none());
  m.def("block_means", &tqext::block_means, "k"_a, nb::kw_only(), "stream"_a = nb::none(),
        R"(Means of blocks of 64 tokens, as `quantize_keys` takes them: over the tokens that are finite, zero where none is.

Args:
    k (array): float32, float16 or bfloat16 ``[batch, n_kv_heads, n_tokens, head_dim]``.

Returns:
    array: float16 ``[batch, n_kv_heads, ceil(n_tokens / 64), head_dim]``.

Raises:
    ValueError: a wrong shape or dtype.

Example:
    >>> tqext.block_means(mx.ones((1, 2, 100, 64))).shape
    (1, 2, 2, 64))");
  m.def("quantize_keys", &tqext::quantize_keys, "k"_a, "bits"_a, "means"_a.none(), "balance"_a.none(), "qjl"_a, "rotation"_a,
        "stream"_a.none());
  m.def("quantize_blocks", &tqext::quantize_blocks, "k"_a, "bits"_a, "balance"_a.none(), "qjl"_a, "rotation"_a,
        "stream"_a.none(), "As `tqext.quantize_keys` with the blocks' own `block_means`: the arrays of keys, then the means.");
  m.def(
      "quantize_values",
      [](const mx::array& v, int bits, const std::string& coding, const std::string& rotation, mx::StreamOrDevice stream) {
        return tqext::quantize_values(v, bits, tqext::value_coding(coding, "quantize_values"), rotation, stream);
      },
      "v"_a, "bits"_a, "coding"_a, "rotation"_a, "stream"_a.none());
  m.def(
      "dequantize_keys",
      [](const mx::array& codes, const mx::array& norms, const OptionalArray& means, const OptionalArray& balance, int bits,
         int head_dim, const std::string& rotation, bool rotated, mx::Dtype dtype, mx::StreamOrDevice stream) {
        return tqext::dequantize_keys({.codes = codes,
                                       .norms = norms,
                                       .means = means,
                                       .balance = balance,
                                       .signs = {},
                                       .residual_norms = {},
                                       .bits = bits,
                                       .head_dim = head_dim,
                                       .rotation = rotation},
                                      rotated, dtype, stream);
      },
      "codes"_a, "norms"_a, "means"_a.none(), "balance"_a.none(), "bits"_a, "head_dim"_a, "rotation"_a, "rotated"_a, "dtype"_a,
      "stream"_a.none());
  m.def(
      "dequantize_values",
      [](const mx::array& codes, const mx::array& params, int bits, int head_dim, const std::string& coding,
         const std::string& rotation, bool rotated, mx::Dtype dtype, mx::StreamOrDevice stream) {
        return tqext::dequantize_values({.codes = codes,
                                         .params = params,
                                         .bits = bits,
                                         .head_dim = head_dim,
                                         .coding = tqext::value_coding(coding, "dequantize"),
                                         .rotation = rotation},
                                        rotated, dtype, stream);
      },
      "codes"_a, "params"_a, "bits"_a, "head_dim"_a, "coding"_a, "rotation"_a, "rotated"_a, "dtype"_a, "stream"_a.none());
  m.def(
      "turboquant_attention",
      [](const mx::array& q, const mx::array& key_codes, const mx::array& key_norms, const OptionalArray& means,
         const OptionalArray& balance, const OptionalArray& signs, const OptionalArray& residual_norms, int key_bits,
         int head_dim, const std::string& key_rotation, const mx::array& value_codes, const mx::array& value_params,
         int value_bits, int value_dim, const std::string& coding, const std::string& value_rotation,
         std::optional<float> scale, const tqext::MaskArgument& mask, const std::optional<tqext::ExactTokens>& first,
         const std::optional<tqext::ExactTokens>& tail, const OptionalArray& sinks, const OptionalArray& left_padding,
         const OptionalArray& lengths, const OptionalArray& indices, mx::StreamOrDevice stream, bool lse,
         std::optional<int64_t> composed_bytes) {
        const tqext::AttentionOptions options{.scale = scale,
                                              .mask_mode = "",
                                              .mask = {},
                                              .sinks = sinks,
                                              .left_padding = left_padding,
                                              .lengths = lengths,
                                              .indices = indices,
                                              .first = first,
                                              .tail = tail,
                                              .lse = lse,
                                              .composed_bytes = composed_bytes};
        return tqext::turboquant_attention(
            q, packed_keys(key_codes, key_norms, means, balance, signs, residual_norms, key_bits, head_dim, key_rotation),
            packed_values(value_codes, value_params, value_bits, value_dim, coding, value_rotation, "turboquant_attention"),
            with_mask(options, mask), stream);
      },
      "q"_a, "key_codes"_a, "key_norms"_a, "means"_a.none(), "balance"_a.none(), "signs"_a.none(), "residual_norms"_a.none(),
      "key_bits"_a, "head_dim"_a, "key_rotation"_a, "value_codes"_a, "value_params"_a, "value_bits"_a, "value_dim"_a,
      "value_coding"_a, "value_rotation"_a, "scale"_a.none(), "mask"_a.none(), "first"_a.none(), "tail"_a.none(),
      "sinks"_a.none(), "left_padding"_a.none(), "lengths"_a.none(), "indices"_a.none(), "stream"_a.none(), "lse"_a = false,
      "composed_bytes"_a = nb::none());

  m.def(
      "latent_attention",
      [](const mx::array& q, const mx::array& codes, const mx::array& norms, const OptionalArray& means,
         const OptionalArray& balance, const OptionalArray& signs, const OptionalArray& residual_norms, int bits, int dim,
         const std::string& rotation, float scale, const tqext::MaskArgument& mask, const OptionalArray& q_rope,
         const OptionalArray& k_rope, const OptionalArray& first, const OptionalArray& tail, mx::StreamOrDevice stream,
         std::optional<int64_t> composed_bytes) {
        const tqext::LatentOptions options{.scale = scale,
                                           .mask = mask,
                                           .q_rope = q_rope,
                                           .k_rope = k_rope,
                                           .first = first,
                                           .tail = tail,
                                           .composed_bytes = composed_bytes};
        const auto latents = packed_keys(codes, norms, means, balance, signs, residual_norms, bits, dim, rotation);
        return tqext::latent_attention(q, latents, options, stream);
      },
      "q"_a, "codes"_a, "norms"_a, "means"_a.none(), "balance"_a.none(), "signs"_a.none(), "residual_norms"_a.none(), "bits"_a,
      "dim"_a, "rotation"_a, "scale"_a, "mask"_a.none(), "q_rope"_a.none(), "k_rope"_a.none(), "first"_a.none(),
      "tail"_a.none(), "stream"_a.none(), "composed_bytes"_a = nb::none());

  nb::class_<tqext::History>(m, "History",
                             "What attention reads besides the recent tokens: packed keys and values, exact first tokens.")
      .def(
          "__init__",
          [](tqext::History* self, const mx::array& key_codes, const mx::array& key_norms, const OptionalArray& means,
             const OptionalArray& balance, const OptionalArray& signs, const OptionalArray& residual_norms, int key_bits,
             int head_dim, const std::string& rotation, const mx::array& value_codes, const mx::array& value_params,
             int value_bits, int value_dim, const std::string& coding, const std::optional<tqext::ExactTokens>& first,
             bool latent) {
            new (self) tqext::History(
                packed_keys(key_codes, key_norms, means, balance, signs, residual_norms, key_bits, head_dim, rotation),
                packed_values(value_codes, value_params, value_bits, value_dim, coding, rotation, "History"), first, latent);
          },
          "key_codes"_a, "key_norms"_a, "means"_a.none(), "balance"_a.none(), "signs"_a.none(), "residual_norms"_a.none(),
          "key_bits"_a, "head_dim"_a, "rotation"_a, "value_codes"_a, "value_params"_a, "value_bits"_a, "value_dim"_a,
          "value_coding"_a, "first"_a.none(), "latent"_a = false)
      .def("attend", &tqext::History::attend, "q"_a, "tail_keys"_a, "tail_values"_a, "scale"_a, "mask"_a.none(),
           "sinks"_a.none(), "lengths"_a.none(), "left_padding"_a = nb::none(), "lse"_a = false,
           "As `tqext.turboquant_attention`, with the tail in two arguments. lse: in fp32, with the log of the sum of weights "
           "as one column more.");
  m.def("word_sum", &tqext::word_sum, "arrays"_a, "begin"_a, "first"_a, "constant"_a, "previous"_a.none(),
        "numbers"_a = std::vector<int32_t>(), "stream"_a = nb::none(),
        "The sum of a state's words, uint32 ``[1]`` (tqext.kv.state.sum_of), after `numbers`, if any, as int32; None where the "
        "backend has no kernel for it.");
  m.def(
      "store_tokens",
      [](const std::vector<std::tuple<mx::array, int, int, OptionalArray, int>>& stores, mx::StreamOrDevice stream) {
        std::vector<tqext::TokenStore> all;
        all.reserve(stores.size());
        for (const auto& [buffer, begin, kept, added, room] : stores) all.push_back({buffer, added, begin, kept, room});
        return tqext::store_tokens(all, stream);
      },
      "stores"_a, "stream"_a = nb::none(),
      "New buffers, each of (buffer, begin, kept, added, room): the `kept` tokens from `begin` on, then those that are added, "
      "then zeros up to `room`. None where the backend has no kernel for it.");
  m.def("append_token", &tqext::append_token, "tail_keys"_a, "tail_values"_a, "keys"_a, "values"_a, "at"_a,
        R"(Write one token to column `at` of the buffers, in place where nothing else holds them.

Args:
    tail_keys (array): the buffer ``[batch, n_kv_heads, width, head_dim]``; afterwards this very object has the token.
    tail_values (array): the same for values.
    keys (array): ``[batch, n_kv_heads, 1, head_dim]``.
    values (array): ``[batch, n_kv_heads, 1, value_dim]``.
    at (int): a column.

Returns:
    tuple[array, array] | None: the columns up to the new one. None, and nothing is written, if keys or values have another
    shape or dtype, or the buffers no such column.)");
  m.def("append_tokens", &tqext::append_tokens, "tail_keys"_a, "tail_values"_a, "keys"_a, "values"_a, "at"_a, "most"_a,
        R"(As `append_token`, with a column for each sequence.

Args:
    tail_keys (array): as there. So are ``tail_values``, ``keys`` and ``values``.
    at (array): int32 ``[batch, 1, 1, 1]``, columns.
    most (int): the last of these columns.)");

  m.def("q1_quantize", &tqext::q1_quantize, "w"_a, nb::kw_only(), "stream"_a = nb::none(),
        R"(1-bit weights: the sign of each weight, and the mean absolute value of each group of 128 along a row.

That scale is the one of least squared error. A weight of exactly zero gets the positive sign.

Args:
    w (array): float32, float16 or bfloat16 ``[..., cols]``, cols a multiple of 128.

Returns:
    tuple[array, array]: weight, uint32 ``[..., cols / 32]``, and scales, float16 ``[..., cols / 128]``.

Raises:
    ValueError: a wrong shape or dtype.

Example:
    >>> weight, scales = tqext.q1_quantize(mx.random.normal((512, 256)))
    >>> weight.shape, scales.shape
    ((512, 8), (512, 2)))");
  m.def("q1_dequantize", &tqext::q1_dequantize, "weight"_a, "scales"_a, nb::kw_only(), "dtype"_a = mx::float32,
        "stream"_a = nb::none(),
        R"(The weights that sign bits and scales stand for: ``+scale`` where the bit is 1, else ``-scale``.

Args:
    weight (array): uint32 ``[..., cols / 32]``; column 32i + b is bit b of word i.
    scales (array): float16 ``[..., cols / 128]``.
    dtype (Dtype): float32, float16 or bfloat16.

Returns:
    array: ``[..., cols]``.

Raises:
    ValueError: arrays that do not fit together.

Example:
    >>> tqext.q1_dequantize(*tqext.q1_quantize(mx.ones((1, 128)))).sum().item()
    128.0)");
  m.def("q1_matmul", &tqext::q1_matmul, "x"_a, "weight"_a, "scales"_a, nb::kw_only(), "stream"_a = nb::none(),
        R"(``x @ W.T`` with 1-bit weights: ``y[r] = sum over groups g of scale[r, g] * (sum of +-x)``, computed on the bits.

Sums are fp32 whatever the dtype of x.

Args:
    x (array): float32, float16 or bfloat16 ``[..., cols]``; any strides.
    weight (array): uint32 ``[rows, cols / 32]``; column 32i + b is bit b of word i, 1 stands for +scale.
    scales (array): float16 ``[rows, cols / 128]``.

Returns:
    array: ``[..., rows]`` in the dtype of x.

Raises:
    ValueError: a wrong shape or dtype.

Example:
    >>> weight, scales = tqext.q1_quantize(mx.random.normal((512, 256)))
    >>> tqext.q1_matmul(mx.ones((3, 256)), weight, scales).shape
    (3, 512))");
  m.def("ternary_matmul", &tqext::ternary_matmul, "x"_a, "weight"_a, "scales"_a, nb::kw_only(), "stream"_a = nb::none(),
        R"(``x @ W.T`` with ternary weights: ``y[r] = sum over groups g of scale[r, g] * sum((code - 1) * x)``, on the codes.

A weight is ``scale * (code - 1)``. The words are those of MLX's affine 2-bit weights with groups of 128, whose biases are
``-scales``. More than 8 rows of x with Metal, and more than 7 float16 rows with CUDA, take ``mx.quantized_matmul`` over the
same words; more than 24 rows of other types with CUDA take weights decoded to float32 and TF32 products. Sums are fp32
otherwise.

Args:
    x (array): float32, float16 or bfloat16 ``[..., cols]``; any strides.
    weight (array): uint32 ``[rows, cols / 16]``; column 16i + j is bits 2j and 2j + 1 of word i.
    scales (array): float16 ``[rows, cols / 128]``.

Returns:
    array: ``[..., rows]`` in the dtype of x.

Raises:
    ValueError: a wrong shape or dtype.

Example:
    >>> weight, scales = mx.full((512, 16), 0xAAAAAAAA, dtype=mx.uint32), mx.ones((512, 2), mx.float16)  # all +1
    >>> tqext.ternary_matmul(mx.ones((3, 256)), weight, scales)[0, 0].item()
    256.0)");

  m.def(
      "isa", [] { return tqext::cpu::isa_name(tqext::cpu::active_isa()); },
      "Instruction set of the CPU kernels in use; TQEXT_ISA overrides the choice.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (auto isa : tqext::cpu::available_isas()) names.push_back(tqext::cpu::isa_name(isa));
        return names;
      },
      "Instruction sets that this machine can run, slowest first.");
  m.def(
      "clear_gpu_memory", &tqext::clear_gpu_memory,
      "Frees the device memory that is kept for later outputs, beside what mx.clear_cache frees of MLX's own; returns how many "
      "bytes. 0 but on CUDA.");
  m.def(
      "pipelines",
      [] {
        nb::list all;
        for (const tqext::Pipeline& p : tqext::pipelines()) {
          nb::dict one;
          one["name"] = p.name;
          one["ms"] = p.milliseconds;
          one["max_threads"] = p.max_threads;
          one["threads"] = p.threads;
          one["simd_width"] = p.simd_width;
          one["threadgroup_bytes"] = p.threadgroup_bytes;
          all.append(one);
        }
        return all;
      },
      nb::sig("def pipelines() -> list[dict[str, typing.Any]]"),
      "Metal kernels that this process has used, in the order of first use: name, milliseconds to get it, threads per "
      "threadgroup "
      "at most and as launched, lanes of a simdgroup, bytes of static threadgroup memory. Empty but on Metal.");
  m.def(
      "prepare_pipelines",
      [](int n_q_heads, int n_kv_heads, int head_dim, int value_dim, mx::Dtype query_dtype, mx::Dtype token_dtype, int key_bits,
         int value_bits, const std::string& coding, const std::string& rotation, bool means, bool balance, bool qjl, bool sinks,
         bool window, bool latent) {
        return tqext::prepare_pipelines({.n_q_heads = n_q_heads,
                                         .n_kv_heads = n_kv_heads,
                                         .head_dim = head_dim,
                                         .value_dim = value_dim,
                                         .query_dtype = query_dtype,
                                         .token_dtype = token_dtype,
                                         .key_bits = key_bits,
                                         .value_bits = value_bits,
                                         .value_coding = tqext::value_coding(coding, "prepare_pipelines"),
                                         .rotation = rotation,
                                         .has_means = means,
                                         .has_balance = balance,
                                         .has_residual = qjl,
                                         .has_sinks = sinks,
                                         .has_window = window,
                                         .latent = latent});
      },
      nb::kw_only(), "n_q_heads"_a, "n_kv_heads"_a, "head_dim"_a, "value_dim"_a, "query_dtype"_a, "token_dtype"_a, "key_bits"_a,
      "value_bits"_a, "value_coding"_a, "rotation"_a, "means"_a, "balance"_a, "qjl"_a, "sinks"_a, "window"_a = false,
      "latent"_a = false,
      "Compiles the Metal kernels that a layer's cache will launch, before its first prompt; returns their number. 0, and "
      "nothing is done, on the CPU and on CUDA.");
  m.def("num_threads", &tqext::cpu::num_threads, "Threads of the CPU kernels; TQEXT_NUM_THREADS overrides the number.");
}
