"""What the caches of one sequence and of a batch both keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar, Self

import mlx.core as mx

from tqext.kv.codec import Codec, History
from tqext.kv.schedule import BLOCK, MAX_CODED
from tqext.kv.tokens import Exact
from tqext.presets import Recipe


class Buffers:
    """What the caches of one sequence and of a batch keep.

    A bounded cache drops its oldest blocks whole. Until the first block is encoded all tokens are in the buffer of recent
    tokens, the first ones as well; then the first ones get their own.
    """

    is_latent: ClassVar[bool] = False
    recipe: Recipe
    max_size: int | None
    _balance: mx.array | None
    _codec: Codec | None
    _packed: list[mx.array]
    _now: History | None  # None after the coded or the first tokens changed
    _first: Exact | None
    _tail: Exact | None

    def _open(self, keys: mx.array, values: mx.array) -> None:
        """Make room for tokens like these."""
        if self._balance is not None:
            expected = (keys.shape[1], keys.shape[3])
            if self._balance.shape != expected:
                raise ValueError(f"[update_and_fetch] keys: expected {self._balance.shape} as the balance has, got {expected}")
        self._codec = self._make_codec(keys.shape[3], values.shape[3], self._balance, values.dtype)
        self._packed = self._codec.empty(*keys.shape[:2])
        self._now = None
        self._tail = Exact(*(mx.zeros((*x.shape[:2], 0, x.shape[3]), x.dtype) for x in (keys, values)))

    def _make_codec(self, head_dim: int, value_dim: int, balance: mx.array | None, value_dtype: mx.Dtype) -> Codec:
        """The codec of the recipe; ``value_dtype`` is that of the exact values."""
        return Codec(self.recipe, head_dim, value_dim, balance)

    @property
    def _most_coded(self) -> int:
        """Coded tokens that a bounded cache keeps; the recent ones may be a block more than `tail`."""
        if self.max_size is None:
            return MAX_CODED
        return (self.max_size - self.recipe.first - self.recipe.tail - BLOCK) // BLOCK * BLOCK

    def _history(self, n_coded: int, first: Exact | None) -> History:
        """The coded and the first tokens as attention takes them: the same object until the next block."""
        if self._now is None:
            assert self._codec is not None
            self._now = self._codec.history(self._codec.cut(self._packed, 0, n_coded), first)
        return self._now

    @property
    def balance(self) -> mx.array | None:
        """float32 ``[n_kv_heads, head_dim]``, or None: what the keys are multiplied with before they are coded."""
        return self._balance

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room for growth included; the balance is the model's."""
        exact = sum(part.nbytes for part in (self._first, self._tail) if part is not None)
        return int(exact + sum(x.nbytes for x in self._packed))

    @property
    def keys(self) -> mx.array | None:
        """The exact recent keys: pipeline-parallel models hang the next stage's dependency on them."""
        return None if self._tail is None else self._tail.keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        assert self._tail is not None
        self._tail = self._tail._replace(keys=value)

    @property
    def values(self) -> mx.array:
        """None to give: mlx-lm's own caches ask for them when they take a compressed cache for one of theirs."""
        raise ValueError(
            f"[batch] caches: expected caches of one kind, got mlx-lm's own together with {type(self).__name__}; "
            "tqext.upgrade compresses mlx-lm's own"
        )

    @property
    def to_quantized(self) -> Callable[..., object]:
        """What mlx-lm's ``kv_bits`` looks for."""
        raise ValueError(
            f"[generate] kv_bits: expected None for a compressed cache ({type(self).__name__}), which is quantised already; "
            "leave it out, or tqext.detach(model)"
        )

    def is_trimmable(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.recipe.label}, {self._contents()})"

    def _contents(self) -> str:
        """What is held, for a repr, which fails in no state."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy that shares the balance, which never changes."""
        out = copy.copy(self)
        memo[id(self)] = out
        if self._balance is not None:
            memo[id(self._balance)] = self._balance
        # Not what holds its buffers: the copy has others.
        vars(out).update(copy.deepcopy({**vars(self), "_now": None}, memo))
        return out
