// What every eval_cpu begins with, and the loop over rows that most of them are.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"
#include "log.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "parallel.h"
#include "rows.h"

namespace tqext::cpu {

// Where a kernel goes to run.
struct Encoder {
  mx::cpu::CommandEncoder& encoder;
  const char* kernel;
  const std::vector<mx::array>& inputs;

  // Runs the task on the stream's thread.
  template <class Task>
  void dispatch(Task task) {
    if (!logs_kernels()) return encoder.dispatch(std::move(task));
    std::string text = std::string(kernel) + " (" + isa_name(active_isa()) + "), " + shapes_of(inputs);
    encoder.dispatch([task = std::move(task), text = std::move(text)]() mutable {
      const KernelLog log("ran", [&] { return text; });
      task();
    });
  }
};

// Allocates the outputs (handles of the caller's arrays) and announces all arrays to the stream's encoder.
inline Encoder prepare(const char* kernel, mx::Stream stream, const std::vector<mx::array>& inputs,
                       std::vector<mx::array> outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  for (const auto& x : inputs) encoder.set_input_array(x);
  for (auto& x : outputs) {
    x.set_data(mx::allocator::malloc(x.nbytes()));
    encoder.set_output_array(x);
  }
  return {encoder, kernel, inputs};
}

// Calls body(row) for every row, in parallel.
template <class Body>
void for_rows(size_t n_rows, size_t rows_per_task, const Body& body) {
  parallel_for(row_blocks(n_rows, rows_per_task), [&](int block) {
    for (size_t i = block * rows_per_task; i < std::min(n_rows, (block + 1) * rows_per_task); i++) body(i);
  });
}

}  // namespace tqext::cpu
