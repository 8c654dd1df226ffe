"""Tokens of one layer as arrays: exact ones, coded ones, and the room that their buffers have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from tqext._ext import History as ExtHistory
from tqext._ext import block_means
from tqext._ext import format as packed_format
from tqext.ops import PackedKeys, PackedValues, dequantize, quantize_keys, quantize_values
from tqext.presets import Recipe

BLOCK: int = packed_format.BLOCK
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# The coded buffers double up to so many tokens, then grow by as many: copying them costs 1/256 of reading them at each step.
GROWTH = 512
# The exact buffer has room for one token more in so many tokens of the cache, so that a short cache is not much larger than its
# tokens, and for a block at most.
ROOM_SHARE = 12


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


class History(NamedTuple):
    """What attention reads besides the recent tokens: the same from one encoded block to the next.

    Attributes:
        packed_keys: Codes of the keys. ``packed_values``: the same for values.
        first: The exact first tokens, None if there are none.
        attend: ``attend(q, tail_keys, tail_values, scale, mask, sinks, lengths)``, as `turboquant_attention`.
    """

    packed_keys: PackedKeys
    packed_values: PackedValues
    first: Exact | None
    attend: Callable[..., mx.array]

    def __deepcopy__(self, memo: object) -> History:
        """Itself: it never changes."""
        return self


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


def exact_room(n_held: int, n_tokens: int) -> int:
    """Tokens that the buffer of `n_held` exact tokens has room for, in a cache of `n_tokens`."""
    return n_held + min(BLOCK, n_tokens // ROOM_SHARE)


def coded_room(n_coded: int) -> int:
    """Tokens that the buffers of `n_coded` coded tokens have room for."""
    room = BLOCK
    while room < n_coded and room < GROWTH:
        room *= 2
    return 0 if n_coded == 0 else room if room >= n_coded else -(-n_coded // GROWTH) * GROWTH


def wait_for_readers(buffers: Sequence[mx.array]) -> None:
    """Wait for a step in flight before its buffers are written to, where that is cheaper than the copy it would cost.

    In a pipelined loop the last step's attention still holds the packed buffers, and writing to them would copy them.
    """
    if sum(x.nbytes for x in buffers) > WAIT_BYTES:
        mx.synchronize()


# Copying so many bytes costs as much as waiting.
WAIT_BYTES = 1 << 20


class Codec:
    """The packed form of a recipe as a flat list of arrays (`parts`), the axis of tokens or of blocks at -2.

    Codes and norms(, residual signs and their norms) of the keys; codes and parameters of the values; means of the blocks, if
    the recipe has any.

    Attributes:
        per_row: Tokens that a row of each array stands for: 1, or `BLOCK` for the means.
    """

    __slots__ = ("balance", "head_dim", "n_key_parts", "per_row", "recipe", "value_dim")

    def __init__(self, recipe: Recipe, head_dim: int, value_dim: int, balance: mx.array | None = None):
        self.recipe = recipe
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.balance = balance
        self.n_key_parts = 4 if recipe.qjl else 2
        self.per_row = (1,) * (self.n_key_parts + 2) + (BLOCK,) * recipe.means

    def __deepcopy__(self, memo: object) -> Codec:
        """Itself: it never changes."""
        return self

    def encode(self, tokens: Exact) -> list[mx.array]:
        """The packed arrays of whole blocks."""
        r = self.recipe
        means = block_means(tokens.keys) if r.means else None
        k = quantize_keys(tokens.keys, bits=r.key_bits, means=means, balance=self.balance, qjl=r.qjl, rotation=r.rotation)
        v = quantize_values(tokens.values, bits=r.value_bits, coding=r.value_coding, rotation=r.rotation)
        parts = [k.codes, k.norms, k.signs, k.residual_norms, v.codes, v.params, means]
        return [x for x in parts if x is not None]

    def pack(self, parts: Sequence[mx.array]) -> tuple[PackedKeys, PackedValues]:
        """The objects that attention takes."""
        r, n = self.recipe, self.n_key_parts
        keys = PackedKeys(
            codes=parts[0],
            norms=parts[1],
            means=parts[n + 2] if r.means else None,
            balance=self.balance,
            signs=parts[2] if r.qjl else None,
            residual_norms=parts[3] if r.qjl else None,
            bits=r.key_bits,
            head_dim=self.head_dim,
            rotation=r.rotation,
        )
        values = PackedValues(
            codes=parts[n],
            params=parts[n + 1],
            bits=r.value_bits,
            head_dim=self.value_dim,
            coding=r.value_coding,
            rotation=r.rotation,
        )
        return keys, values

    def history(self, parts: Sequence[mx.array], first: Exact | None) -> History:
        """The packed arrays and the first tokens as attention takes them, converted once."""
        keys, values = self.pack(parts)
        native = ExtHistory(
            key_codes=keys.codes,
            key_norms=keys.norms,
            means=keys.means,
            balance=keys.balance,
            signs=keys.signs,
            residual_norms=keys.residual_norms,
            key_bits=keys.bits,
            head_dim=self.head_dim,
            rotation=keys.rotation,
            value_codes=values.codes,
            value_params=values.params,
            value_bits=values.bits,
            value_dim=self.value_dim,
            value_coding=values.coding,
            first=first,
        )
        return History(keys, values, first, native.attend)

    def decode(self, parts: Sequence[mx.array], begin: int, end: int, key_dtype: mx.Dtype, value_dtype: mx.Dtype) -> Exact:
        """What the codes of the tokens ``begin`` (the first of a block) to ``end`` stand for."""
        keys, values = self.pack(self.cut(parts, begin, -(-end // BLOCK) * BLOCK))
        whole = Exact(dequantize(keys, dtype=key_dtype), dequantize(values, dtype=value_dtype))
        return whole.cut(0, end - begin)

    def cut(self, parts: Sequence[mx.array], begin: int, end: int) -> list[mx.array]:
        """The blocks from token `begin` to token `end`, in the same memory."""
        return [x[:, :, begin // per : end // per] for x, per in zip(parts, self.per_row, strict=True)]

    def resized(self, parts: Sequence[mx.array], n_tokens: int) -> list[mx.array]:
        """Copies with room for `n_tokens`, whole blocks."""
        return [resize_tokens(x, n_tokens // per) for x, per in zip(parts, self.per_row, strict=True)]

    def empty(self, batch: int, n_kv_heads: int) -> list[mx.array]:
        """Packed arrays of no tokens."""
        no_keys = mx.zeros((batch, n_kv_heads, 0, self.head_dim))
        return self.encode(Exact(no_keys, mx.zeros((batch, n_kv_heads, 0, self.value_dim))))


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


def check_balance(balance: mx.array | None, recipe: Recipe) -> mx.array | None:
    """The balance, if it may go with the recipe."""
    if balance is None:
        return None
    if not recipe.balance:
        raise ValueError("[TurboQuantKVCache] balance: expected None for a recipe without balance, got an array")
    if not isinstance(balance, mx.array) or balance.ndim != 2 or balance.dtype != mx.float32:
        got = f"{balance.shape} of {balance.dtype}" if isinstance(balance, mx.array) else type(balance).__name__
        raise ValueError(f"[TurboQuantKVCache] balance: expected float32 [n_kv_heads, head_dim], got {got}")
    return balance
