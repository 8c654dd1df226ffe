// word_sum: the checksum of a cache's state (python/tqext/kv/state.py) in one launch.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

// Finaliser of MurmurHash3 (Appleby), and what tells rows, words of a row and arrays apart.
enum : uint32_t {
  kSumFirst = 0x85EBCA6Bu,
  kSumSecond = 0xC2B2AE35u,
  kSumRow = 0x9E3779B1u,
  kSumWord = 0x85EBCA77u,
  kSumArray = 0xC2B2AE3Du,
};

// uint32 [1]: constant + previous + the sum of all words, each mixed with its place, modulo 2^32.
//   arrays    [rows, words] or [B, H, n, words] of 4 or 2 bytes per element; two elements of 2 bytes are a word where a row has
//             an even number of them
//   begin     row of the third axis at which each array begins, or empty: 0
//   first     place of the first array
//   numbers   if there are any, the result is int32 [n + 1]: they, then the sum
// Nothing where the backend has no kernel, or for other arrays.
std::optional<mx::array> word_sum(const std::vector<mx::array>& arrays, const std::vector<int>& begin, int first,
                                  uint32_t constant, const std::optional<mx::array>& previous,
                                  const std::vector<int32_t>& numbers, mx::StreamOrDevice s);

// One array as rows of words.
struct SumRows {
  enum Kind : int { kWords, kPairs, kHalves };
  Kind kind;
  int64_t n_rows, n_words;         // n_words: of a row
  int32_t heads, tokens, columns;  // elements of the last three axes
  int64_t stride[4];

  explicit SumRows(const mx::array& x);
};

// Inputs: arrays [, previous]. Output: the numbers, then the sum.
class WordSum : public mx::UnaryPrimitive {
 public:
  struct State {
    std::vector<uint32_t> starts, places;  // of the arrays: word at which it begins, place in the state
    uint32_t constant;
    bool has_previous;
    std::vector<int32_t> numbers;
    bool operator==(const State&) const = default;
  };
  WordSum(mx::Stream stream, State state) : UnaryPrimitive(stream), state_(std::move(state)) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  DEFINE_NAME(WordSum)
  bool is_equivalent(const Primitive& other) const override { return state_ == static_cast<const WordSum&>(other).state_; }

 private:
  State state_;
};

// Whether the GPU backend of this build has the kernel.
bool gpu_sums_words();

}  // namespace tqext
