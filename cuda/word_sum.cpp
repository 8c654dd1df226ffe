// eval_gpu of word_sum.
#include "word_sum.h"

#include <algorithm>

#include "check.h"
#include "once_map.h"
#include "params.h"
#include "runtime.h"

namespace tqext {

using namespace cuda;  // NOLINT: the backend's own names

bool gpu_sums_words() { return true; }

void WordSum::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  check_backend("word_sum");
  const int device = stream().device.index, n_arrays = int(state_.places.size());
  check(n_arrays <= kMostSumArrays, "[word_sum] arrays: expected at most ", int(kMostSumArrays), ", got ", n_arrays);
  const int n_numbers = int(state_.numbers.size());
  check(n_numbers <= kMostSumNumbers, "[word_sum] numbers: expected at most ", int(kMostSumNumbers), ", got ", n_numbers);
  static OnceMap<int, Kernel> kernels;
  const Kernel& kernel = kernels.get(
      device, [&] { return load_kernel(compile("word_sum.cu", {}, true, device), "word_sum", 0, kSumThreads, device); });
  allocate_output(out, device);
  WordSumParams p{};
  int64_t most = 0;
  for (int i = 0; i < n_arrays; i++) {
    const SumRows rows(inputs[i]);
    WordSumArray& x = p.arrays[i];
    x.data = device_pointer(inputs[i]);
    x.n_rows = rows.n_rows;
    x.n_words = rows.n_words;
    std::copy_n(rows.stride, 4, x.stride);
    x.heads = rows.heads;
    x.columns = rows.columns;
    x.kind = rows.kind;
    x.start = state_.starts[i];
    x.place = state_.places[i];
    x.aligned = rows.columns % 2 == 0 && rows.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
    for (int axis = 0; axis < 3; axis++) x.aligned = x.aligned && rows.stride[axis] % 2 == 0;
    most = std::max(most, rows.n_rows * rows.n_words);
  }
  const Workspace scratch = workspace(stream(), 2 * sizeof(uint32_t), 0);
  p.total = static_cast<uint32_t*>(device_pointer(scratch.memory));
  p.n_done = p.total + 1;
  p.out = static_cast<uint32_t*>(device_pointer(out));
  p.constant = state_.constant;
  p.n_numbers = n_numbers;
  std::copy(state_.numbers.begin(), state_.numbers.end(), p.numbers);
  p.previous = state_.has_previous ? static_cast<const uint32_t*>(device_pointer(inputs.back())) : nullptr;

  // Eight words of a thread at least, two blocks for each multiprocessor at most.
  const int64_t blocks = std::clamp<int64_t>(most / (8 * kSumThreads), 1, 2 * device_info(device).n_multiprocessors);
  auto& encoder = mx::cu::get_command_encoder(stream());
  depend_on(encoder, inputs);
  encoder.set_output_array(out);
  encoder.set_output_array(scratch.memory);
  void* arguments[] = {&p};
  add_counting_kernel(stream(), "word_sum", kernel, {unsigned(blocks), unsigned(std::max(n_arrays, 1)), 1}, kSumThreads, 0,
                      arguments, inputs);
}

}  // namespace tqext
