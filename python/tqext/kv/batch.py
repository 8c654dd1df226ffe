"""The cache of a batch whose sequences keep exactly what each would have alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tqext._ext import append_token, append_tokens
from tqext.kv.buffers import Buffers
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.codec import Codec, History, check_balance
from tqext.kv.columns import CODED, FIRST, TAIL, Columns, Ints, StreamColumns, note_mask
from tqext.kv.prefix import NO_IDS, Ids, Prefix, distinct_roots, is_wasteful, is_worth_sharing, new_ids, sharing
from tqext.kv.prefixed_snapshot import Groups, PrefixedSnapshot
from tqext.kv.schedule import (
    BLOCK,
    check_max_size,
    check_reach,
    coded_room,
    exact_room,
    trim_count,
    wait_for_readers,
)
from tqext.kv.snapshot import Alone, Snapshot
from tqext.kv.tokens import Exact, check_tokens, owned, resize_tokens
from tqext.presets import Recipe


class _LastOffset(threading.local):
    offset: mx.array | None = None
    key: tuple[object, ...] = ()


class LastStep(threading.local):
    step: Step | None = None


class LastDue(threading.local):
    found: tuple[tuple[object, ...], Due | None] | None = None


_last_offset = _LastOffset()


class Step(NamedTuple):
    """A step of one token for every sequence, the same in all layers of a model.

    Attributes:
        key: Of the `Calm` steps, and the number of this one.
        columns: Where the tokens are afterwards.
        at: int32 ``[B, 1, 1, 1]``, the column of each sequence's token in its tail; None if all are `most`.
        most: The last of these columns.
    """

    key: tuple[Calm, int]
    columns: Columns
    at: mx.array | None
    most: int


class Due(NamedTuple):
    """Tokens that are encoded in one step.

    Attributes:
        rows: The sequences that have any.
        leading: First tokens of each sequence that get their own place.
        n_new: Tokens of each of `rows` that are encoded, less those that are dropped at once.
        n_old: Coded tokens of each sequence that are dropped.
        n_dropped: All tokens of each sequence that are dropped.
        at: Where the tokens of `rows` that are encoded are, ``[len(rows), n]``.
        n_gone: Exact tokens of each sequence that leave the buffer.
        n_left: Those that stay.
    """

    rows: npt.NDArray[np.intp]
    leading: Ints
    n_new: Ints
    n_old: Ints
    n_dropped: Ints
    at: Ints
    n_gone: Ints
    n_left: Ints


class Calm(NamedTuple):
    """Steps to come of one token for every sequence, which change nothing but the tails: no block is due, and there is room.

    Attributes:
        end: Columns of mlx-lm's left-padded batch after the last of them.
        begin: The same before the first of them.
        state: The numbers of tokens and of padding before the first of them, as bytes.
    """

    end: int
    begin: int
    state: tuple[bytes, bytes, bytes]


class _NotSaved:
    """In a batch's state: says to whoever saves it what to save in its place."""

    def __str__(self) -> str:
        return "a batch of compressed caches cannot be saved; save the cache of each sequence, batch.extract(i)"

    __repr__ = __str__


class BatchTurboQuantKVCache(Buffers):
    """The cache of one layer for a batch: instead of mlx-lm's ``BatchKVCache``.

    Every sequence has its own numbers of first, coded and recent tokens and encodes on its own schedule, so it holds the
    bytes it would hold alone. `offset`, `left_padding` and `make_mask` speak of the left-padded batch that mlx-lm thinks of.

    Sequences that are copies of one cache share its first and its coded tokens, from 512 on: the batch holds and reads one copy
    of them. Inside, these are tokens that a sequence dropped, and attention adds what a `Prefix` gives.

    Args:
        left_padding: Padding of each sequence of the prompt to come.
        recipe: See `TurboQuantKVCache`.
        balance: See `TurboQuantKVCache`; the sequences of a batch share it.
        shared: See `TurboQuantKVCache`.
        max_size: See `TurboQuantKVCache`; of each sequence.
    """

    _window: int | None = None
    can_share: ClassVar[bool] = True
    # What the caches of a model's layers share.
    _last_step: ClassVar[LastStep] = LastStep()
    _last_due: ClassVar[LastDue] = LastDue()

    def __init__(
        self,
        left_padding: Sequence[int],
        recipe: Recipe | None = None,
        *,
        balance: mx.array | None = None,
        shared: bool = False,
        max_size: int | None = None,
    ) -> None:
        self.recipe = recipe or Recipe()
        self.max_size = check_max_size(max_size, self.recipe)
        self._balance = check_balance(balance, self.recipe)
        self.shared = shared
        self._last: Snapshot | None = None
        n = len(left_padding)
        self._codec: Codec | None = None
        self._packed: list[mx.array] = []
        self._now: History | None = None
        self._first: Exact | None = None
        self._tail: Exact | None = None
        self._counts: Ints = np.zeros((n, 3), np.int32)  # in the buffers: see Buffers
        self._dropped: Ints = np.zeros(n, np.int32)  # with the tokens of the prefix
        self._prefixes: list[Prefix | None] = [None] * n
        self._groups: Groups | None = None  # None if no sequence has a prefix
        self._ids: list[Ids] = [NO_IDS] * n  # of every coded block, those of the prefix too, unless they can never be shared
        self._left_padding: Ints = np.array(left_padding, np.int32).reshape(n)
        self._idx = 0  # columns of mlx-lm's left-padded batch
        self._calm: Calm | None = None
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

        Raises:
            ValueError: As `TurboQuantKVCache.update_and_fetch`.
        """
        snapshot = self._append_one(keys, values)
        if snapshot is not None:
            return snapshot, snapshot
        before = {**vars(self), "_dropped": self._dropped.copy()}
        try:
            self._counts = self._counts.copy()
            return self._update(keys, values)
        except BaseException:  # as in TurboQuantKVCache
            vars(self).update(before)
            raise

    def _append_one(self, keys: mx.array, values: mx.array) -> Snapshot | None:
        """One token for every sequence in a calm step. None, and nothing is changed, if it is another."""
        calm, tail, now, idx = self._calm, self._tail, self._now, self._idx
        if calm is None or tail is None or now is None or idx >= calm.end:
            return None
        last = self._last_step
        step = last.step
        if step is None or step.key != (calm, idx):
            last.step = step = self._calm_step(calm)
        if step.at is None:
            views = append_token(tail.keys, tail.values, keys, values, step.most)
        else:
            views = append_tokens(tail.keys, tail.values, keys, values, step.at, step.most)
        if views is None:
            return None
        snapshot = self._new_snapshot(now, Exact(*views), idx + 1, step.columns)
        vars(self).update(_counts=step.columns.counts, _idx=idx + 1, _last=snapshot if self.shared else None)
        return snapshot

    def _calm_step(self, calm: Calm) -> Step:
        at = self._counts[:, TAIL].copy()
        counts = self._counts.copy()
        counts[:, TAIL] += 1
        counts.flags.writeable = False  # the caches of all layers get it
        n_first, n_coded, n_tail = counts.max(axis=0).tolist()
        columns = self._columns(counts, (n_first, n_coded, n_tail), 0, plain=True, n_queries=1)
        alike = bool((at == at[0]).all())
        return Step((calm, self._idx), columns, None if alike else mx.array(at)[:, None, None, None], n_tail - 1)

    def _look_ahead(self) -> Calm | None:
        """The steps of one token for every sequence until one has more to do."""
        if self._remaining is not None or self._skip.any() or self._tail is None:
            return None
        held = self._counts[:, TAIL]
        apart = (self._counts[:, CODED] > 0) | (self._dropped > 0)
        n_free = np.where(apart, 0, self.recipe.first) + self.recipe.tail + BLOCK - held
        n = min(int(n_free.min()), self._tail.n_tokens - int(held.max()))
        state = self._counts.tobytes(), self._dropped.tobytes(), self._left_padding.tobytes()
        return Calm(self._idx + n, self._idx, state) if n > 0 else None

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        check_tokens(keys, values, self._tail)
        self._last = self._calm = None
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
        if n_new == 1 and (n_real == 1).all():
            snapshot = self._step(tokens)
        else:
            snapshot = self._extend_tail(tokens, skip.astype(np.int32), n_real.astype(np.int32))
            self._idx += n_new
        self._last = snapshot if self.shared else None
        return snapshot, snapshot

    def _open(self, keys: mx.array, values: mx.array) -> None:
        _check_rows(keys.shape[0] == len(self._counts), len(self._counts), keys.shape[0])
        super()._open(keys, values)

    def _n_leading(self, n_held: Ints) -> Ints:
        """First tokens among so many exact ones that each sequence has in the buffer of recent tokens."""
        apart = (self._counts[:, CODED] > 0) | (self._dropped > 0)
        return np.where(apart, 0, np.minimum(self.recipe.first, n_held)).astype(np.int32)

    @property
    def counts(self) -> Ints:
        """int32 ``[B, 3]``: first, coded and recent tokens of each sequence."""
        return self._own_counts + np.array(
            [(0, 0, 0) if p is None else (p.n_first, p.n_coded, 0) for p in self._prefixes], np.int32
        ).reshape(-1, 3)

    @property
    def _own_counts(self) -> Ints:
        """`counts` without what is in prefixes."""
        held = self._counts[:, TAIL]
        leading = self._n_leading(held)
        return np.stack([self._counts[:, FIRST] + leading, self._counts[:, CODED], held - leading], axis=1)

    @property
    def _n_shared(self) -> Ints:
        """int32 ``[B]``: tokens of each sequence's prefix."""
        return np.array([0 if p is None else p.n_tokens for p in self._prefixes], np.int32)

    def _room(self, n_held: int) -> int:
        """Columns of a buffer of recent tokens whose longest sequence holds so many."""
        return exact_room(n_held, int((self._counts.sum(axis=1) + self._n_shared).max(initial=0)))

    def _step(self, tokens: Exact) -> Snapshot:
        """One real token for every sequence."""
        assert self._tail is not None
        at = self._counts[:, TAIL]
        most = int(at.max())
        if most >= self._tail.n_tokens:
            self._tail = self._tail.resized(max(most + 1, self._room(most)))
        n_first, n_coded, _ = self._counts.max(axis=0).tolist()
        self._history(n_coded, self._first if n_first else None)
        self._calm = self._look_ahead()
        snapshot = self._append_one(*tokens)
        if snapshot is not None:
            return snapshot
        if (at == at[0]).all():
            self._tail.write(most, tokens)
        else:
            index = mx.array(at)[:, None, None, None]
            self._tail = Exact(*(put_tokens(x, index, new) for x, new in zip(self._tail, tokens, strict=True)))
        self._counts[:, TAIL] += 1
        snapshot = self._snapshot(self._tail, 0, plain=True, n_queries=1)
        self._idx += 1
        return snapshot

    def _extend_tail(self, tokens: Exact, skip: Ints, n_real: Ints) -> Snapshot:
        """Any number of tokens, of which some sequences have fewer than others."""
        assert self._tail is not None
        n_tail = self._counts[:, TAIL].copy()
        width = int(n_tail.max())
        joined = self._tail.cut(0, width).then(tokens)
        snapshot = self._snapshot(joined, tokens.n_tokens, plain=not skip.any(), n_queries=tokens.n_tokens)
        snapshot.alone = self._alone(tokens, skip, n_real)
        n_held = n_tail + n_real
        columns = StreamColumns(n_tail, width, skip)
        self._encode_oldest(joined, columns, self._due(columns, n_held, np.where(n_real > BLOCK, self._n_due(n_held), 0)))
        return snapshot

    def _alone(self, tokens: Exact, skip: Ints, n_real: Ints) -> tuple[Alone, ...]:
        """Sequences that a block is encoded for within a few new tokens; each token finds what it would find alone."""
        n_held = self._counts[:, TAIL] + n_real
        crosses = (n_real > 1) & (n_real <= BLOCK) & (n_held - self._n_leading(n_held) > self.recipe.tail + BLOCK)
        out = []
        for row in np.flatnonzero(crosses).tolist():
            begin, end = int(skip[row]), int(skip[row] + n_real[row])
            one = self._view(row)
            one._append(Exact(*(x[row : row + 1, :, begin:end] for x in tokens)))
            out.append(Alone(row, begin, end, one._step_snapshot(end - begin)))
        return tuple(out)

    def _flush(self, rows: npt.NDArray[np.bool_]) -> None:
        """Encode the oldest tokens of each of these sequences whose tail is full."""
        assert self._tail is not None
        n_held = self._counts[:, TAIL].copy()
        columns = StreamColumns(n_held, 0, np.zeros_like(n_held))
        state = tuple(x.tobytes() for x in (self._counts, self._dropped, rows))
        key = (*state, self.recipe.first, self.recipe.tail, self.max_size)
        memo = self._last_due.found
        if memo is None or memo[0] != key:  # the layers of a step share it
            n_due = np.where(rows, self._n_due(n_held), 0).astype(np.int32)
            memo = key, self._due(columns, n_held, n_due) if n_due.any() else None
            self._last_due.found = memo
        if memo[1] is not None:
            self._encode_oldest(self._tail, columns, memo[1])

    def _n_due(self, n_held: Ints) -> Ints:
        """Tokens to encode of each sequence that holds so many exact ones in the buffer of recent tokens."""
        n_tail = n_held - self._n_leading(n_held)
        return np.where(n_tail >= self.recipe.tail + BLOCK, (n_tail - self.recipe.tail) // BLOCK * BLOCK, 0).astype(np.int32)

    def _due(self, columns: StreamColumns, n_held: Ints, n_due: Ints) -> Due:
        """What becomes of the exact tokens when so many of each sequence are encoded."""
        rows = np.flatnonzero(n_due)
        leading = np.where(n_due > 0, self._n_leading(n_held), 0).astype(np.int32)
        n_coded = self._counts[:, CODED]
        n_dropped = np.where(n_due > 0, self._n_over(n_due, n_held), 0).astype(np.int32)
        n_old = np.minimum(n_dropped, n_coded)
        n_new = n_due - (n_dropped - n_old)
        n_gone = leading + n_due
        slots = np.arange(n_new.max(), dtype=np.int32)[None]
        at = columns.of((n_gone - n_new)[:, None] + slots)[rows]
        return Due(rows, leading, n_new[rows], n_old, n_dropped, at, n_gone, n_held - n_gone)

    def _n_over(self, n_due: Ints, n_held: Ints) -> Ints:
        """Coded tokens of each sequence that are dropped when `n_due` of the `n_held` exact ones are encoded."""
        return np.maximum(self._counts[:, CODED] + n_due - self._most_coded, 0).astype(np.int32)

    def _encode_oldest(self, source: Exact, columns: StreamColumns, due: Due) -> None:
        """Make codes of the oldest tokens of `source` after the first ones, and recent tokens of the others."""
        if due.leading.any():
            self._keep_first(source, columns, due.leading)
        if len(due.rows):
            assert self._codec is not None
            tokens = _take(Exact(*(_rows(x, due.rows, view=True) for x in source)), due.at)
            self._drop_oldest(due.n_old)
            self._write_packed(self._codec.encode(tokens), due.rows, due.n_new)
            self._dropped = self._dropped + due.n_dropped
        fewer = len(due.rows) < len(due.n_left)
        if source is self._tail and fewer and source.n_tokens <= self._room(int(due.n_left.max())) + BLOCK:
            self._shift_tail(due.rows, due.n_gone, due.n_left)
        else:
            self._move_tail(source, columns, due.n_gone, due.n_left)

    def _keep_first(self, source: Exact, columns: StreamColumns, leading: Ints) -> None:
        """Give the first tokens of these sequences their own place."""
        n, batch = self.recipe.first, len(leading)
        taken = _take(source, columns.of(np.broadcast_to(np.arange(n, dtype=np.int32), (batch, n))))
        own = Exact(*(resize_tokens(x, n) for x in taken))
        if self._first is not None and (self._counts[:, FIRST] > 0).any():
            new = mx.array(leading > 0)[:, None, None, None]
            own = Exact(*(mx.where(new, x, held) for x, held in zip(own, self._first, strict=True)))
        self._first, self._now = own, None
        self._counts[:, FIRST] += leading

    def _drop_oldest(self, n: Ints) -> None:
        """Forget so many of each sequence's oldest coded tokens."""
        assert self._codec is not None
        if not n.any():
            return
        self._now = None
        kept = self._counts[:, CODED] - n
        self._packed = [x[:] for x in self._packed]  # an interrupt leaves the objects that there were
        for buffer, per in zip(self._packed, self._codec.per_row, strict=True):
            for row in np.flatnonzero(n).tolist():
                begin, count = int(n[row]) // per, int(kept[row]) // per
                buffer[row : row + 1, :, :count] = buffer[row : row + 1, :, begin : begin + count]
        self._counts[:, CODED] = kept

    def _write_packed(self, parts: Sequence[mx.array], rows: npt.NDArray[Any], n: Ints) -> None:
        assert self._codec is not None
        begin = self._counts[rows, CODED]
        end = int((begin + n).max())
        self._now = None
        if not n.any():
            return
        if end > self._packed[0].shape[2] * self._codec.per_row[0]:
            kept = int(self._counts[:, CODED].max())
            self._packed = self._codec.resized(self._codec.cut(self._packed, 0, kept), coded_room(end))
        else:
            wait_for_readers(self._packed)
        together = len(rows) == len(self._counts) and (begin == begin[0]).all() and (n == n[0]).all()
        for buffer, new, per in zip(self._packed, parts, self._codec.per_row, strict=True):
            if together:
                buffer[:, :, int(begin[0]) // per : end // per] = new
                continue
            for i, (row, b, count) in enumerate(zip(rows.tolist(), begin.tolist(), n.tolist(), strict=True)):
                buffer[row : row + 1, :, b // per : (b + count) // per] = new[i : i + 1, :, : count // per]
        self._counts[rows, CODED] += n
        if self._has_ids:
            self._ids = list(self._ids)
            for row, count in zip(rows.tolist(), n.tolist(), strict=True):
                self._ids[row] = np.concatenate([self._ids[row], new_ids(count)])

    @property
    def _has_ids(self) -> bool:
        return self.can_share and self.max_size is None

    def _move_tail(self, source: Exact, columns: StreamColumns, n_dropped: Ints, n_left: Ints) -> None:
        """Make the tail of what follows the first `n_dropped` tokens of each sequence."""
        most = int(n_left.max())
        slots = np.arange(most, dtype=np.int32)[None]
        index = np.minimum(columns.of(slots + n_dropped[:, None]), source.n_tokens - 1)
        self._counts[:, TAIL] = n_left
        self._tail = _take(source, index).resized(self._room(most))

    def _shift_tail(self, rows: npt.NDArray[Any], n_gone: Ints, n_left: Ints) -> None:
        """Move what follows the first `n_gone` tokens of these sequences to the begin of their tails; the others stay."""
        assert self._tail is not None
        moves = [(row, int(n_gone[row]), int(n_left[row])) for row in rows.tolist() if n_left[row]]
        tail = Exact(*(x[:] for x in self._tail))  # an interrupt leaves the objects that there were
        for buffer in tail:
            # All are read before the first is written: a buffer that is still to be read from is copied by each write.
            moved = [owned(buffer[row : row + 1, :, begin : begin + n]) for row, begin, n in moves]
            for (row, _, n), x in zip(moves, moved, strict=True):
                buffer[row : row + 1, :, :n] = x
        self._counts[:, TAIL] = n_left
        self._tail = tail

    # Reading

    def _snapshot(self, tail: Exact, n_new: int, *, plain: bool, n_queries: int) -> Snapshot:
        counts = self._counts.copy()
        n_first, n_coded, n_tail = (int(n) for n in counts.max(axis=0))
        columns = self._columns(counts, (n_first, n_coded, n_tail), n_new, plain=plain, n_queries=n_queries)
        history = self._history(n_coded, self._first if n_first else None)
        return self._new_snapshot(history, tail.cut(0, n_tail + n_new), self._idx + n_queries, columns)

    def _new_snapshot(self, history: History, tail: Exact, n_tokens: int, columns: Columns) -> Snapshot:
        if self._groups is not None:
            return PrefixedSnapshot(history, tail, n_tokens, columns, self._groups)
        return Snapshot(history, tail, n_tokens, columns)

    def _columns(self, counts: Ints, widths: tuple[int, int, int], n_new: int, *, plain: bool, n_queries: int) -> Columns:
        padding, n_dropped = self._left_padding.copy(), self._dropped.copy()
        return Columns(counts, widths, n_new, padding, self._idx, plain, n_queries, n_dropped)

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
        memo, key = _last_offset, (self._idx, self._left_padding.tobytes())  # the layers of a step share it
        if memo.offset is None or memo.key != key:
            memo.offset = mx.array(self._idx - self._left_padding)
            memo.key = key
        return memo.offset

    @property
    def left_padding(self) -> mx.array:
        """int32 ``[B]``: mlx-lm's padding of each sequence."""
        return mx.array(self._left_padding)

    @property
    def n_coded(self) -> int:
        """Coded tokens of all sequences."""
        return int(self.counts[:, CODED].sum())

    @property
    def n_exact(self) -> int:
        """Exact tokens of all sequences, first and recent ones."""
        return int(self.counts.sum()) - self.n_coded

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens of all sequences, a prefix that they share once, without padding and room for growth."""
        if self._codec is None or self._tail is None:
            return 0
        dims = self._codec.head_dim, self._codec.value_dim
        exact = sum(dims) * self._tail.keys.dtype.size
        n_heads = self._tail.keys.shape[1]
        prefixes = {id(p): p for p in self._prefixes if p is not None}.values()
        n_coded = int(self._counts[:, CODED].sum())
        n_exact = int(self._counts.sum()) - n_coded + sum(p.n_first for p in prefixes)
        n_coded += sum(p.n_coded for p in prefixes)
        return int(n_heads * (n_coded * self.recipe.bytes_per_block(*dims) // BLOCK + n_exact * exact))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room for growth included, and of the prefixes that sequences share, each once."""
        return super().nbytes + sum(distinct_roots(self._prefixes).values())

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in fp16."""
        if self._codec is None or self._tail is None:
            return 0
        n_tokens = self.n_coded + self.n_exact
        return int(n_tokens * self._tail.keys.shape[1] * (self._codec.head_dim + self._codec.value_dim) * 2)

    def _contents(self) -> str:
        sizes = f"{self.used_nbytes / 1e6:.2f} MB, {self.fp16_nbytes / 1e6:.2f} MB in fp16"
        n_sharing = sum(p is not None for p in self._prefixes)
        shared = f", {n_sharing} of them behind {len(self._groups.members)} shared prefixes" if self._groups else ""
        return f"{len(self._counts)} sequences{shared}, {self.n_coded} coded and {self.n_exact} exact tokens, {sizes}"

    def size(self) -> int:
        """Columns of the left-padded batch."""
        return self._idx

    def empty(self) -> bool:
        """Whether no token is stored."""
        return self._codec is None

    @property
    def state(self) -> list[object]:
        """All arrays, for ``mx.eval``; mlx-lm refuses to save it. Sequences are saved one by one, from `extract`."""
        self._last = None
        exact = [part for part in (self._first, self._tail) if part is not None]
        shared = [] if self._groups is None else [x for prefix, _ in self._groups.members for x in prefix.arrays]
        return [*(x for part in exact for x in part), *self._packed, *shared, _NotSaved()]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """bool ``[B, 1, N, columns]`` of the left-padded batch."""
        columns = mx.arange(self._idx + N)[None]
        rows = mx.arange(self._idx, self._idx + N)[:, None]
        mask = rows >= columns
        if window_size is not None:
            mask = mask & (rows < columns + window_size)
        mask = mask & (self.left_padding[:, None, None, None] <= columns)
        if window_size is None:
            note_mask(mask, N, self._idx, self._left_padding)
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
        self._calm = None
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
        self._last = self._calm = None
        if self._right_padding is not None:
            self._left_padding = self._left_padding + self._right_padding
        self._right_padding = self._remaining = None

    # Trimming

    def trim(self, n: int) -> int:
        """Forget the last n columns; returns how many are gone.

        Columns of a sequence's padding are to come again, as in mlx-lm's own batch.

        Raises:
            ValueError: n is negative, a prompt padded on the right is not complete (`finalize`), or what is left of a sequence
                would end among tokens that were dropped.
        """
        n = min(trim_count(n), self._idx)
        if self._right_padding is not None:
            raise ValueError("[trim] cache: expected a complete prompt, got one whose padding is to come: call finalize first")
        n_tokens = self._counts.sum(axis=1) + self._dropped
        n_gone = np.minimum(n, n_tokens)
        reached = n_gone >= self._counts.sum(axis=1)
        self._set_prefixes([None if reached[i] else prefix for i, prefix in enumerate(self._prefixes)])
        for row in np.flatnonzero(self._dropped > self._n_shared).tolist():
            self._check_reach(row, int(n_gone[row]))
        self._last = self._calm = None
        self._counts = self._counts.copy()
        cut = np.flatnonzero(n_gone > self._counts[:, TAIL])
        views = [self._view(row) for row in cut.tolist()]
        self._counts[:, TAIL] -= np.where(np.isin(np.arange(len(n_gone)), cut), 0, n_gone)
        for row, one in zip(cut.tolist(), views, strict=True):
            one.trim(int(n_gone[row]))
            self._put_back(row, one)
        if len(cut):
            self._now = None
            self._shrink()
        self._skip = self._skip + (n - n_gone)
        self._idx -= n
        return n

    def _check_reach(self, row: int, n: int) -> None:
        counts = self._counts[row]
        check_reach(n, int(counts[FIRST]), int(counts.sum()), int(self._dropped[row]))

    def _put_back(self, row: int, one: TurboQuantKVCache) -> None:
        """Take the exact tokens and the counts of one sequence from its own cache; its codes are where they were."""
        assert self._tail is not None
        held = 0 if one._tail is None else one._n_leading + one.n_tail
        if held > self._tail.n_tokens:
            self._tail = self._tail.resized(self._room(held))
        if one._tail is not None and held:
            for buffer, x in zip(self._tail, one._tail, strict=True):
                buffer[row : row + 1, :, :held] = x[:, :, :held]
        self._counts[row] = 0 if one._first is None else one.n_first, one.n_coded, held
        self._dropped[row] = one.n_dropped
        prefix = self._prefixes[row]
        n_coded = one.n_coded + (0 if prefix is None else prefix.n_coded)
        self._ids = [*self._ids[:row], self._ids[row][: n_coded // BLOCK], *self._ids[row + 1 :]]

    def _shrink(self) -> None:
        assert self._codec is not None
        n_coded = int(self._counts[:, CODED].max(initial=0))
        if self._packed[0].shape[2] > 2 * coded_room(n_coded):
            self._packed = self._codec.resized(self._codec.cut(self._packed, 0, n_coded), coded_room(n_coded))

    # Rows

    def filter(self, batch_indices: mx.array | Sequence[int]) -> None:
        """Keep the sequences of these indices, in this order.

        Raises:
            ValueError: Not a list of whole numbers from 0 to the number of sequences less one.
        """
        given = np.array(batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices)
        n = len(self._counts)
        good = given.ndim == 1 and (given.size == 0 or (given.dtype.kind in "iu" and given.min() >= 0 and given.max() < n))
        if not good:
            raise ValueError(f"[filter] batch_indices: expected indices of {n} sequences, got {batch_indices}")
        rows = given.astype(np.int64)
        self._last = self._now = self._calm = None
        self._counts = self._counts[rows]
        self._dropped = self._dropped[rows]
        self._ids = [self._ids[row] for row in rows.tolist()]
        self._name_prefixes([self._prefixes[row] for row in rows.tolist()])
        self._left_padding = self._left_padding[rows]
        self._skip = self._skip[rows]
        if self._remaining is not None and self._right_padding is not None:
            self._remaining, self._right_padding = self._remaining[rows], self._right_padding[rows]
        if self._tail is not None and self._codec is not None:
            n_first, n_coded, n_tail = (int(n) for n in self._counts.max(axis=0, initial=0))
            self._first = Exact(*(_rows(x, rows) for x in self._first)) if self._first is not None and n_first else None
            room = min(self._tail.n_tokens, self._room(n_tail))
            self._tail = Exact(*(_rows(x[:, :, :room], rows) for x in self._tail))
            room = min(self._packed[0].shape[2], coded_room(n_coded))
            self._packed = [_rows(x, rows) for x in self._codec.cut(self._packed, 0, room)]
        shared = int(self._left_padding.min(initial=self._idx))
        self._left_padding = self._left_padding - shared
        self._idx -= shared

    def extend(self, other: BatchTurboQuantKVCache) -> None:
        """Append the sequences of another batch.

        Raises:
            ValueError: The other batch is not compressed, or has another recipe, another balance, or keys and values of other
                sizes or types.
        """
        _check_compressed(other, BatchTurboQuantKVCache, "[extend] other")
        _check_alike([self, other], "[extend] other")
        width = max(self._idx, other._idx)
        paddings = [c._left_padding + (width - c._idx) for c in (self, other)]
        _share_prefixes([self, other])
        parts = _joined([self, other])
        self._last = self._calm = None
        self._left_padding = np.concatenate(paddings).astype(np.int32)
        self._skip = np.concatenate([self._skip, other._skip])
        self._counts = np.concatenate([self._counts, other._counts])
        self._dropped = np.concatenate([self._dropped, other._dropped])
        self._ids = [*self._ids, *other._ids]
        self._name_prefixes([*self._prefixes, *other._prefixes])
        self._idx = width
        if parts is not None:
            self._codec, self._first, self._tail, self._packed = parts
            self._now = None

    def _view(self, idx: int) -> TurboQuantKVCache:
        """The cache of one sequence, on the arrays of the batch; what is in a prefix it dropped."""
        out = self._new_single()
        if self._codec is None or self._tail is None or not self._counts[idx].any():
            return out
        row = slice(idx, idx + 1)
        n_first, n_coded, n_held = (int(n) for n in self._counts[idx])
        out._codec = self._codec
        out._packed = [x[row] for x in self._codec.cut(self._packed, 0, n_coded)]
        out._tail = Exact(*(x[row, :, :n_held] for x in self._tail))
        if n_first and self._first is not None:
            out._first = Exact(*(x[row] for x in self._first))
        out.n_first, out.n_coded, out.n_tail = (int(n) for n in self._own_counts[idx])
        out.n_dropped = int(self._dropped[idx])
        prefix = self._prefixes[idx]
        out._ids = self._ids[idx] if prefix is None else self._ids[idx][len(prefix.ids) :]
        return out

    def _new_single(self) -> TurboQuantKVCache:
        """An empty cache with this one's settings."""
        return TurboQuantKVCache(self.recipe, balance=self._balance, shared=self.shared, max_size=self.max_size)

    def extract(self, idx: int) -> TurboQuantKVCache:
        """The cache of one sequence, as if it had been alone; it goes on sharing its prefix.

        Raises:
            ValueError: There is no such sequence.
        """
        if not 0 <= idx < len(self._counts):
            raise ValueError(f"[extract] idx: expected 0 to {len(self._counts) - 1}, got {idx}")
        out, prefix = self._view(idx), self._prefixes[idx]
        if out._codec is not None and out._tail is not None:
            if prefix is not None:
                counts = {"n_first": prefix.n_first, "n_coded": prefix.n_coded + out.n_coded, "n_dropped": 0}
                vars(out).update(counts, _base=prefix, _first=prefix.first, _ids=self._ids[idx])
            out._packed = out._codec.resized(out._packed, int(self._counts[idx, CODED]))
            out._tail = out._tail.resized(exact_room(out._tail.n_tokens, out.size()))
            out._first = out._first if out._first is None or prefix is not None else out._first.resized(out.n_first)
        return out

    # Prefixes

    @property
    def prefixes(self) -> list[Prefix | None]:
        """The prefix of each sequence, None for none; the same object for those that share it in this batch."""
        return list(self._prefixes)

    def _name_prefixes(self, prefixes: Sequence[Prefix | None]) -> None:
        self._prefixes = list(prefixes)
        self._groups = Groups(prefixes) if any(prefix is not None for prefix in prefixes) else None

    def _coded_parts(self, row: int, begin: int, end: int) -> list[mx.array]:
        """The packed arrays of a sequence's coded tokens `begin` to `end`, those of its prefix counted."""
        assert self._codec is not None
        prefix = self._prefixes[row]
        n = 0 if prefix is None else prefix.n_coded
        own = [x[row : row + 1] for x in self._codec.cut(self._packed, max(begin - n, 0), max(end - n, 0))]
        if prefix is None or begin >= n:
            return own
        shared = prefix.parts(begin, min(end, n))
        return shared if end <= n else [mx.concatenate([x, y], axis=2) for x, y in zip(shared, own, strict=True)]

    def _prefix_of(self, row: int, n_coded: int) -> Prefix:
        """The first and so many coded tokens of a sequence, for others to share."""
        assert self._codec is not None
        prefix = self._prefixes[row]
        if prefix is not None and prefix.n_coded >= n_coded:
            return prefix.shortened(n_coded)
        parts = self._coded_parts(row, 0, n_coded)
        first = self._first if prefix is None else prefix.first
        if prefix is None and (len(self._counts) > 1 or is_wasteful(n_coded, self._packed[0].shape[2])):
            # Not the others' tokens as well.
            parts = self._codec.resized(parts, n_coded)
        if prefix is None and first is not None:
            first = Exact(*(owned(x[row : row + 1]) for x in first))
        return Prefix(self._codec, parts, first, self._ids[row][: n_coded // BLOCK])

    def _set_prefixes(self, prefixes: Sequence[Prefix | None]) -> None:
        """Let each sequence have its first and oldest coded tokens in this prefix, or in the batch's buffers."""
        before = self._prefixes
        if all(a is b for a, b in zip(before, prefixes, strict=True)):
            return
        self._last = self._now = self._calm = None
        lengths = [[0 if p is None else p.n_coded for p in of] for of in (before, prefixes)]
        if lengths[0] != lengths[1]:
            assert self._codec is not None and self._tail is not None
            n_coded = self._counts[:, CODED] + np.array(lengths[0], np.int32)
            n_own = (n_coded - np.array(lengths[1], np.int32)).astype(np.int32)
            room = coded_room(int(n_own.max()))
            own = enumerate(zip(lengths[1], n_coded.tolist(), strict=True))
            rows = [self._codec.resized(self._coded_parts(row, begin, end), room) for row, (begin, end) in own]
            self._first = self._first_without(prefixes)
            self._packed = [mx.concatenate(list(x)) for x in zip(*rows, strict=True)]
            self._dropped = self._dropped - self._n_shared
            counts = self._counts.copy()
            counts[:, FIRST] = [
                0 if p is not None else n if was is None else was.n_first
                for n, was, p in zip(counts[:, FIRST].tolist(), before, prefixes, strict=True)
            ]
            counts[:, CODED] = n_own
            self._counts = counts
            self._name_prefixes(prefixes)
            self._dropped = (self._dropped + self._n_shared).astype(np.int32)
        else:
            self._name_prefixes(prefixes)

    def _first_without(self, prefixes: Sequence[Prefix | None]) -> Exact | None:
        """The buffer of first tokens once the sequences have these prefixes."""
        assert self._tail is not None
        rows: list[Exact | None] = []
        for row, (was, prefix) in enumerate(zip(self._prefixes, prefixes, strict=True)):
            held = None if self._first is None else Exact(*(x[row : row + 1] for x in self._first))
            rows.append(None if prefix is not None else held if was is None else was.first)
        n = max((x.n_tokens for x in rows if x is not None), default=0)
        if n == 0:
            return None
        none = Exact(*(x[:1, :, :0] for x in self._tail))
        each = [(none if x is None else x).resized(n) for x in rows]
        return Exact(mx.concatenate([x.keys for x in each]), mx.concatenate([x.values for x in each]))

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """A batch of single caches, which may be empty.

        Raises:
            ValueError: As `extend`.
        """
        for cache in caches:
            _check_compressed(cache, TurboQuantKVCache, "[merge] caches")
        batches = [_batch_of_one(cache) for cache in caches]
        merged = batches[0]
        if len(batches) > 1:
            _check_alike(batches, "[merge] caches")
            _share_prefixes(batches)
            parts = _joined(batches)
            lengths = np.array([b._idx for b in batches], np.int32)
            merged._idx = int(lengths.max())
            merged._left_padding = merged._idx - lengths
            merged._skip = np.zeros(len(batches), np.int32)
            merged._counts = np.concatenate([b._counts for b in batches])
            merged._dropped = np.concatenate([b._dropped for b in batches])
            merged._ids = [ids for b in batches for ids in b._ids]
            merged._name_prefixes([prefix for b in batches for prefix in b._prefixes])
            if parts is not None:
                merged._codec, merged._first, merged._tail, merged._packed = parts
        return merged


def _check_rows(ok: bool, expected: int, got: int) -> None:
    if not ok:
        raise ValueError(f"[update_and_fetch] keys: expected {expected} sequences, got {got}")


def _check_compressed(cache: object, kind: type, what: str) -> None:
    if not isinstance(cache, kind):
        raise ValueError(
            f"{what}: expected compressed caches ({kind.__name__}), got a {type(cache).__name__} among them; "
            "tqext.upgrade compresses mlx-lm's own"
        )


def _rows(x: mx.array, rows: npt.NDArray[Any], *, view: bool = False) -> mx.array:
    """These sequences. With `view` perhaps in the same memory, which then lives as long."""
    n = len(rows)
    if n == x.shape[0] and (rows == np.arange(n)).all():
        return x
    if view and n and (rows == rows[0] + np.arange(n)).all():
        return x[int(rows[0]) : int(rows[0]) + n]
    return x[mx.array(rows.astype(np.int32))]


def _take(tokens: Exact, index: Ints) -> Exact:
    """The tokens at the columns ``index [B, n]``; perhaps in the same memory."""
    n = index.shape[1]
    if n and (index == index[0, 0] + np.arange(n)).all() and index[0, 0] + n <= tokens.n_tokens:
        return tokens.cut(int(index[0, 0]), int(index[0, 0]) + n)
    clipped = mx.array(np.minimum(index, tokens.n_tokens - 1))[:, None, :, None]
    return Exact(*(mx.take_along_axis(x, mx.broadcast_to(clipped, (*x.shape[:2], n, x.shape[3])), axis=2) for x in tokens))


def put_tokens(x: mx.array, index: mx.array, new: mx.array) -> mx.array:
    """``x [B, H, T, D]`` with one token of each sequence, ``new [B, H, 1, D]``, at column ``index [B, 1, 1, 1]``."""
    wide = mx.broadcast_to(index, (*x.shape[:2], 1, x.shape[3]))
    return mx.put_along_axis(x, wide, new.astype(x.dtype), axis=2)


def _batch_of_one(cache: TurboQuantKVCache) -> BatchTurboQuantKVCache:
    out = cast(BatchTurboQuantKVCache, cache._new_batch([0]))
    if cache._codec is None or cache._tail is None:
        return out
    _check_rows(cache._tail.keys.shape[0] == 1, 1, cache._tail.keys.shape[0])
    base = cache._base
    n_based = 0 if base is None else base.n_coded
    n_held = cache._n_leading + cache.n_tail
    n_first = 0 if base is not None else cache.size() - cache.n_coded - n_held
    out._codec = cache._codec
    out._counts = np.array([[n_first, cache.n_coded - n_based, n_held]], np.int32)
    out._dropped = np.array([cache.n_dropped if base is None else base.n_tokens], np.int32)
    out._ids = [cache._ids]
    out._name_prefixes([base])
    out._idx = cache.offset
    out._packed = cache._codec.cut(cache._packed, 0, cache.n_coded - n_based)
    out._tail = cache._tail.cut(0, n_held)
    out._first = None if cache._first is None or base is not None else Exact(*(x[:] for x in cache._first))
    if base is not None and not is_worth_sharing(base.n_coded):
        out._set_prefixes([None])
    return out


def _share_prefixes(batches: Sequence[BatchTurboQuantKVCache]) -> None:
    """Let the sequences of these batches, which are to be one, share the prefixes that spare the most tokens."""
    rows = [(batch, row) for batch in batches for row in range(len(batch._counts))]
    prefixes = [batch._prefixes[row] for batch, row in rows]
    for members, n_coded in sharing([batch._ids[row] for batch, row in rows]):
        # Of one that is there already the least need be copied: of as many tokens, then of more, then of fewer.
        lengths = [(0 if (prefix := prefixes[i]) is None else prefix.n_coded, i) for i in members]
        _, _, at = min((n != n_coded, n < n_coded, i) for n, i in lengths)
        batch, row = rows[at]
        shared = batch._prefix_of(row, n_coded)
        for i in members:
            prefixes[i] = shared
    for batch in batches:
        n = len(batch._counts)
        batch._set_prefixes(prefixes[:n])
        prefixes = prefixes[n:]


def _check_alike(caches: Sequence[BatchTurboQuantKVCache], what: str) -> None:
    """The caches can be one batch."""
    one = caches[0]
    like = next((c._tail for c in caches if c._tail is not None), None)
    for other in caches[1:]:
        if other.is_latent != one.is_latent:
            raise ValueError(f"{what}: expected caches of one kind, got {type(one).__name__} and {type(other).__name__}")
        if other.recipe != one.recipe:
            raise ValueError(f"{what}: expected the recipe {one.recipe}, got {other.recipe}")
        if other.max_size != one.max_size:
            raise ValueError(f"{what}: expected the bound {one.max_size}, got {other.max_size}")
        if other._window != one._window:
            a_window, another = (f"a window of {c._window} tokens" if c._window else "no window" for c in (one, other))
            raise ValueError(f"{what}: expected {a_window}, got {another}")
        a, b = one._balance, other._balance
        if a is not b:
            if a is None or b is None or a.shape != b.shape or not mx.array_equal(a, b).item():
                raise ValueError(f"{what}: expected the balance of the first cache, got another")
            other._balance = a
    for c in caches:
        if c._tail is None or like is None:
            continue
        for x, held in zip(c._tail, like, strict=True):
            expected, got = ((y.shape[1], y.shape[3], y.dtype) for y in (held, x))
            if expected != got:
                raise ValueError(f"{what}: expected KV heads, head dimension and type {expected}, got {got}")


_Parts = tuple[Codec, Exact | None, Exact, list[mx.array]]


def _joined(caches: Sequence[BatchTurboQuantKVCache]) -> _Parts | None:
    """The arrays of several batches as those of one, each part padded on its right. None if no batch has any."""
    model = next((c for c in caches if c._codec is not None), None)
    if model is None or model._codec is None or model._tail is None:
        return None
    counts = np.concatenate([c._counts for c in caches]).max(axis=0, initial=0)
    n_first, n_coded, n_tail = (int(n) for n in counts)
    n_tail = exact_room(n_tail, max(int(c._counts.sum(axis=1).max(initial=0)) for c in caches))
    firsts, tails, packed = [], [], []
    for c in caches:
        if c._tail is None:
            nothing = c._new_single()._new_batch([0] * len(c._counts))
            assert isinstance(nothing, BatchTurboQuantKVCache)
            nothing._open(*(mx.zeros((len(c._counts), x.shape[1], 0, x.shape[3]), x.dtype) for x in model._tail))
            c = nothing
        assert c._tail is not None
        firsts.append((c._tail.cut(0, 0) if c._first is None else c._first).resized(n_first))
        tails.append(c._tail.resized(n_tail))
        packed.append(model._codec.resized(c._packed, coded_room(n_coded)))
    first, tail = (
        Exact(mx.concatenate([p.keys for p in part]), mx.concatenate([p.values for p in part])) for part in (firsts, tails)
    )
    return model._codec, first if n_first else None, tail, [mx.concatenate(list(x)) for x in zip(*packed, strict=True)]


# mlx-lm asks the single caches themselves for a batch of them.
TurboQuantKVCache.batch_class = BatchTurboQuantKVCache
