#include "store_tokens.h"

#include "check.h"

namespace tqext {

std::optional<std::vector<mx::array>> store_tokens(const std::vector<TokenStore>& stores, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  if (stream.device == mx::Device::gpu && !gpu_stores_tokens()) return std::nullopt;
  const char* op = "store_tokens";
  std::vector<mx::array> inputs;
  inputs.reserve(2 * stores.size());
  for (const TokenStore& store : stores) inputs.push_back(store.buffer);
  std::vector<StoreTokens::Store> state;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const auto& [x, added, begin, kept, room] : stores) {
    check(x.ndim() == 4 && (x.itemsize() == 2 || x.itemsize() == 4), "[", op, "] buffer: expected 4 axes of 2 or 4 bytes, got ",
          x.shape(), " of ", x.dtype());
    check(begin >= 0 && kept >= 0 && begin <= x.shape(2) - kept, "[", op, "] kept: expected tokens of ", x.shape(2), ", got ",
          kept, " from ", begin);
    mx::Shape shape = x.shape();
    if (added) {
      shape[2] = added->shape(2);
      check(added->shape() == shape && added->dtype() == x.dtype(), "[", op, "] added: expected ", shape, " of ", x.dtype(),
            ", got ", added->shape(), " of ", added->dtype());
    }
    const int n_added = added ? added->shape(2) : 0;
    check(n_added <= room - kept, "[", op, "] room: expected at least ", kept, " + ", n_added, ", got ", room);
    state.push_back({begin, kept, room, n_added ? int(inputs.size()) : -1});
    if (n_added) inputs.push_back(*added);
    shape[2] = room;
    shapes.push_back(shape);
    dtypes.push_back(x.dtype());
  }
  return mx::array::make_arrays(shapes, dtypes, std::make_shared<StoreTokens>(stream, std::move(state)), inputs);
}

}  // namespace tqext
