"""Tokens of one layer as the model made them, and copies of arrays of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from tqext._ext import store_tokens

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class Exact(NamedTuple):
    """Keys and values as the model made them: ``[B, n_kv_heads, n_tokens, D]`` and ``[..., Dv]``."""

    keys: mx.array
    values: mx.array

    @property
    def n_tokens(self) -> int:
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

    def cut(self, begin: int, end: int) -> Exact:
        """The tokens ``begin`` to ``end``, in the same memory."""
        return Exact(self.keys[:, :, begin:end], self.values[:, :, begin:end])

    def then(self, other: Exact) -> Exact:
        """These tokens and the other ones, in new memory."""
        return Exact(mx.concatenate([self.keys, other.keys], axis=2), mx.concatenate([self.values, other.values], axis=2))

    def resized(self, n_tokens: int) -> Exact:
        """A copy with room for `n_tokens` (a slice would keep the longer array it was cut from alive)."""
        return Exact(resize_tokens(self.keys, n_tokens), resize_tokens(self.values, n_tokens))

    def write(self, begin: int, other: Exact) -> None:
        """Store tokens from `begin` on, in place where nothing else holds the buffers."""
        for buffer, x in zip(self, other, strict=True):
            buffer[:, :, begin : begin + other.n_tokens] = owned(x) if other.n_tokens == self.n_tokens else x


def owned(x: mx.array) -> mx.array:
    """A copy of ``x [B, H, T, ...]``.

    A slice keeps the array that it was cut from, which may be a whole prompt, and so does a buffer that a slice is assigned to
    as a whole: MLX then stores the slice.
    """
    return mx.take(x, mx.arange(x.shape[2]), axis=2)


def resize_tokens(x: mx.array, n_tokens: int) -> mx.array:
    """A copy of ``x [B, H, T, ...]`` cut or zero-padded to `n_tokens`."""
    kept = min(x.shape[2], n_tokens)
    if kept == n_tokens:
        return owned(x[:, :, :kept])
    out = mx.zeros((*x.shape[:2], n_tokens, *x.shape[3:]), x.dtype)
    if kept:
        out[:, :, :kept] = x[:, :, :kept]
    return out


class Store(NamedTuple):
    """What becomes of a buffer: `kept` of its tokens from `begin` on, the `added` ones behind them, room for `room`."""

    buffer: mx.array
    begin: int
    kept: int
    added: mx.array | None
    room: int


def stored(stores: Sequence[Store]) -> list[mx.array]:
    """The buffers in new memory, zero behind their tokens; for buffers that are still read, else see `Exact.write`."""
    found = store_tokens(stores)
    return [_composed(*store) for store in stores] if found is None else found


def _composed(buffer: mx.array, begin: int, kept: int, added: mx.array | None, room: int) -> mx.array:
    tokens = buffer[:, :, begin : begin + kept]
    if added is None:
        return resize_tokens(tokens, room)
    if kept + added.shape[2] == room:
        return mx.concatenate([tokens, added], axis=2)
    out = resize_tokens(tokens, room)
    out[:, :, kept : kept + added.shape[2]] = added
    return out


def check_tokens(keys: mx.array, values: mx.array, like: Exact | None) -> None:
    """Keys and values fit each other, and those that are stored already."""
    for name, x in (("keys", keys), ("values", values)):
        if x.ndim != 4:
            raise ValueError(
                f"[update_and_fetch] {name}: expected [batch, n_kv_heads, n_tokens, head_dim], got shape {x.shape}"
            )
        if x.dtype not in FLOATS:
            raise ValueError(f"[update_and_fetch] {name}: expected float32, float16 or bfloat16, got {x.dtype}")
    n, value_shape = keys.shape[2], values.shape
    if value_shape[:3] != keys.shape[:3]:
        raise ValueError(f"[update_and_fetch] values: expected shape {keys.shape[:3]} + (dim,), got {value_shape}")
    if like is None:
        return
    for name, x, held in (("keys", keys, like.keys), ("values", values, like.values)):
        expected = (*held.shape[:2], n, held.shape[3])
        if x.shape != expected:
            raise ValueError(f"[update_and_fetch] {name}: expected shape {expected}, as the cache holds, got {x.shape}")
        if x.dtype != held.dtype:
            raise ValueError(f"[update_and_fetch] {name}: expected {held.dtype}, as the cache holds, got {x.dtype}")
