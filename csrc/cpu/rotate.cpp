#include "rotate.h"

#include "codec.h"
#include "eval.h"

namespace tqext {

void Rotate::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  auto encoder = cpu::prepare("rotate", stream(), inputs, {out});
  encoder.dispatch([x = cpu::View(inputs[0]), to = out.data<void>(), type = out.dtype(), inverse = inverse_] {
    constexpr size_t kRows = 64;
    const int dim = x.shape.back();
    cpu::for_rows(x.n_rows(), kRows, [&](size_t i) {
      float row[kMaxDim];
      x.load(i, dim, row);
      cpu::rotate_row(row, dim, TQ_ROTATION_SEED, inverse);
      cpu::store_row(row, dim, to, type, i * dim);
    });
  });
}

}  // namespace tqext
