// Weights of one or two bits with one fp16 scale for 128 columns (format.h), as operators take them: checks and shapes.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace tqext {

namespace mx = mlx::core;

// weight uint32 [..., cols * bits / 32], scales float16 [..., cols / 128].
void check_coded(const mx::array& weight, const mx::array& scales, int bits, const char* op);

// Columns of such a weight.
int coded_columns(const mx::array& weight, int bits);

// Of x [..., cols] @ weight^T, with weight and scales of two axes: inputs are x, weight, scales. Checks them.
mx::Shape product_shape(const std::vector<mx::array>& inputs, int bits, const char* op);

}  // namespace tqext
