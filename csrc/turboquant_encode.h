// quantize_keys, quantize_values, dequantize: vectors to packed bytes (format.h) and back.
//
// Keys: x = rotate((k - mean of its block) * balance), code = the nearest level of x / |x|, norm = |x|^2 / <x, level / 127>, so
// that <x, k̂> = |x|^2:
//   the score of a key with itself has no bias.
// Values, "lloyd": x = rotate(v), code as for keys, norm = <x, c> / <c, c> with c = level / 127, the least squared error.
// Values, "groups": per group of 32 of rotate(v): codes on value_shrink() of the min-max range, then one least-squares refit of
// scale
//   and bias given the codes.
// Residual signs (QJL, Zandieh et al. 2024, arXiv:2406.03482, with an orthogonal sketch): sign(rotate'(x - k̂)) and |x - k̂|.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "rotate.h"

namespace tqext {

// Packed tokens as the operators take them (format.h).
struct PackedKeys {
  mx::array codes, norms;
  std::optional<mx::array> means, balance, signs, residual_norms;
  int bits, head_dim;
  std::string rotation;
};

struct PackedValues {
  mx::array codes, params;
  int bits, head_dim;
  ValueCoding coding;
  std::string rotation;
};

// k [B, n_kv_heads, n, D] float32/float16/bfloat16 -> fp16 [B, n_kv_heads, n_blocks, D]: the mean of each block's keys, over
// those that are finite; zero where none is.
mx::array block_means(const mx::array& k, mx::StreamOrDevice s);

// k [B, n_kv_heads, n, D] float32/float16/bfloat16; means [B or 1, n_kv_heads, n_blocks, D] fp16; balance [n_kv_heads, D] fp32
// -> codes, norms [, signs, residual_norms].
std::vector<mx::array> quantize_keys(const mx::array& k, int bits, const std::optional<mx::array>& means,
                                     const std::optional<mx::array>& balance, bool qjl, const std::string& rotation,
                                     mx::StreamOrDevice s);

// The same with each block's own block_means, which come last: codes, norms [, signs, residual_norms], means.
std::vector<mx::array> quantize_blocks(const mx::array& k, int bits, const std::optional<mx::array>& balance, bool qjl,
                                       const std::string& rotation, mx::StreamOrDevice s);

// v [B, n_kv_heads, n, D] -> codes, params.
std::vector<mx::array> quantize_values(const mx::array& v, int bits, ValueCoding coding, const std::string& rotation,
                                       mx::StreamOrDevice s);

// rotated: leave the vectors in the rotated space (padded head dimension, still balanced, no mean added).
mx::array dequantize_keys(const PackedKeys& keys, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s);
mx::array dequantize_values(const PackedValues& values, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s);

// "groups" or "lloyd".
ValueCoding value_coding(const std::string& name, const char* op);

// Checks shared with turboquant_attention.
void check_key_bits(int bits, const char* op);
void check_head_dim(int head_dim, const char* op, const char* name);
void check_packed_keys(const PackedKeys& keys, const char* op);
void check_packed_values(const PackedValues& values, const char* op);
mx::array check_means(const mx::array& means, int batch, int n_kv_heads, int n_tokens, int head_dim, bool may_be_fp32,
                      const char* op, mx::Stream stream);
void check_balance(const mx::array& balance, int n_kv_heads, int head_dim, const char* op);

// Inputs: k [, means [B, n_kv_heads, n_blocks, D] fp16 (fp32 without the rotation)] [, balance [n_kv_heads, D] fp32].
// Outputs: codes, norms [, signs, residual_norms] [, means].
class QuantizeKeys : public mx::Primitive {
 public:
  struct State {
    int bits;
    bool qjl, hadamard;  // hadamard: rotate inside, else the input is rotated already
    bool has_means, has_balance;
    bool own_means = false;  // the blocks' own ones, an output: only where gpu_codes_blocks()
    bool operator==(const State&) const = default;
  };
  QuantizeKeys(mx::Stream stream, const State& state) : Primitive(stream), state_(state) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  DEFINE_NAME(QuantizeKeys)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override { return state_ == static_cast<const QuantizeKeys&>(other).state_; }
  const State& state() const { return state_; }
  const mx::array* means(const std::vector<mx::array>& inputs) const { return state_.has_means ? &inputs[1] : nullptr; }
  const mx::array* balance(const std::vector<mx::array>& inputs) const { return state_.has_balance ? &inputs.back() : nullptr; }

 private:
  State state_;
};

// Whether the GPU backend of this build finds the means of blocks and codes the keys in one kernel.
bool gpu_codes_blocks();

// Input: v. Outputs: codes, params.
class QuantizeValues : public mx::Primitive {
 public:
  struct State {
    int bits, coding;  // ValueCoding
    bool hadamard;
    bool operator==(const State&) const = default;
  };
  QuantizeValues(mx::Stream stream, const State& state) : Primitive(stream), state_(state) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  DEFINE_NAME(QuantizeValues)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override {
    return state_ == static_cast<const QuantizeValues&>(other).state_;
  }
  const State& state() const { return state_; }

 private:
  State state_;
};

// Inputs: codes, norms or params [, means] [, balance]. Output: vectors of head_dim, or of the padded head dimension when they
// stay rotated. Values coded by "lloyd" are decoded as keys are.
class Dequantize : public mx::UnaryPrimitive {
 public:
  struct State {
    bool groups;  // scales and biases of groups, else a norm and a codebook
    int bits, head_dim;
    bool hadamard;  // rotate back inside
    bool has_means, has_balance;
    mx::Dtype::Val dtype;
    bool operator==(const State&) const = default;
  };
  Dequantize(mx::Stream stream, const State& state) : UnaryPrimitive(stream), state_(state) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(Dequantize)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override { return state_ == static_cast<const Dequantize&>(other).state_; }
  const State& state() const { return state_; }
  const mx::array* means(const std::vector<mx::array>& inputs) const { return state_.has_means ? &inputs[2] : nullptr; }
  const mx::array* balance(const std::vector<mx::array>& inputs) const { return state_.has_balance ? &inputs.back() : nullptr; }

 private:
  State state_;
};

}  // namespace tqext
