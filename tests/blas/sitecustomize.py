"""For the PYTHONPATH of processes that run the small real model: the matrix products of its prompts by NumPy's BLAS.

MLX's CPU wheel for Linux has none, and takes 20 seconds for a prompt of 160 tokens. Steps of a few tokens stay MLX's.
"""

import contextlib
import sys

with contextlib.suppress(ImportError):
    import mlx.core as mx
    import mlx.nn as nn

    from tqext import blas

    LEAST_ROWS = 9

    def replace(layer, name):
        original = getattr(layer, name)

        def product(self, x):
            if x.size < LEAST_ROWS * x.shape[-1] or {x.dtype, self.weight.dtype} != {mx.float32} or "bias" in self:
                return original(self, x)
            return blas.product(x, self.weight)

        setattr(layer, name, product)

    if sys.platform == "linux" and mx.default_device() == mx.cpu:
        replace(nn.Linear, "__call__")
        replace(nn.Embedding, "as_linear")
