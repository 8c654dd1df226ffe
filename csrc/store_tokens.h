// store_tokens: new buffers with some tokens of old ones and others behind them, for all arrays of a cache in one launch.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace tqext {

namespace mx = mlx::core;

// What becomes of one buffer [B, H, n, last] of 2 or 4 bytes per element: its tokens from `begin` on, `kept` of them, then
// those of `added` [B, H, m, last] if it is there, in new memory with room for `room` tokens. The rest of it is zero.
struct TokenStore {
  mx::array buffer;
  std::optional<mx::array> added;
  int begin, kept, room;
};

// The new buffers; nothing where the backend has no kernel. For tokens that are still read: mx::slice_update writes to buffers
// that nothing else holds in place.
std::optional<std::vector<mx::array>> store_tokens(const std::vector<TokenStore>& stores, mx::StreamOrDevice s);

// Inputs: all buffers, then what is added to those that get anything. Outputs: the new buffers.
class StoreTokens : public mx::Primitive {
 public:
  struct Store {
    int begin, kept, room, added;  // added: index of an input, or -1
    bool operator==(const Store&) const = default;
  };
  StoreTokens(mx::Stream stream, std::vector<Store> stores) : Primitive(stream), stores_(std::move(stores)) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  DEFINE_NAME(StoreTokens)
  bool is_equivalent(const Primitive& other) const override {
    return stores_ == static_cast<const StoreTokens&>(other).stores_;
  }

 private:
  std::vector<Store> stores_;
};

// Whether the GPU backend of this build has the kernel.
bool gpu_stores_tokens();

}  // namespace tqext
