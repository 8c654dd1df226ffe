"""Matrix products of evaluation and calibration with NumPy's BLAS: MLX's CPU wheel for Linux has none, and is tens of times
slower."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model

from tqext.mlx_lm import hooks
from tqext.mlx_lm.packages import AnyModel
from tqext.one_bit.nn import q1_paths, ternary_paths
from tqext.protocols import ModuleTree

# A model of any class: it is given back.
M = TypeVar("M", bound=AnyModel)


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


def for_evaluation(model: M) -> M:
    """A model with its weights, also 4-bit and 16-bit ones, in fp32 and `use_blas` where MLX runs on a Linux CPU.

    MLX's half-precision and quantised products are up to a hundred times slower there. Everywhere else, and if some layer is
    quantised otherwise (1-bit, ternary weights), the model stays as it is.
    """
    tree = cast(nn.Module, model)
    if not is_faster() or q1_paths(tree) or ternary_paths(tree):
        return model
    if any(isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for layer in tree.modules()):
        tree = dequantize_model(tree)
    tree.update(tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, tree.parameters()))
    mx.eval(tree.parameters())
    return use_blas(cast(M, tree))


def is_faster() -> bool:
    """Whether MLX computes on a CPU without BLAS."""
    return bool(mx.default_device() == mx.cpu and not mx.metal.is_available())


def use_blas(model: M) -> M:
    """Let the fp32 linear layers of a model compute with NumPy where MLX runs on a Linux CPU; returns the model.

    Every product then waits for its input, so this is for teacher-forced runs, not for serving.
    """
    if is_faster():
        for _, module in model.named_modules():
            substitute = _SUBSTITUTES.get(type(module))
            if substitute is not None and module.weight.dtype == mx.float32:
                module.__class__ = substitute
    return model


@contextlib.contextmanager
def used(model: ModuleTree) -> Iterator[None]:
    """`use_blas` for a while, also for the attention to exact keys and values."""
    before = [(module, type(module)) for _, module in model.named_modules()]
    hook = hooks.Hook(mx.fast, "scaled_dot_product_attention", _attention_to_arrays)
    try:
        use_blas(cast(nn.Module, model))
        if is_faster():
            hook.put()
        yield
    finally:
        hook.take_back()
        for module, cls in before:
            module.__class__ = cls


def _attention_to_arrays(previous: hooks.Function, q: mx.array, k: Any, v: Any, **options: Any) -> Any:
    if not isinstance(k, mx.array) or q.shape[2] == 1:
        return previous(q, k, v, **options)
    return attention(q, k, v, **options).astype(q.dtype)  # as MLX's: what is cached keeps its type


# For a while, in one thread, in any type

_local = threading.local()


def _fp32(x: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """MLX converts half-precision arrays one by one, NumPy many at a time."""
    if x.dtype == mx.float16:
        return np.array(x, copy=False).astype(np.float32)
    if x.dtype == mx.bfloat16:
        return (np.array(x.view(mx.uint16), copy=False).astype(np.uint32) << 16).view(np.float32)
    return np.array(x.astype(mx.float32), copy=False)


class _LinearForNow(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        if not getattr(_local, "active", False):
            return super().__call__(x)
        return _affine(x, self.weight, self.get("bias"))


class _QuantizedLinearForNow(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        if not getattr(_local, "active", False):
            return super().__call__(x)
        how = dict(group_size=self.group_size, bits=self.bits, mode=self.mode)
        weight = mx.dequantize(self.weight, self.scales, self.get("biases"), **how, dtype=mx.float32)
        return _affine(x, weight, self.get("bias"))


def _affine(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    out = mx.array(_fp32(x).reshape(-1, x.shape[-1]) @ _fp32(weight).T).reshape(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.astype(mx.float32)


_FOR_NOW: dict[type, type] = {nn.Linear: _LinearForNow, nn.QuantizedLinear: _QuantizedLinearForNow}


@contextlib.contextmanager
def products(model: ModuleTree, *, skip_rows: int | None = None) -> Iterator[None]:
    """Let the model's linear layers compute in fp32 with NumPy in this thread, where that is faster.

    Args:
        model: Any mlx-lm model. No layer is copied: one weight at a time is.
        skip_rows: Layers of so many outputs are left alone, such as a head whose logits nobody asks for.
    """
    changed = []
    for _, module in model.named_modules() if is_faster() else ():
        cls = _FOR_NOW.get(type(module))
        if cls is not None and module.weight.shape[0] != skip_rows:
            changed.append((module, type(module)))
            module.__class__ = cls
    _local.active = True
    try:
        yield
    finally:
        _local.active = False
        for module, cls in changed:
            module.__class__ = cls


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b`` in fp32."""
    return mx.array(_fp32(a) @ _fp32(b)) if is_faster() else a.astype(mx.float32) @ b.astype(mx.float32)


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: mx.array | None = None, **options: Any
) -> mx.array:
    """What ``mx.fast.scaled_dot_product_attention`` computes, in fp32."""
    batch, n_heads, n_queries, dim = q.shape
    n_kv_heads, n_keys = k.shape[1:3]
    scores = matmul(q.reshape(batch, n_kv_heads, -1, dim) * scale, k.swapaxes(-1, -2))
    scores = scores.reshape(batch, n_heads, n_queries, n_keys)
    if isinstance(mask, str):  # "causal"
        mask = mx.arange(n_keys - n_queries, n_keys)[:, None] >= mx.arange(n_keys)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(mx.float32)[:, None, None], (batch, n_heads, n_queries, 1))
        scores = mx.concatenate([column, scores], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., scores.shape[-1] - n_keys :]
    return matmul(weights.reshape(batch, n_kv_heads, -1, n_keys), v).reshape(batch, n_heads, n_queries, v.shape[-1])
