"""Matrix products of evaluation runs with NumPy's BLAS: MLX's CPU wheel for Linux has none, and is tens of times slower."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


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


def use_blas(model: Any) -> Any:
    """Let the fp32 linear layers of a model compute with NumPy where MLX runs on a Linux CPU; returns the model.

    Every product then waits for its input, so this is for teacher-forced runs, not for serving.
    """
    if mx.default_device() == mx.cpu and not mx.metal.is_available():
        for _, module in model.named_modules():
            substitute = _SUBSTITUTES.get(type(module))
            if substitute is not None and module.weight.dtype == mx.float32:
                module.__class__ = substitute
    return model
