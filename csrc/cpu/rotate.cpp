#include "rotate.h"

#include <algorithm>

#include "codec.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "parallel.h"
#include "rows.h"

namespace tqext {

void Rotate::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.set_input_array(inputs[0]);
  encoder.set_output_array(out);
  encoder.dispatch([x = cpu::View(inputs[0]), to = out.data<void>(), type = out.dtype(), inverse = inverse_] {
    constexpr size_t kRows = 64;
    const int dim = x.shape.back();
    const size_t n_rows = x.n_rows();
    cpu::parallel_for(cpu::row_blocks(n_rows, kRows), [&](int block) {
      float row[kMaxDim];
      for (size_t i = block * kRows; i < std::min(n_rows, (block + 1) * kRows); i++) {
        x.load(i, dim, row);
        cpu::rotate_row(row, dim, TQ_ROTATION_SEED, inverse);
        cpu::store_row(row, dim, to, type, i * dim);
      }
    });
  });
}

}  // namespace tqext
