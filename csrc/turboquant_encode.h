// quantize_keys, quantize_values, dequantize: vectors to packed bytes (format.h) and back.
//
// Keys: x = rotate(k - mean), code = the nearest level of x / |x|, norm = |x|^2 / <x, level / 127>, so that <x, k̂> = |x|^2:
//   the score of a key with itself has no bias.
// Values: per group of 32 of rotate(v): codes on value_shrink() of the min-max range, then one least-squares refit of scale
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

// k [B, n_kv_heads, n, D] float32/float16/bfloat16; mean [B or 1, n_kv_heads, D] -> codes, norms [, signs, residual_norms].
std::vector<mx::array> quantize_keys(const mx::array& k, int bits, const std::optional<mx::array>& mean, bool qjl,
                                     const std::string& rotation, mx::StreamOrDevice s);

// v [B, n_kv_heads, n, D] -> codes, params.
std::vector<mx::array> quantize_values(const mx::array& v, int bits, const std::string& rotation, mx::StreamOrDevice s);

// rotated: leave the vectors in the rotated space (padded head dimension, no mean added).
mx::array dequantize_keys(const mx::array& codes, const mx::array& norms, const std::optional<mx::array>& mean, int bits,
                          int head_dim, const std::string& rotation, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s);
mx::array dequantize_values(const mx::array& codes, const mx::array& params, int bits, int head_dim,
                            const std::string& rotation, bool rotated, mx::Dtype dtype, mx::StreamOrDevice s);

// Checks shared with turboquant_attention.
void check_bits(int bits, bool keys, const char* op);
void check_head_dim(int head_dim, const char* op, const char* name);
void check_packed_keys(const mx::array& codes, const mx::array& norms, int bits, int head_dim, const char* op);
void check_packed_values(const mx::array& codes, const mx::array& params, int bits, int head_dim, const char* op);
mx::array check_mean(const mx::array& mean, int batch, int n_kv_heads, int head_dim, const char* op, mx::Stream stream);

// Inputs: k [, mean [B, n_kv_heads, D] fp32]. Outputs: codes, norms [, signs, residual_norms].
class QuantizeKeys : public mx::Primitive {
 public:
  QuantizeKeys(mx::Stream stream, int bits, bool qjl, bool hadamard)
      : Primitive(stream), bits_(bits), qjl_(qjl), hadamard_(hadamard) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  DEFINE_NAME(QuantizeKeys)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  int bits() const { return bits_; }
  bool qjl() const { return qjl_; }
  bool hadamard() const { return hadamard_; }

 private:
  int bits_;
  bool qjl_, hadamard_;  // hadamard_: rotate inside, else the input is rotated already
};

// Input: v. Outputs: codes, params.
class QuantizeValues : public mx::Primitive {
 public:
  QuantizeValues(mx::Stream stream, int bits, bool hadamard) : Primitive(stream), bits_(bits), hadamard_(hadamard) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  DEFINE_NAME(QuantizeValues)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  int bits() const { return bits_; }
  bool hadamard() const { return hadamard_; }

 private:
  int bits_;
  bool hadamard_;
};

// Inputs: codes, norms or params [, mean [B, n_kv_heads, D] fp32]. Output: vectors of head_dim, or of the padded head
// dimension when they stay rotated.
class Dequantize : public mx::UnaryPrimitive {
 public:
  Dequantize(mx::Stream stream, bool keys, int bits, int head_dim, bool hadamard, mx::Dtype dtype)
      : UnaryPrimitive(stream), keys_(keys), bits_(bits), head_dim_(head_dim), hadamard_(hadamard), dtype_(dtype) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(Dequantize)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const Primitive& other) const override;
  bool keys() const { return keys_; }
  int bits() const { return bits_; }
  int head_dim() const { return head_dim_; }
  bool hadamard() const { return hadamard_; }

 private:
  bool keys_;
  int bits_, head_dim_;
  bool hadamard_;  // rotate back inside
  mx::Dtype dtype_;
};

}  // namespace tqext
