// eval_gpu of store_tokens.
#include "store_tokens.h"

#include <algorithm>

#include "check.h"
#include "once_map.h"
#include "params.h"
#include "runtime.h"

namespace tqext {

using namespace cuda;  // NOLINT: the backend's own names

bool gpu_stores_tokens() { return true; }

namespace {

// Whether the rows of an array can be read in units of so many bytes.
bool has_units(const mx::array& x, int64_t offset, int unit) {
  const int64_t size = x.itemsize();
  if (unit == size) return true;
  bool has = x.strides(3) == 1 && x.shape(3) * size % unit == 0 &&
             (reinterpret_cast<uintptr_t>(device_pointer(x)) + offset * size) % unit == 0;
  for (int axis = 0; axis < 3; axis++) has = has && (x.strides(axis) * size % unit == 0 || x.shape(axis) == 1);
  return has;
}

void unit_strides(const mx::array& x, int unit, int64_t (&to)[4]) {
  for (int axis = 0; axis < 3; axis++) to[axis] = x.strides(axis) * int64_t(x.itemsize()) / unit;
  to[3] = unit == int(x.itemsize()) ? x.strides(3) : 1;
}

}  // namespace

void StoreTokens::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  check_backend("store_tokens");
  const int device = stream().device.index, n = int(outputs.size());
  check(n <= kMostStores, "[store_tokens] stores: expected at most ", int(kMostStores), ", got ", n);
  static OnceMap<int, Kernel> kernels;
  const Kernel& kernel = kernels.get(device, [&] {
    return load_kernel(compile("store_tokens.cu", {}, true, device), "store_tokens", 0, kStoreThreads, device);
  });
  // They stay: MLX is to count and to free them.
  std::vector<mx::array> made;
  for (mx::array& out : outputs) {
    if (out.size() == 0) {
      allocate_output(out, device);
    } else {
      made.push_back(out);
    }
  }
  const auto any = std::find_if(inputs.begin(), inputs.end(), [](const mx::array& x) { return x.size() > 0; });
  if (made.empty() || any == inputs.end()) {
    check(made.empty(), "[store_tokens] buffers: expected tokens, got none");
    return;
  }
  allocate_through_mlx(made, *any, stream());

  TokenStoresParams p{};
  int n_stores = 0;
  int64_t most = 0, most_heads = 1;
  for (int i = 0; i < n; i++) {
    const Store& store = stores_[i];
    const mx::array &buffer = inputs[i], &out = outputs[i];
    const mx::array* added = store.added >= 0 ? &inputs[store.added] : nullptr;
    if (out.size() == 0) continue;
    TokenStoreParams& s = p.stores[n_stores++];
    const bool reads = store.kept > 0;
    const int64_t offset = int64_t(store.begin) * buffer.strides(2), size = out.itemsize();
    int unit = int(size);
    for (const int wider : {16, 4}) {
      if (wider <= unit || !has_units(out, 0, wider)) continue;
      if ((reads && !has_units(buffer, offset, wider)) || (added && !has_units(*added, 0, wider))) continue;
      unit = wider;
      break;
    }
    s.unit = unit;
    s.columns = int32_t(out.shape(3) * size / unit);
    s.out = device_pointer(out);
    if (reads) {
      s.buffer = static_cast<const char*>(device_pointer(buffer)) + offset * size;
      unit_strides(buffer, unit, s.stride);
    }
    if (added) {
      s.added = device_pointer(*added);
      unit_strides(*added, unit, s.added_stride);
    }
    s.n_heads = out.shape(1);
    s.n_heads_in_all = int64_t(out.shape(0)) * out.shape(1);
    s.room = store.room;
    s.kept = store.kept;
    s.n_added = added ? added->shape(2) : 0;
    most = std::max(most, int64_t(s.room) * s.columns);
    check(most < (int64_t(1) << 31), "[store_tokens] room: expected fewer than 2^31 units in a head, got ", most);
    most_heads = std::max(most_heads, s.n_heads_in_all);
  }
  // Four units of a thread at least.
  const int64_t heads = std::min<int64_t>(most_heads, 65535);
  const int64_t wanted = std::max<int64_t>(1, 8 * device_info(device).n_multiprocessors / heads);
  const int64_t blocks = std::clamp<int64_t>(most / (4 * kStoreThreads), 1, wanted);
  auto& encoder = mx::cu::get_command_encoder(stream());
  depend_on(encoder, inputs);
  for (const mx::array& x : outputs) encoder.set_output_array(x);
  void* arguments[] = {&p};
  add_kernel(encoder, "store_tokens", kernel, {unsigned(blocks), unsigned(n_stores), unsigned(heads)}, kStoreThreads, 0,
             arguments, inputs);
}

}  // namespace tqext
