"""The cache of sequences that begin with the same tokens, which it keeps once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from tqext.kv.batch import BatchTurboQuantKVCache
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.codec import History
from tqext.kv.schedule import trim_count
from tqext.kv.snapshot import AttendsItself, Snapshot
from tqext.kv.tokens import Exact
from tqext.ops import folded, joined, unfolded


class _LastMask(threading.local):
    whole: mx.array | None = None
    own: mx.array | None = None


_last_mask = _LastMask()


class ForkedSnapshot(AttendsItself):
    """What a layer attends to in one step: the shared tokens, then the snapshot of each sequence's own ones."""

    __slots__ = ("n_shared", "own", "prefix")

    def __init__(self, prefix: History, n_shared: int, own: Snapshot) -> None:
        self.prefix = prefix
        self.n_shared = n_shared
        self.own = own

    def __deepcopy__(self, memo: dict[int, object]) -> ForkedSnapshot:
        """Itself: nothing can change it."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        batch, n_heads, n_tokens, head_dim = self.own.shape
        return batch, n_heads, self.n_shared + n_tokens, head_dim

    @property
    def dtype(self) -> mx.Dtype:
        return self.own.dtype

    def attend(
        self, queries: mx.array, scale: float, mask: mx.array | str | None = None, sinks: mx.array | None = None
    ) -> mx.array:
        """softmax(scale q k^T + mask) v of the queries ``[B, n_q_heads, L, D]`` over all tokens."""
        shared_mask, own_mask = self._parts_of(mask, queries)
        nothing = Exact(*(x[:1, :, :0] for x in self.own.tail))
        shared = self.prefix.attend(folded(queries), *nothing, scale, shared_mask, None, None, lse=True)
        own = self.own.attend(queries, scale, own_mask, sinks, lse=True)
        return joined(unfolded(shared, queries), own).astype(queries.dtype)

    def _parts_of(self, mask: mx.array | str | None, queries: mx.array) -> tuple[mx.array | None, mx.array | str | None]:
        """The mask of the shared tokens, for all queries as rows of one sequence, and that of the own ones."""
        if not isinstance(mask, mx.array):
            return None, mask
        if mask is _last_mask.whole:
            return None, _last_mask.own
        batch, n_heads, n_queries = queries.shape[:3]
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        if mask.shape[3] == 1:
            mask = mx.broadcast_to(mask, (*mask.shape[:3], self.shape[2]))
        shared = mx.broadcast_to(mask[..., : self.n_shared], (batch, n_heads, n_queries, self.n_shared))
        return folded(shared), mask[..., self.n_shared :]


class ForkedKVCache:
    """The cache of one layer for sequences that go on from the tokens of one cache, of which there is one copy.

    First and coded tokens are shared. The recent tokens of the cache, fewer than `tail` + 128 of its recipe, become the first
    ones of each sequence's own (`BatchTurboQuantKVCache`): every sequence encodes what it would encode alone.

    Args:
        cache: The layer's cache after the shared prompt. It may be used on: it does not change this one.
        n: Sequences.

    Raises:
        ValueError: No number of sequences, a cache that holds no coded token yet, is bounded, or is of several sequences.
    """

    def __init__(self, cache: TurboQuantKVCache, n: int) -> None:
        _check_number(n)
        if cache._codec is None or cache._tail is None or cache.n_coded == 0 or cache.max_size is not None:
            got = "a bounded one" if cache.max_size is not None else f"{cache.size()} exact tokens"
            raise ValueError(f"[fork] cache: expected an unbounded cache with coded tokens to share, got {got}")
        if cache.is_latent:
            raise ValueError(
                "[fork] cache: expected keys and values, got the latents of latent attention, which are not shared"
            )
        if cache._tail.keys.shape[0] != 1:
            raise ValueError(f"[fork] cache: expected one sequence, got {cache._tail.keys.shape[0]}")
        packed = cache._codec.resized(cache.coded_parts(0, cache.n_coded), cache.n_coded)
        self.shared_arrays: list[mx.array] = [*packed, *(cache._first or ())]
        self.n_shared = cache.n_first + cache.n_coded
        self._prefix = cache._codec.history(packed, cache._first)
        self.own = BatchTurboQuantKVCache([0] * n, replace(cache.recipe, first=0), balance=cache.balance)
        tail = cache._tail.cut(0, cache.n_tail)
        self._n_begun = tail.n_tokens
        self.own.update_and_fetch(*(mx.repeat(x, n, axis=0) for x in tail))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[ForkedSnapshot, ForkedSnapshot]:
        """As `BatchTurboQuantKVCache.update_and_fetch`."""
        own, _ = self.own.update_and_fetch(keys, values)
        snapshot = ForkedSnapshot(self._prefix, self.n_shared, own)
        return snapshot, snapshot

    @property
    def offset(self) -> mx.array:
        """int32 ``[B]``: tokens of each sequence."""
        return self.own.offset + self.n_shared

    def size(self) -> int:
        """Columns of mlx-lm's left-padded batch."""
        return self.n_shared + self.own.size()

    def empty(self) -> bool:
        return False

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool ``[B, 1, N, columns]``, as `BatchTurboQuantKVCache.make_mask`; not for layers with a window."""
        if window_size is not None:
            raise ValueError(f"[make_mask] window_size: expected None for tokens that sequences share, got {window_size}")
        own = self.own.make_mask(N)
        whole = mx.concatenate([mx.ones((*own.shape[:3], self.n_shared), dtype=mx.bool_), own], axis=3)
        _last_mask.whole, _last_mask.own = whole, own
        return whole

    def filter(self, batch_indices: mx.array | Sequence[int]) -> None:
        """Keep the sequences of these indices, in this order."""
        self.own.filter(batch_indices)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens of each sequence, shared ones not.

        Raises:
            ValueError: n is negative, or more than the sequences have of their own.
        """
        if trim_count(n) > self.own.size() - self._n_begun:
            raise ValueError(
                f"[trim] n: expected at most {self.own.size() - self._n_begun}, the tokens since the fork, got {n}"
            )
        return self.own.trim(n)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: one copy of what is shared, and the own ones."""
        return sum(x.nbytes for x in self.shared_arrays) + self.own.nbytes

    @property
    def state(self) -> list[object]:
        """All arrays, for ``mx.eval``; mlx-lm refuses to save it."""
        return [*self.shared_arrays, *self.own.state]

    def __repr__(self) -> str:
        return f"ForkedKVCache({self.n_shared} shared tokens, {self.own!r})"

    def __deepcopy__(self, memo: dict[int, object]) -> ForkedKVCache:
        """A copy that shares what is shared."""
        out = copy.copy(self)
        out.own = copy.deepcopy(self.own, memo)
        return out


def _check_number(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"[fork] n: expected a number of sequences, got {n!r}")


def fork(caches: Sequence[Any], n: int) -> list[Any]:
    """Caches of n sequences that go on from one prompt, of which the compressed layers keep one copy.

    Args:
        caches: A prompt cache of one sequence (`tqext.make_prompt_cache`), after the shared prompt.
        n: Sequences.

    Returns:
        A cache for each layer. Layers that are not compressed become mlx-lm's own batches, with a copy for each sequence.

    Raises:
        ValueError: As `ForkedKVCache`, and for what is no list of caches.
    """
    if not isinstance(caches, Sequence) or isinstance(caches, str):
        raise ValueError(f"[fork] caches: expected a list of caches, got {type(caches).__name__}")
    if other := next((c for c in caches if not hasattr(c, "merge")), None):
        raise ValueError(f"[fork] caches: expected caches of one sequence that can be batched, got {type(other).__name__}")
    _check_number(n)
    # Caches of other kinds may be built on the compressed one.
    return [ForkedKVCache(c, n) if type(c) is TurboQuantKVCache else c.merge([c] * n) for c in caches]
