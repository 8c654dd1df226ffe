"""Matrix products of evaluation runs with NumPy's BLAS: MLX's CPU wheel for Linux has none, and is tens of times slower."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model

from tqext.nn import q1_paths


def product(x: mx.array, weight: mx.array) -> mx.array:
    rows = np.array(x.astype(mx.float32), copy=False).reshape(-1, x.shape[-1])
    out = rows @ np.array(weight, copy=False).T
    return mx.array(out.reshape(*x.shape[:-1], weight.shape[0])).astype(x.dtype)


class _BlasLinear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        out = product(x, self.weight)
        return out + self.bias if "bias" in self else out


class _BlasEmbedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self.weight)


_SUBSTITUTES: dict[type, type] = {nn.Linear: _BlasLinear, nn.Embedding: _BlasEmbedding}


def for_evaluation(model: Any) -> Any:
    """A model with its weights, also 4-bit and 16-bit ones, in fp32 and `use_blas` where MLX runs on a Linux CPU.

    MLX's half-precision and quantised products are up to a hundred times slower there. Everywhere else, and if some layer is
    quantised otherwise (1-bit weights), the model stays as it is.
    """
    if not _is_slow_cpu() or q1_paths(model):
        return model
    if any(isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for layer in model.modules()):
        model = dequantize_model(model)
    model.update(tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters()))
    mx.eval(model.parameters())
    return use_blas(model)


def _is_slow_cpu() -> bool:
    return bool(mx.default_device() == mx.cpu and not mx.metal.is_available())


def use_blas(model: Any) -> Any:
    """Let the fp32 linear layers of a model compute with NumPy where MLX runs on a Linux CPU; returns the model.

    Every product then waits for its input, so this is for teacher-forced runs, not for serving.
    """
    if _is_slow_cpu():
        for _, module in model.named_modules():
            substitute = _SUBSTITUTES.get(type(module))
            if substitute is not None and module.weight.dtype == mx.float32:
                module.__class__ = substitute
    return model
