"""What a layer with a sliding window attends to in one step."""

from __future__ import annotations

import functools
import threading

import mlx.core as mx
import numpy as np

from tqext.kv.codec import History, without_oldest
from tqext.kv.columns import Columns
from tqext.kv.schedule import BLOCK
from tqext.kv.snapshot import Alone, Snapshot
from tqext.kv.tokens import Exact

# Queries of a prompt that attend at once: 2048 of them after a window of 1024 tokens are 6 million scores, of which a third is
# seen. In pieces of 256 queries it is three quarters of 2.6 million.
PIECE = 256


class WindowSnapshot(Snapshot):
    """A `Snapshot` whose queries see the last `window` tokens each, themselves included.

    A query's place tells what it sees, so a mask says nothing more than ``"causal"``. For one sequence an array may come
    instead, over the columns of the snapshot, as ``make_mask`` of the cache makes it.

    Attributes:
        window: Tokens.
    """

    __slots__ = ("window",)

    def __init__(self, history: History, tail: Exact, n_tokens: int, window: int, columns: Columns | None = None) -> None:
        super().__init__(history, tail, n_tokens, columns)
        self.window = window

    def _attend_whole(
        self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None, lse: bool = False
    ) -> mx.array:
        if isinstance(mask, mx.array):
            self._check_columns(mask)
            return self.history.attend(queries, *self.tail, scale, mask, sinks, None, lse=lse)
        n_queries = queries.shape[2]
        if mask != "causal" and (mask is not None or n_queries > 1):
            expected = "None for one query" if mask is None else 'None, "causal" or an array'
            raise ValueError(f"[attend] mask: expected {expected}, got {mask}")
        if self.columns is not None:
            return self._attend_batch(self.columns, queries, scale, sinks, lse)
        n_held = self.n_tokens
        if n_queries == 1:
            begins = _begins(n_held - self.window, queries.shape[0]) if n_held > self.window else None
            return self.history.attend(queries, *self.tail, scale, None, sinks, None, begins, lse=lse)
        if n_held <= self.window:
            return self.history.attend(queries, *self.tail, scale, "causal", sinks, None, lse=lse)
        outs = []
        for begin, end in _pieces(n_queries):
            last = n_held - n_queries + end
            history, tail, n_gone = self._cut(max(0, last - (end - begin) - self.window + 1), last)
            seen = _seen(end - begin, last - n_gone, self.window)
            outs.append(history.attend(queries[:, :, begin:end], *tail, scale, seen, sinks, None, lse=lse))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)

    def _check_columns(self, mask: mx.array) -> None:
        if self.columns is not None:
            raise ValueError(f"[attend] mask: expected the mask that the batch makes, got an array of shape {mask.shape}")
        keys, first = self.packed_keys.codes, self.first
        n_columns = (0 if first is None else first.n_tokens) + keys.shape[2] + self.tail.n_tokens
        if mask.ndim == 0 or mask.shape[-1] not in (1, n_columns):
            raise ValueError(
                f"[attend] mask: expected {n_columns} columns, as make_mask of the compressed cache makes them, got shape "
                f"{mask.shape}; the layers of a window are compressed together, or none is"
            )

    def _cut(self, begin: int, end: int) -> tuple[History, Exact, int]:
        """The columns from `begin`, or some before it, to `end`, which is behind the codes; and how many there are before."""
        n_first = 0 if self.first is None else self.first.n_tokens
        n_coded = self.packed_keys.codes.shape[2]
        at = n_first + n_coded
        if begin < n_first or (begin == 0 and n_coded == 0):
            return self.history, self.tail.cut(0, end - at), 0
        if begin < at:
            n_gone = (begin - n_first) // BLOCK * BLOCK
            history = self.history if n_gone == n_first == 0 else without_oldest(self.history, n_gone)
            return history, self.tail.cut(0, end - at), n_first + n_gone
        return without_oldest(self.history, n_coded), self.tail.cut(begin - at, end - at), begin

    # Batches

    def _attend_batch(self, columns: Columns, queries: mx.array, scale: float, sinks: mx.array | None, lse: bool) -> mx.array:
        if columns.n_new == 0:
            begins = columns.begins(self.window)
            return self.history.attend(queries, *self.tail, scale, None, sinks, columns.lengths, begins, lse=lse)
        n_queries = queries.shape[2]
        if columns.plain and int(columns.counts.sum(axis=1).max()) + n_queries <= self.window:
            return self.history.attend(queries, *self.tail, scale, "causal", sinks, columns.lengths, lse=lse)
        outs = []
        for begin, end in _pieces(n_queries):
            history, tail, seen = self._piece(columns, begin, end)
            outs.append(history.attend(queries[:, :, begin:end], *tail, scale, seen, sinks, None, lse=lse))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)

    def _piece(self, columns: Columns, begin: int, end: int) -> tuple[History, Exact, mx.array]:
        """What the queries from `begin` to `end` attend to: all that is stored and the own tokens, or of these the last."""
        n_skipped = max(0, int((columns.left_padding - columns.n_stock).max()))
        n_tail = columns.widths[2]
        if begin - n_skipped < self.window - 1:  # the first real query of a sequence sees what is stored
            own, history, tail = 0, self.history, self.tail.cut(0, n_tail + end)
        else:
            own = max(0, begin - self.window + 1)
            history = without_oldest(self.history, self.packed_keys.codes.shape[2])
            tail = self.tail.cut(n_tail + own, n_tail + end)
        return history, tail, _seen_in_batch(columns, self.window, begin, end, own)

    def _mask_alone(self, one: Alone, mask: mx.array | str | None) -> mx.array | str | None:
        return "causal"


def _pieces(n_queries: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + PIECE, n_queries)) for begin in range(0, n_queries, PIECE)]


# Of numbers that are there, not computed when they are needed: threads may share them.


@functools.lru_cache(maxsize=8)
def _begins(begin: int, batch: int) -> mx.array:
    return mx.array(np.full(batch, begin, np.int32))


@functools.lru_cache(maxsize=16)
def _seen(n_queries: int, n_columns: int, window: int) -> mx.array:
    """bool ``[n_queries, n_columns]``: what the last tokens see of them all."""
    columns, rows = np.arange(n_columns)[None], np.arange(n_columns - n_queries, n_columns)[:, None]
    return mx.array((columns <= rows) & (columns > rows - window))


class _LastSeen(threading.local):
    """The masks of the last step of a batch in this thread; the layers share them."""

    step: tuple[object, ...] = ()

    def __init__(self) -> None:
        self.masks: dict[tuple[int, int, int], mx.array] = {}


_last_seen = _LastSeen()


def _seen_in_batch(columns: Columns, window: int, begin: int, end: int, own: int) -> mx.array:
    """bool ``[B, 1, end - begin, columns]``: what these queries see of what is stored, if `own` is 0, and of the own tokens
    from that one on."""
    arrays = (columns.counts, columns.left_padding, columns.n_dropped)
    step = (window, columns.widths, columns.n_new, columns.n_stock, *(x.tobytes() for x in arrays))
    memo = _last_seen
    if memo.step != step:
        memo.step, memo.masks = step, {}
    if (begin, end, own) not in memo.masks:
        stored_at, own_at = columns.positions()
        stored_at = stored_at if own == 0 else stored_at[:, :0]
        at = mx.array(np.concatenate([stored_at, own_at[:, own:end]], axis=1))[:, None, None]
        rows = mx.array(own_at[:, begin:end])[:, None, :, None]
        memo.masks[begin, end, own] = (at <= rows) & (at > rows - window)
    return memo.masks[begin, end, own]
