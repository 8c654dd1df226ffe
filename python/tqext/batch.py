"""The cache of a batch whose sequences keep exactly what each would have alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tqext.cache import (
    GROWTH,
    MAX_STEP_TOKENS,
    Alone,
    Buffers,
    Codec,
    Exact,
    Snapshot,
    TurboQuantKVCache,
    crosses_block,
    flush_at,
    n_for_mean,
    resize_tokens,
    wait_for_readers,
)
from tqext.presets import Recipe

Ints = npt.NDArray[np.int32]
FIRST, CODED, TAIL = 0, 1, 2


class _LastMask(threading.local):
    """The mask made last in this thread, and what it is the mask of."""

    mask: mx.array | None = None
    key: tuple[Any, ...] = ()


class _LastTranslation(threading.local):
    mask: mx.array | None = None
    key: tuple[Any, ...] = ()
    translated: mx.array | None = None


_last_mask = _LastMask()
_last_translation = _LastTranslation()


class Columns:
    """Where the tokens of a ragged batch are, for one step: in our columns and in those of mlx-lm's masks.

    mlx-lm pads sequences on the left, so that token t of sequence b is in column ``left_padding[b] + t`` of a mask. Ours
    are in the columns of three parts (first, coded, tail), each filled from its left, and then come the step's own tokens.

    Args:
        counts: int32 ``[B, 3]``, tokens of each part before the step.
        widths: Columns of each part.
        n_new: The step's own tokens; 0 if they are already counted in the tail.
        left_padding: As mlx-lm counts it, before the step.
        n_stock: Columns of mlx-lm's masks before the step.
        plain: Whether all of the step's tokens are real, or padded on the right only.
    """

    __slots__ = ("counts", "left_padding", "n_new", "n_queries", "n_stock", "plain", "widths")

    def __init__(
        self,
        counts: Ints,
        widths: tuple[int, int, int],
        n_new: int,
        left_padding: Ints,
        n_stock: int,
        plain: bool,
        n_queries: int,
    ) -> None:
        self.counts = counts
        self.widths = widths
        self.n_new = n_new
        self.left_padding = left_padding
        self.n_stock = n_stock
        self.plain = plain
        self.n_queries = n_queries

    def translate(self, mask: mx.array | str | None, n_queries: int) -> tuple[mx.array | str | None, mx.array | None]:
        """The mask and lengths for attention of a mask in mlx-lm's columns."""
        if self.plain and (mask is None or self.is_own(mask, n_queries) or isinstance(mask, str)):
            # One query sees its own token and all before; without own columns its token is counted in the tail.
            causal = mask is not None and self.n_new > 0
            lengths = self.counts
            if mask is None and self.n_new:
                raise ValueError("[attend] mask: expected a mask for several new tokens of a batch, got None")
            return ("causal" if causal else None), mx.array(lengths)
        if not isinstance(mask, mx.array):
            raise ValueError("[attend] mask: expected an array for a batch padded on the left, got " + str(mask))
        return self._gather(mask), None

    def is_own(self, mask: Any, n_queries: int) -> bool:
        """Whether a mask is the one that `BatchTurboQuantKVCache.make_mask` made for this step."""
        return mask is _last_mask.mask and mask is not None and _last_mask.key == self.mask_key(n_queries)

    def mask_key(self, n_queries: int) -> tuple[Any, ...]:
        return (n_queries, self.n_stock, self.left_padding.tobytes())

    def _gather(self, mask: mx.array) -> mx.array:
        """The mask in our columns; the layers of a step share it."""
        memo = _last_translation
        key = (self.counts.tobytes(), self.widths, self.n_new, self.n_stock, self.left_padding.tobytes())
        if memo.mask is not mask or memo.key != key or memo.translated is None:
            memo.translated = self._gather_columns(mask)
            memo.mask, memo.key = mask, key
        return memo.translated

    def _gather_columns(self, mask: mx.array) -> mx.array:
        counts, valid, columns = self.counts, [], []
        start = self.left_padding.copy()
        for part, width in enumerate(self.widths):
            index = np.arange(width, dtype=np.int32)[None]
            valid.append(index < counts[:, part, None])
            columns.append(start[:, None] + index)
            start = start + counts[:, part]
        own = np.broadcast_to(np.arange(self.n_stock, self.n_stock + self.n_new, dtype=np.int32), (len(counts), self.n_new))
        columns.append(own)
        valid.append(np.ones(own.shape, dtype=bool))
        is_valid = mx.array(np.concatenate(valid, axis=1))[:, None, None]
        index_array = mx.array(np.where(np.concatenate(valid, axis=1), np.concatenate(columns, axis=1), 0))[:, None, None]
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        shape = (len(counts), *mask.shape[1:])
        index_array = mx.broadcast_to(index_array, (*shape[:-1], index_array.shape[-1]))
        taken = mx.take_along_axis(mx.broadcast_to(mask, shape), index_array, axis=-1)
        masked = mx.array(False) if mask.dtype == mx.bool_ else mx.array(-float("inf"), mask.dtype)
        return mx.where(is_valid, taken, masked)


class BatchTurboQuantKVCache(Buffers):
    """The cache of one layer for a batch: in place of mlx-lm's ``BatchKVCache``.

    Every sequence has its own numbers of first, coded and recent tokens and encodes on its own schedule, so it holds the
    bytes it would hold alone. `offset`, `left_padding` and `make_mask` speak of the left-padded batch that mlx-lm thinks of.

    Args:
        left_padding: Padding of each sequence of the prompt to come.
        recipe: See `TurboQuantKVCache`.
        shared: See `TurboQuantKVCache`.
    """

    def __init__(self, left_padding: Sequence[int], recipe: Recipe | None = None, *, shared: bool = False) -> None:
        self.recipe = recipe or Recipe()
        self.shared = shared
        self._last: Snapshot | None = None
        n = len(left_padding)
        self._codec: Codec | None = None
        self._mean: mx.array | None = None
        self._packed: list[mx.array] = []
        self._first: Exact | None = None
        self._tail: Exact | None = None
        self._counts: Ints = np.zeros((n, 3), np.int32)
        self._has_mean = np.zeros(n, bool)
        self._left_padding: Ints = np.array(left_padding, np.int32).reshape(n)
        self._idx = 0  # columns of mlx-lm's left-padded batch
        self._skip = self._left_padding.copy()  # padding of each sequence that is still to come
        self._right_padding: Ints | None = None
        self._remaining: Ints | None = None  # real tokens of each sequence that are still to come

    # Writing

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        """Append tokens and return what the step attends to.

        Args:
            keys: ``[B, n_kv_heads, L, D]``, padding included.
            values: ``[B, n_kv_heads, L, Dv]``.

        Returns:
            The same snapshot twice.
        """
        before = {**vars(self), "_counts": self._counts.copy(), "_has_mean": self._has_mean.copy()}
        try:
            return self._update(keys, values)
        except BaseException:  # as in TurboQuantKVCache
            vars(self).update(before)
            raise

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        self._last = None
        if self._codec is None:
            self._open(keys, values)
        n_new = keys.shape[2]
        skip = np.minimum(self._skip, n_new)
        n_real = n_new - skip
        if self._remaining is not None:
            n_real = np.minimum(n_real, self._remaining)
            self._remaining = self._remaining - n_real
        self._flush(n_real > 0)
        self._skip = self._skip - skip
        tokens = Exact(keys, values)
        if n_new == 1 and (n_real == 1).all() and (self._n_missing_first() == 0).all():
            snapshot = self._step(tokens)
        else:
            snapshot = self._extend_tail(tokens, skip.astype(np.int32), n_real.astype(np.int32))
        self._idx += n_new
        self._last = snapshot if self.shared else None
        return snapshot, snapshot

    def _open(self, keys: mx.array, values: mx.array) -> None:
        batch, n_kv_heads = keys.shape[:2]
        _check_rows(batch == len(self._counts), len(self._counts), batch)
        super()._open(keys, values)
        self._mean = mx.zeros((batch, n_kv_heads, keys.shape[-1])) if self.recipe.mean else None

    @property
    def _tail_room(self) -> int:
        return flush_at(self.recipe, bool(self._has_mean.all())) + MAX_STEP_TOKENS

    def _n_missing_first(self) -> Ints:
        """First tokens that each sequence has yet to get."""
        missing = np.maximum(self.recipe.sinks - self._counts[:, FIRST], 0)
        return np.where(self._counts[:, CODED] > 0, 0, missing).astype(np.int32)

    def _step(self, tokens: Exact) -> Snapshot:
        """One real token for every sequence."""
        assert self._tail is not None
        at = self._counts[:, TAIL]
        if at.max() >= self._tail.n_tokens:
            self._tail = self._tail.resized(int(at.max()) + MAX_STEP_TOKENS)
        if (at == at[0]).all():
            self._tail.write(int(at[0]), tokens)
        else:
            index = mx.array(at)[:, None, None, None]
            self._tail = Exact(*(put_tokens(x, index, new) for x, new in zip(self._tail, tokens, strict=True)))
        self._counts[:, TAIL] += 1
        return self._snapshot(self._tail, 0, plain=True, n_queries=1)

    def _extend_tail(self, tokens: Exact, skip: Ints, n_real: Ints) -> Snapshot:
        """Any number of tokens, of which some sequences have fewer than others."""
        assert self._tail is not None
        n_tail = self._counts[:, TAIL].copy()
        width = int(n_tail.max())
        joined = self._tail.cut(0, width).then(tokens)
        snapshot = self._snapshot(joined, tokens.n_tokens, plain=not skip.any(), n_queries=tokens.n_tokens)
        snapshot.alone = self._alone(tokens, skip, n_real)
        n_held = n_tail + n_real
        n_first = np.minimum(self._n_missing_first(), n_held)
        if n_first.any():
            self._keep_first(joined, n_tail, width, skip, n_first)
        rest = n_held - n_first
        n_flushed = np.where(n_real > MAX_STEP_TOKENS, self._n_to_flush(rest), 0)
        columns = _StreamColumns(n_tail, width, skip, n_first)
        self._encode(joined, columns, rest, n_flushed)
        left = rest - n_flushed
        self._move_tail(joined, columns, n_flushed, left)
        return snapshot

    def _alone(self, tokens: Exact, skip: Ints, n_real: Ints) -> tuple[Alone, ...]:
        """Sequences that a block is encoded for within a few new tokens; each token finds what it would find alone."""
        goes_on = self._counts.sum(axis=1) > 0
        rows = np.flatnonzero(goes_on & crosses_block(n_real, self._counts[:, TAIL], self._flush_at))
        out = []
        for row in rows.tolist():
            begin, end = int(skip[row]), int(skip[row] + n_real[row])
            own = Exact(*(x[row : row + 1, :, begin:end] for x in tokens))
            out.append(Alone(row, begin, end, self._view(row)._draft_snapshot(own)))
        return tuple(out)

    @property
    def _flush_at(self) -> Ints:
        """The tail's length, for each sequence, at which its oldest tokens are encoded."""
        return np.where(self._has_mean, flush_at(self.recipe, True), flush_at(self.recipe, False)).astype(np.int32)

    def _flush(self, rows: npt.NDArray[np.bool_]) -> None:
        """Encode the oldest tokens of each of these sequences whose tail is full."""
        assert self._tail is not None
        n_tail = self._counts[:, TAIL].copy()
        n_flushed = np.where(rows, self._n_to_flush(n_tail), 0).astype(np.int32)
        if not n_flushed.any():
            return
        zeros = np.zeros_like(n_tail)
        columns = _StreamColumns(n_tail, 0, zeros, zeros)
        self._encode(self._tail, columns, n_tail, n_flushed)
        self._move_tail(self._tail, columns, n_flushed, n_tail - n_flushed)

    def _n_to_flush(self, n_tail: Ints) -> Ints:
        r = self.recipe
        return np.where(n_tail >= self._flush_at, (n_tail - r.tail) // r.flush * r.flush, 0).astype(np.int32)

    def _keep_first(self, joined: Exact, n_tail: Ints, width: int, skip: Ints, n_first: Ints) -> None:
        assert self._first is not None
        held = self._counts[:, FIRST]
        slots = np.arange(self.recipe.sinks, dtype=np.int32)[None]
        stream = _StreamColumns(n_tail, width, skip, np.zeros_like(skip)).of(slots - held[:, None])
        index = np.where(slots < held[:, None], slots, self.recipe.sinks + stream)
        self._first = _take(self._first.then(joined), index)
        self._counts[:, FIRST] += n_first

    def _encode(self, source: Exact, columns: _StreamColumns, n_held: Ints, n_flushed: Ints) -> None:
        """Encode the first `n_flushed` tokens that each sequence has in `source`."""
        rows = np.flatnonzero(n_flushed)
        if not len(rows):
            return
        assert self._codec is not None
        self._fix_mean(source, columns, n_held, rows)
        mean = None if self._mean is None else _rows(self._mean, rows)
        n = n_flushed[rows]
        index = columns.of(np.arange(n.max(), dtype=np.int32)[None])[rows]
        tokens = _take(Exact(*(_rows(x, rows) for x in source)), index)
        self._write_packed(self._codec.encode(tokens, mean), rows, n)

    def _fix_mean(self, source: Exact, columns: _StreamColumns, n_held: Ints, rows: npt.NDArray[Any]) -> None:
        fresh = rows[~self._has_mean[rows]]
        if self._mean is None or not len(fresh):
            return
        n = np.array([n_for_mean(int(held)) for held in n_held[fresh]], np.int32)
        slots = np.arange(n.max(), dtype=np.int32)[None]
        keys = _take_tokens(_rows(source.keys, fresh), columns.of(slots)[fresh]).astype(mx.float32)
        held = mx.array(slots < n[:, None])[:, None, :, None]
        sums = mx.where(held, keys, 0.0).sum(axis=2)
        self._mean[mx.array(fresh)] = sums / mx.array(n)[:, None, None]
        self._has_mean[fresh] = True

    def _write_packed(self, parts: Sequence[mx.array], rows: npt.NDArray[Any], n: Ints) -> None:
        begin = self._counts[rows, CODED]
        end = int((begin + n).max())
        if end > self._packed[0].shape[2]:
            room = (end + GROWTH - 1) // GROWTH * GROWTH
            kept = int(self._counts[:, CODED].max())
            self._packed = [resize_tokens(x[:, :, :kept], room) for x in self._packed]
        else:
            wait_for_readers(self._packed)
        for buffer, new in zip(self._packed, parts, strict=True):
            if len(rows) == len(self._counts) and (begin == begin[0]).all() and (n == n[0]).all():
                buffer[:, :, int(begin[0]) : end] = new
                continue
            for i, (row, b, count) in enumerate(zip(rows.tolist(), begin.tolist(), n.tolist(), strict=True)):
                buffer[row : row + 1, :, b : b + count] = new[i : i + 1, :, :count]
        self._counts[rows, CODED] += n

    def _move_tail(self, source: Exact, columns: _StreamColumns, n_dropped: Ints, n_left: Ints) -> None:
        """Make the tail of what follows the first `n_dropped` tokens of each sequence."""
        slots = np.arange(n_left.max(), dtype=np.int32)[None]
        index = np.minimum(columns.of(slots + n_dropped[:, None]), source.n_tokens - 1)
        self._counts[:, TAIL] = n_left
        room = max(int(n_left.max()), self._tail_room)
        self._tail = _take(source, index).resized(room)

    # Reading

    def _snapshot(self, tail: Exact, n_new: int, *, plain: bool, n_queries: int) -> Snapshot:
        assert self._codec is not None and self._first is not None
        counts = self._counts.copy()
        n_first, n_coded, n_tail = (int(n) for n in counts.max(axis=0))
        packed = self._codec.pack([x[:, :, :n_coded] for x in self._packed], self._mean)
        first = self._first.cut(0, n_first) if n_first else None
        columns = Columns(counts, (n_first, n_coded, n_tail), n_new, self._left_padding.copy(), self._idx, plain, n_queries)
        return Snapshot(packed, first, tail.cut(0, n_tail + n_new), self._idx + n_queries, columns)

    def keys_and_values(self) -> tuple[Snapshot, Snapshot]:
        """The snapshot of the last step, twice (see `TurboQuantKVCache.keys_and_values`)."""
        if self._tail is None:
            raise ValueError("[keys_and_values] cache: expected tokens, got an empty cache")
        self.shared = True
        snapshot = self._last or self._snapshot(self._tail, 0, plain=True, n_queries=0)
        return snapshot, snapshot

    @property
    def offset(self) -> mx.array:
        """int32 ``[B]``: tokens of each sequence (less than none while its padding is to come)."""
        return mx.array(self._idx - self._left_padding)

    @property
    def left_padding(self) -> mx.array:
        """int32 ``[B]``: mlx-lm's padding of each sequence."""
        return mx.array(self._left_padding)

    def size(self) -> int:
        """Columns of the left-padded batch."""
        return self._idx

    def empty(self) -> bool:
        """Whether no token is stored."""
        return self._codec is None

    @property
    def state(self) -> list[mx.array]:
        """All arrays, for ``mx.eval``. Sequences are saved one by one, from `extract`."""
        self._last = None
        if self._tail is None or self._first is None:
            return []
        mean = [] if self._mean is None else [self._mean]
        return [*mean, *self._first, *self._tail, *self._packed]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool ``[B, 1, N, columns]`` of the left-padded batch."""
        columns = mx.arange(self._idx + N)[None]
        rows = mx.arange(self._idx, self._idx + N)[:, None]
        mask = rows >= columns
        if window_size is not None:
            mask = mask & (rows < columns + window_size)
        mask = mask & (self.left_padding[:, None, None, None] <= columns)
        if window_size is None:
            _last_mask.mask, _last_mask.key = mask, (N, self._idx, self._left_padding.tobytes())
        return mask

    # Padding

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a padded prompt.

        Args:
            left_padding: More padding before each sequence; only for an empty cache.
            lengths: Real tokens of each sequence in the prompt.
            right_padding: Padding after them.

        Raises:
            ValueError: Left padding for a cache with tokens, or right padding without lengths.
        """
        if left_padding is not None:
            if self._codec is not None:
                raise ValueError("[prepare] left_padding: expected an empty cache, got one with tokens")
            more = np.array(left_padding, np.int32)
            self._left_padding = self._left_padding + more
            self._skip = self._skip + more
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("[prepare] lengths: expected the real tokens of each sequence, got None")
            self._right_padding = np.array(right_padding, np.int32)
            self._remaining = np.array(lengths, np.int32)

    def finalize(self) -> None:
        """The padded prompt is complete. Nothing moves: its padding was never stored."""
        if self._right_padding is not None:
            self._left_padding = self._left_padding + self._right_padding
        self._right_padding = self._remaining = None

    # Trimming

    def trim(self, n: int) -> int:
        """Forget the last n tokens of every sequence; returns how many columns are gone."""
        n = min(n, self._idx)
        for counts, has_mean in zip(self._counts, range(len(self._counts)), strict=True):
            missing = n
            for part in (TAIL, CODED, FIRST):
                cut = min(missing, int(counts[part]))
                counts[part] -= cut
                missing -= cut
                if part == CODED and cut and not counts[CODED]:
                    self._has_mean[has_mean] = False
        self._idx -= n
        self._left_padding = np.minimum(self._left_padding, self._idx)
        return n

    # Rows

    def filter(self, batch_indices: Any) -> None:
        """Keep the sequences of these indices, in this order."""
        rows = np.array(batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices, np.int64)
        self._counts = self._counts[rows]
        self._has_mean = self._has_mean[rows]
        self._left_padding = self._left_padding[rows]
        self._skip = self._skip[rows]
        if self._remaining is not None and self._right_padding is not None:
            self._remaining, self._right_padding = self._remaining[rows], self._right_padding[rows]
        if self._tail is not None and self._first is not None:
            self._mean = None if self._mean is None else _rows(self._mean, rows)
            self._first = Exact(*(_rows(x, rows) for x in self._first))
            self._tail = Exact(*(_rows(x, rows) for x in self._tail))
            room = (int(self._counts[:, CODED].max(initial=0)) + GROWTH - 1) // GROWTH * GROWTH
            self._packed = [_rows(x[:, :, :room], rows) for x in self._packed]
        shared = int(self._left_padding.min(initial=self._idx))
        self._left_padding = self._left_padding - shared
        self._idx -= shared

    def extend(self, other: BatchTurboQuantKVCache) -> None:
        """Append the sequences of another batch.

        Raises:
            ValueError: The other batch has another recipe, or is not compressed.
        """
        _check_compressed(other, BatchTurboQuantKVCache, "[extend] other")
        if other.recipe != self.recipe:
            raise ValueError(f"[extend] other: expected the recipe {self.recipe}, got {other.recipe}")
        width = max(self._idx, other._idx)
        paddings = [c._left_padding + (width - c._idx) for c in (self, other)]
        counts = np.concatenate([self._counts, other._counts])
        parts = _joined([self, other])
        self._left_padding = np.concatenate(paddings).astype(np.int32)
        self._skip = np.concatenate([self._skip, other._skip])
        self._has_mean = np.concatenate([self._has_mean, other._has_mean])
        self._counts = counts
        self._idx = width
        if parts is not None:
            self._codec, self._mean, self._first, self._tail, self._packed = parts

    def _view(self, idx: int) -> TurboQuantKVCache:
        """The cache of one sequence, on the arrays of the batch."""
        out = TurboQuantKVCache(self.recipe, shared=self.shared)
        if self._codec is None or self._tail is None or self._first is None:
            return out
        row = slice(idx, idx + 1)
        out._codec = self._codec
        out.n_first, out.n_coded, out.n_tail = (int(n) for n in self._counts[idx])
        out._mean = self._mean[row] if self._mean is not None and self._has_mean[idx] else None
        out._packed = [x[row, :, : out.n_coded] for x in self._packed]
        out._tail = Exact(*(x[row, :, : out.n_tail] for x in self._tail))
        if self.recipe.sinks:
            out._first = Exact(*(x[row, :, : out.n_first] for x in self._first)).resized(self.recipe.sinks)
        return out

    def extract(self, idx: int) -> TurboQuantKVCache:
        """The cache of one sequence, as if it had been alone."""
        out = self._view(idx)
        out._packed = [resize_tokens(x, out.n_coded) for x in out._packed]
        if out._tail is not None:
            out._tail = out._tail.resized(max(out.n_tail, out._tail_room))
        return out

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """A batch of single caches, which may be empty.

        Raises:
            ValueError: They have different recipes, or some are not compressed.
        """
        for cache in caches:
            _check_compressed(cache, TurboQuantKVCache, "[merge] caches")
        batches = [_batch_of_one(cache) for cache in caches]
        merged = batches[0]
        for other in batches[1:]:
            if other.recipe != merged.recipe:
                raise ValueError(f"[merge] caches: expected the recipe {merged.recipe}, got {other.recipe}")
        if len(batches) > 1:
            parts = _joined(batches)
            merged._idx = max(b._idx for b in batches)
            merged._left_padding = np.array([merged._idx - int(b._counts.sum()) for b in batches], np.int32)
            merged._skip = np.zeros(len(batches), np.int32)
            merged._has_mean = np.concatenate([b._has_mean for b in batches])
            merged._counts = np.concatenate([b._counts for b in batches])
            if parts is not None:
                merged._codec, merged._mean, merged._first, merged._tail, merged._packed = parts
        return merged


class _StreamColumns:
    """Columns of an array ``[tail (width) | new tokens]`` in which each sequence has its tokens, in order.

    Args:
        n_tail: Tokens that each sequence has in the tail.
        width: The tail's columns.
        skip: Padding before each sequence's new tokens.
        begin: Tokens to leave out at the start.
    """

    def __init__(self, n_tail: Ints, width: int, skip: Ints, begin: Ints) -> None:
        self.n_tail = n_tail[:, None]
        self.jump = (width + skip - n_tail)[:, None]
        self.begin = begin[:, None]

    def of(self, tokens: npt.NDArray[Any]) -> Ints:
        """The column of the token of that number; ``tokens`` is ``[B or 1, n]``."""
        tokens = np.maximum(tokens + self.begin, 0)
        return np.where(tokens < self.n_tail, tokens, tokens + self.jump).astype(np.int32)


def _check_rows(ok: bool, expected: int, got: int) -> None:
    if not ok:
        raise ValueError(f"[update_and_fetch] keys: expected {expected} sequences, got {got}")


def _check_compressed(cache: Any, kind: type, what: str) -> None:
    if not isinstance(cache, kind):
        raise ValueError(
            f"{what}: expected compressed caches ({kind.__name__}), got a {type(cache).__name__} among them; "
            "tqext.upgrade compresses mlx-lm's own"
        )


def _rows(x: mx.array, rows: npt.NDArray[Any]) -> mx.array:
    if len(rows) == x.shape[0] and (rows == np.arange(len(rows))).all():
        return x
    return x[mx.array(rows.astype(np.int32))]


def _take_tokens(x: mx.array, index: Ints) -> mx.array:
    """``x [B, H, T, D]`` at the columns ``index [B, n]``."""
    n = index.shape[1]
    if n and (index == index[:1, :1] + np.arange(n)).all() and index[0, 0] + n <= x.shape[2]:
        return x[:, :, int(index[0, 0]) : int(index[0, 0]) + n]
    clipped = np.minimum(index, x.shape[2] - 1)
    wide = mx.broadcast_to(mx.array(clipped)[:, None, :, None], (*x.shape[:2], n, x.shape[3]))
    return mx.take_along_axis(x, wide, axis=2)


def _take(tokens: Exact, index: Ints) -> Exact:
    return Exact(_take_tokens(tokens.keys, index), _take_tokens(tokens.values, index))


def put_tokens(x: mx.array, index: mx.array, new: mx.array) -> mx.array:
    """``x [B, H, T, D]`` with one token of each sequence, ``new [B, H, 1, D]``, at column ``index [B, 1, 1, 1]``."""
    wide = mx.broadcast_to(index, (*x.shape[:2], 1, x.shape[3]))
    return mx.put_along_axis(x, wide, new.astype(x.dtype), axis=2)


def _batch_of_one(cache: TurboQuantKVCache) -> BatchTurboQuantKVCache:
    out = BatchTurboQuantKVCache([0], cache.recipe, shared=cache.shared)
    if cache._codec is None or cache._tail is None:
        return out
    batch, n_kv_heads = cache._tail.keys.shape[:2]
    _check_rows(batch == 1, 1, batch)
    out._codec = cache._codec
    out._counts = np.array([[cache.n_first, cache.n_coded, cache.n_tail]], np.int32)
    out._has_mean = np.array([cache._mean is not None])
    out._idx = cache.offset
    if cache.recipe.mean:
        out._mean = mx.zeros((1, n_kv_heads, cache._codec.head_dim)) if cache._mean is None else cache._mean[:]
    out._packed = [x[:, :, : cache.n_coded] for x in cache._packed]
    out._tail = cache._tail.cut(0, cache.n_tail)
    first = cache._tail.cut(0, 0) if cache._first is None else cache._first.cut(0, cache.n_first)
    out._first = first.resized(cache.recipe.sinks)
    return out


_Parts = tuple[Codec, mx.array | None, Exact, Exact, list[mx.array]]


def _joined(caches: Sequence[BatchTurboQuantKVCache]) -> _Parts | None:
    """The arrays of several batches as those of one, each part padded on its right. None if no batch has any."""
    model = next((c for c in caches if c._codec is not None), None)
    if model is None or model._codec is None or model._tail is None:
        return None
    like = model._tail
    n_coded = max(int(c._counts[:, CODED].max(initial=0)) for c in caches)
    n_coded = (n_coded + GROWTH - 1) // GROWTH * GROWTH
    n_tail = max(max(int(c._counts[:, TAIL].max(initial=0)), c._tail_room) for c in caches)
    means, firsts, tails, packed = [], [], [], []
    for c in caches:
        if c._tail is None or c._first is None:
            nothing = BatchTurboQuantKVCache([0] * len(c._counts), c.recipe)
            nothing._open(*(mx.zeros((len(c._counts), x.shape[1], 0, x.shape[3]), x.dtype) for x in like))
            c = nothing
        assert c._tail is not None and c._first is not None
        means.append(c._mean)
        firsts.append(c._first)
        tails.append(c._tail.resized(n_tail))
        packed.append([resize_tokens(x, n_coded) for x in c._packed])
    mean = mx.concatenate([m for m in means if m is not None]) if model.recipe.mean else None
    first, tail = (
        Exact(mx.concatenate([p.keys for p in part]), mx.concatenate([p.values for p in part])) for part in (firsts, tails)
    )
    return model._codec, mean, first, tail, [mx.concatenate(list(x)) for x in zip(*packed, strict=True)]
