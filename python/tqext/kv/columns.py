"""Where the tokens of a batch of unlike sequences are, and what mlx-lm's masks say of them."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Mask = mx.array | str | None
FIRST, CODED, TAIL = 0, 1, 2
NOWHERE = -(1 << 30)


class _LastMask(threading.local):
    """The mask made last in this thread, and what it is the mask of."""

    mask: mx.array | None = None
    key: tuple[object, ...] = ()


class _LastTranslation(threading.local):
    mask: mx.array | None = None
    key: tuple[object, ...] = ()
    translated: mx.array | None = None


class _LastPlaces(threading.local):
    key: tuple[object, ...] = ()
    found: tuple[mx.array, mx.array] | None = None


_last_places = _LastPlaces()
_last_mask = _LastMask()
_last_translation = _LastTranslation()


def note_mask(mask: mx.array, n_queries: int, n_stock: int, left_padding: Ints) -> None:
    """Remember what the mask is that a batch made for its next step: the plain causal one of its columns."""
    _last_mask.mask, _last_mask.key = mask, _mask_key(n_queries, n_stock, left_padding)


def _mask_key(n_queries: int, n_stock: int, left_padding: Ints) -> tuple[object, ...]:
    return (n_queries, n_stock, left_padding.tobytes())


class Columns:
    """Maps mlx-lm's mask columns (left-padded) to tqext's storage columns (first, coded, tail), for one step of a ragged batch.

    mlx-lm pads sequences on the left, so that token t of sequence b is in column ``left_padding[b] + t`` of a mask. Ours
    are in the columns of three parts (first, coded, tail), each filled from its left, and then come the step's own tokens.

    Args:
        counts: int32 ``[B, 3]``, tokens in the buffer of each part before the step.
        widths: Columns of each part.
        n_new: The step's own tokens; 0 if they are already counted in the tail.
        left_padding: As mlx-lm counts it, before the step.
        n_stock: Columns of mlx-lm's masks before the step.
        plain: Whether all of the step's tokens are real, or padded on the right only.
    """

    __slots__ = (
        "_begins",
        "_lengths",
        "_translated",
        "counts",
        "left_padding",
        "n_dropped",
        "n_new",
        "n_queries",
        "n_stock",
        "plain",
        "widths",
    )

    def __init__(
        self,
        counts: Ints,
        widths: tuple[int, int, int],
        n_new: int,
        left_padding: Ints,
        n_stock: int,
        plain: bool,
        n_queries: int,
        n_dropped: Ints,
    ) -> None:
        self._begins: dict[int, mx.array | None] = {}
        self._lengths: mx.array | None = None
        self._translated: tuple[Mask, int, tuple[Mask, mx.array | None]] | None = None
        self.n_dropped = n_dropped
        self.counts = counts
        self.widths = widths
        self.n_new = n_new
        self.left_padding = left_padding
        self.n_stock = n_stock
        self.plain = plain
        self.n_queries = n_queries

    def translate(self, mask: Mask, n_queries: int) -> tuple[Mask, mx.array | None]:
        """The mask and lengths for attention of a mask in mlx-lm's columns; the layers of a step share them."""
        if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1:
            return self._gather_columns(mask), None  # of each head: a layer's own scores, which no other layer shares
        memo = self._translated
        if memo is None or memo[0] is not mask or memo[1] != n_queries:
            self._translated = memo = mask, n_queries, self._translate(mask, n_queries)
        return memo[2]

    def _translate(self, mask: Mask, n_queries: int) -> tuple[Mask, mx.array | None]:
        if isinstance(mask, str) and mask != "causal":
            raise ValueError(f'[attend] mask: expected None, "causal" or an array, got "{mask}"')
        if self.plain and (mask is None or self.is_own(mask, n_queries) or isinstance(mask, str)):
            # One query sees its own token and all before; without own columns its token is counted in the tail.
            if mask is None and self.n_new:
                raise ValueError("[attend] mask: expected a mask for several new tokens of a batch, got None")
            return ("causal" if mask is not None and self.n_new > 0 else None), self.lengths
        if not isinstance(mask, mx.array):
            raise ValueError("[attend] mask: expected an array for a batch padded on the left, got " + str(mask))
        return self._gather(mask), None

    @property
    def lengths(self) -> mx.array:
        """int32 ``[B, 3]``: `counts`, for attention."""
        if self._lengths is None:
            self._lengths = mx.array(self.counts)
        return self._lengths

    def begins(self, window: int) -> mx.array | None:
        """int32 ``[B]``: where the last `window` tokens of each sequence begin. None if no sequence has more.

        Without own columns: the step's tokens are counted.
        """
        if window not in self._begins:
            left = np.maximum(self.counts.sum(axis=1) - window, 0)
            n_first, n_coded = self.counts[:, FIRST], self.counts[:, CODED]
            # Tokens to leave out, and the room behind the tokens of each part that they fill.
            jumps = np.where(left > n_first, self.widths[FIRST] - n_first, 0)
            jumps = jumps + np.where(left > n_first + n_coded, self.widths[CODED] - n_coded, 0)
            self._begins[window] = mx.array((left + jumps).astype(np.int32)) if left.any() else None
        return self._begins[window]

    def positions(self) -> tuple[Ints, Ints]:
        """int32 ``[B, stored columns]`` and ``[B, own columns]``: the place of each token in its sequence.

        Columns without a token are far before all of them.
        """
        places, start = [], self.n_dropped.copy()
        for part, width in enumerate(self.widths):
            index, n = np.arange(width, dtype=np.int32)[None], self.counts[:, part, None]
            places.append(np.where(index < n, start[:, None] + index, NOWHERE))
            start = start + self.counts[:, part]
        own = np.arange(self.n_stock, self.n_stock + self.n_new, dtype=np.int32)[None] - self.left_padding[:, None]
        return np.concatenate(places, axis=1).astype(np.int32), np.where(own >= start[:, None], own, NOWHERE).astype(np.int32)

    def is_own(self, mask: object, n_queries: int) -> bool:
        """Whether a mask is the one that `BatchTurboQuantKVCache.make_mask` made for this step."""
        key = _mask_key(n_queries, self.n_stock, self.left_padding)
        return mask is _last_mask.mask and mask is not None and _last_mask.key == key

    def _key(self) -> tuple[object, ...]:
        """All that the columns depend on."""
        arrays = (self.counts, self.left_padding, self.n_dropped)
        return (self.widths, self.n_new, self.n_stock, self.n_queries, *(x.tobytes() for x in arrays))

    def _gather(self, mask: mx.array) -> mx.array:
        """The mask in our columns; the layers of a step share it."""
        memo, key = _last_translation, self._key()
        if memo.mask is not mask or memo.key != key or memo.translated is None:
            memo.translated = self._gather_columns(mask)
            memo.mask, memo.key = mask, key
        return memo.translated

    def _gather_columns(self, mask: mx.array) -> mx.array:
        columns, is_valid = self._places()
        index_array = mx.array(np.where(is_valid, columns, 0))[:, None, None]
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        shape = (len(self.counts), *mask.shape[1:])
        index_array = mx.broadcast_to(index_array, (*shape[:-1], index_array.shape[-1]))
        taken = mx.take_along_axis(mx.broadcast_to(mask, shape), index_array, axis=-1)
        masked = mx.array(False) if mask.dtype == mx.bool_ else mx.array(-float("inf"), mask.dtype)
        return mx.where(mx.array(is_valid)[:, None, None], taken, masked)

    def of_stock(self) -> tuple[mx.array, mx.array]:
        """For each of mlx-lm's columns ``[B, 1, n, 1]``: ours, and whether it is a token's. The layers of a step share them."""
        memo = _last_places
        key = self._key()
        if memo.key != key or memo.found is None:
            columns, is_valid = self._places()
            own = np.zeros((len(self.counts), self.n_stock + self.n_queries), np.int32)
            there = np.zeros(own.shape, bool)
            rows, ours = np.nonzero(is_valid)
            own[rows, columns[rows, ours]] = ours
            there[rows, columns[rows, ours]] = True
            memo.found = mx.array(own)[:, None, :, None], mx.array(there)[:, None, :, None]
            memo.key = key
        return memo.found

    def _places(self) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """For each of our columns ``[B, n]``: mlx-lm's, and whether it is a token's."""
        counts, valid, columns = self.counts, [], []
        start = self.left_padding.copy()
        for part, width in enumerate(self.widths):
            index = np.arange(width, dtype=np.int32)[None]
            valid.append(index < counts[:, part, None])
            columns.append(start[:, None] + index)
            start = start + counts[:, part]
            if part == FIRST:
                start = start + self.n_dropped
        own = np.broadcast_to(np.arange(self.n_stock, self.n_stock + self.n_new, dtype=np.int32), (len(counts), self.n_new))
        columns.append(own)
        valid.append(np.ones(own.shape, dtype=bool))
        return np.concatenate(columns, axis=1), np.concatenate(valid, axis=1)


class StreamColumns:
    """Columns of an array ``[tail (width) | new tokens]`` in which each sequence has its tokens, in order.

    Args:
        n_tail: Tokens that each sequence has in the tail.
        width: The tail's columns.
        skip: Padding before each sequence's new tokens.
    """

    def __init__(self, n_tail: Ints, width: int, skip: Ints) -> None:
        self.n_tail = n_tail[:, None]
        self.jump = (width + skip - n_tail)[:, None]

    def of(self, tokens: npt.NDArray[Any]) -> Ints:
        """The column of the token of that number; ``tokens`` is ``[B or 1, n]``."""
        return np.where(tokens < self.n_tail, tokens, tokens + self.jump).astype(np.int32)
