"""Coded tokens of one layer: how a recipe encodes them, and what attention reads of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from tqext._ext import History as ExtHistory
from tqext._ext import quantize_blocks, quantize_keys, quantize_values
from tqext.kv.schedule import BLOCK, coded_room
from tqext.kv.tokens import Exact, Store, resize_tokens
from tqext.ops import PackedKeys, PackedValues, dequantize
from tqext.presets import Recipe


class History(NamedTuple):
    """What attention reads besides the recent tokens: the same from one encoded block to the next.

    Attributes:
        packed_keys: Codes of the keys. ``packed_values``: the same for values.
        first: The exact first tokens, None if there are none.
        attend: ``attend(q, tail_keys, tail_values, scale, mask, sinks, lengths, left_padding)``, as `turboquant_attention`.
        rope: Of latents, the rotary keys of the coded tokens.
    """

    packed_keys: PackedKeys
    packed_values: PackedValues
    first: Exact | None
    attend: Callable[..., mx.array]
    rope: mx.array | None = None

    def __deepcopy__(self, memo: object) -> History:
        """Itself: it never changes."""
        return self


def native_history(keys: PackedKeys, values: PackedValues, first: Exact | None, *, latent: bool = False) -> ExtHistory:
    """Packed tokens and the first ones as the extension takes them. latent: see `tqext.latent_attention`."""
    return ExtHistory(
        key_codes=keys.codes,
        key_norms=keys.norms,
        means=keys.means,
        balance=keys.balance,
        signs=keys.signs,
        residual_norms=keys.residual_norms,
        key_bits=keys.bits,
        head_dim=keys.shape[3],
        rotation=keys.rotation,
        value_codes=values.codes,
        value_params=values.params,
        value_bits=values.bits,
        value_dim=values.shape[3],
        value_coding=values.coding,
        first=first,
        latent=latent,
    )


def history_of(keys: PackedKeys, values: PackedValues, first: Exact | None) -> History:
    """Packed tokens and the first ones as attention takes them, converted once."""
    return History(keys, values, first, native_history(keys, values, first).attend)


def without_oldest(history: History, n: int) -> History:
    """Less the first tokens and the oldest n coded ones, whole blocks; in the same memory."""

    def cut(x: mx.array | None, per: int = 1) -> Any:
        return None if x is None else x[:, :, n // per :]

    keys, values = history.packed_keys, history.packed_values
    keys = keys._replace(
        codes=cut(keys.codes),
        norms=cut(keys.norms),
        means=cut(keys.means, BLOCK),
        signs=cut(keys.signs),
        residual_norms=cut(keys.residual_norms),
    )
    return history_of(keys, values._replace(codes=cut(values.codes), params=cut(values.params)), None)


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
        if r.means:
            keys = quantize_blocks(tokens.keys, r.key_bits, self.balance, r.qjl, r.rotation, None)
        else:
            keys = quantize_keys(tokens.keys, r.key_bits, None, self.balance, r.qjl, r.rotation, None)
        values = quantize_values(tokens.values, r.value_bits, r.value_coding, r.rotation, None)
        return [*keys[: self.n_key_parts], *values, *keys[self.n_key_parts :]]

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
        return history_of(*self.pack(parts), first)

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

    def stores(self, parts: Sequence[mx.array], begin: int, end: int, added: Sequence[mx.array]) -> list[Store]:
        """The blocks from token `begin` to token `end` and others behind them; room as before, if that is enough."""
        n_tokens, room = end - begin + added[0].shape[2], parts[0].shape[2]
        if begin or n_tokens > room:
            room = coded_room(n_tokens)
        all_parts = zip(parts, added, self.per_row, strict=True)
        return [Store(x, begin // per, (end - begin) // per, new, room // per) for x, new, per in all_parts]

    def empty(self, batch: int, n_kv_heads: int) -> list[mx.array]:
        """Packed arrays of no tokens."""
        no_keys = mx.zeros((batch, n_kv_heads, 0, self.head_dim))
        return self.encode(Exact(no_keys, mx.zeros((batch, n_kv_heads, 0, self.value_dim))))


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
