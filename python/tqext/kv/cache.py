"""A KV cache that stores compressed tokens and hands them to attention as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from tqext._ext import append_token
from tqext.kv import state as saved
from tqext.kv.buffers import Buffers
from tqext.kv.codec import Codec, History, check_balance
from tqext.kv.prefix import NO_IDS, Ids, Prefix, is_wasteful, is_worth_sharing, new_ids
from tqext.kv.schedule import (
    BLOCK,
    check_max_size,
    check_reach,
    coded_room,
    exact_room,
    trim_count,
    wait_for_readers,
)
from tqext.kv.snapshot import Snapshot, create_mask
from tqext.kv.tokens import Exact, Store, check_tokens, stored
from tqext.presets import Recipe


class TurboQuantKVCache(Buffers):
    """The cache of one layer: first tokens exact, then codes, then the recent tokens exact.

    Takes the place of mlx-lm's ``KVCache``. `update_and_fetch` returns a `Snapshot` instead of keys and values;
    attention over it is ``snapshot.attend``, which `tqext.install` routes ``mx.fast.scaled_dot_product_attention`` to.

    Args:
        recipe: What to store. Default: that of `tq3`.
        balance: float32 ``[n_kv_heads, head_dim]``, positive, from `tqext.calibrate`; None for a model that is not calibrated.
        shared: Other layers attend to these tokens too (`keys_and_values`), and find what this layer found.
        max_size: Tokens to keep at most: the first ones, and of the others the last ones, in whole blocks. At least `first` +
            `tail` + 128 of the recipe. Drafts and follow-ups of up to 64 tokens come on top until the next step. None: all.

    Attributes:
        n_first: First tokens, exact. ``n_coded``: coded tokens, whole blocks. ``n_tail``: recent tokens, exact.
        n_dropped: Tokens that were dropped, all between the first and the coded ones.
    """

    batch_class: ClassVar[Any]  # BatchTurboQuantKVCache, which is built on this class and sets it
    can_share: ClassVar[bool] = True
    _window: int | None = None

    def __init__(
        self,
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
        self._clear()

    def _clear(self) -> None:
        self._codec: Codec | None = None
        self._packed: list[mx.array] = []
        self._now: History | None = None
        self._first: Exact | None = None
        self._tail: Exact | None = None
        self._last: Snapshot | None = None
        self._summed: tuple[int, mx.array | None] | None = None  # coded tokens in the checksum so far, and their part of it
        self._base: Prefix | None = None  # holds the first and the oldest coded tokens, and the packed buffers the others
        self._ids: Ids = NO_IDS  # of every coded block, unless the cache can never share them
        self.n_first = 0
        self.n_coded = 0
        self.n_tail = 0
        self.n_dropped = 0

    # Writing

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        """Append tokens and return what the step attends to.

        Up to 64 tokens find what they would find if they came one by one. More are a prompt, and find each other exact.

        Args:
            keys: ``[B, n_kv_heads, L, D]``, any float type.
            values: ``[B, n_kv_heads, L, Dv]``.

        Returns:
            The same snapshot twice. The L tokens themselves are exact in it.

        Raises:
            ValueError: Keys and values that do not fit each other or the tokens that are stored; nothing is changed then.
        """
        snapshot = self._append_one(keys, values)
        if snapshot is not None:
            return snapshot, snapshot
        before = dict(vars(self))
        try:
            return self._update(keys, values)
        except BaseException:  # an interrupt, wherever it comes, leaves what was there: tokens past the counts are nobody's
            vars(self).update(before)
            raise

    def _append_one(self, keys: mx.array, values: mx.array) -> Snapshot | None:
        """One token where nothing but the tail changes: what most steps are. None, and nothing is changed, if it is another."""
        now, tail, n_first, n_tail = self._now, self._tail, self.n_first, self.n_tail
        if now is None or tail is None or n_tail - self.recipe.tail >= BLOCK:
            return None
        views = append_token(tail.keys, tail.values, keys, values, n_tail if now.first is not None else n_first + n_tail)
        if views is None:
            return None
        if n_first < self.recipe.first and not self.n_dropped:
            n_first += 1
        else:
            n_tail += 1
        snapshot = self._new_snapshot(now, Exact(*views), self.size() + 1, (n_first, self.n_dropped))
        vars(self).update(n_first=n_first, n_tail=n_tail, _last=snapshot if self.shared else None)
        return snapshot

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        check_tokens(keys, values, self._tail)
        self._last = None
        self._hold_all()
        if self._codec is None:
            self._open(keys, values)
        # Before this step, not after the last one: tokens that a draft got wrong were trimmed in between, and the
        # step before no longer holds the packed buffers.
        self._flush()
        tokens = Exact(keys, values)
        self._append(tokens)
        if tokens.n_tokens <= BLOCK:
            snapshot = self._step_snapshot(tokens.n_tokens)
        else:
            snapshot = self._snapshot()
            self._flush(is_read=True)  # at once: no layer keeps its prompt uncompressed while the next one runs
        self._last = snapshot if self.shared else None
        return snapshot, snapshot

    @property
    def _n_leading(self) -> int:
        """First tokens that are in the buffer of recent tokens."""
        return self.n_first if self._first is None else 0

    @property
    def _flush_at(self) -> int:
        """Recent tokens of which the oldest are encoded before the next token comes."""
        return self.recipe.tail + BLOCK

    @property
    def _n_due(self) -> int:
        """Recent tokens that are encoded before the next token comes."""
        return (self.n_tail - self.recipe.tail) // BLOCK * BLOCK if self.n_tail >= self._flush_at else 0

    def _n_over(self, n: int) -> int:
        """Coded tokens that are dropped when n more are encoded."""
        return max(0, self.n_coded + n - self._most_coded)

    def _n_over_within(self) -> int:
        """Coded tokens that are dropped when a block is encoded between the tokens of a step."""
        return self._n_over(BLOCK)

    def _append(self, tokens: Exact) -> None:
        assert self._tail is not None
        held = self._n_leading + self.n_tail
        end = held + tokens.n_tokens
        n_tokens = self.size() + tokens.n_tokens
        if tokens.n_tokens > BLOCK:
            self._tail = Exact(*stored([Store(x, 0, held, new, end) for x, new in zip(self._tail, tokens, strict=True)]))
        else:
            if end > self._tail.n_tokens:
                self._tail = self._tail.cut(0, held).resized(exact_room(end, n_tokens))
            self._tail.write(held, tokens)
        n_first = self.n_first if self.n_coded or self.n_dropped else min(self.recipe.first, n_tokens)
        vars(self).update(n_first=n_first, n_tail=n_tokens - n_first - self.n_coded)

    def _flush(self, *, is_read: bool = False) -> None:
        """Encode the oldest recent tokens, in whole blocks, down to `tail` and a part of a block.

        `is_read`: a snapshot of this step reads the buffers, so that writing to them would copy them.
        """
        n = self._n_due
        if n == 0:
            return
        assert self._tail is not None and self._codec is not None
        leading = self._n_leading
        begin, end = leading + n, leading + self.n_tail
        n_dropped = self._n_over(n)
        n_old = min(n_dropped, self.n_coded)
        n_new = n - (n_dropped - n_old)
        parts = self._codec.encode(self._tail.cut(begin - n_new, begin))
        room = exact_room(end - begin, self.size())
        exact = [Store(x, begin, end - begin, None, room) for x in self._tail]
        exact += [Store(x, 0, leading, None, leading) for x in self._tail] if leading else []
        if is_read:
            self._now = None
            packed = self._codec.stores(self._packed, n_old, self.n_coded, parts)
            found = stored([*packed, *exact])
            self._packed, found = found[: len(packed)], found[len(packed) :]
        else:
            self._write_packed(parts, n_new, n_old)
            found = stored(exact)
        tail, first = Exact(*found[:2]), Exact(*found[2:]) if leading else self._first
        ids = np.concatenate([self._ids, new_ids(n_new)]) if self._has_ids else NO_IDS
        counts = {"n_coded": self.n_coded - n_old + n_new, "n_tail": self.n_tail - n, "n_dropped": self.n_dropped + n_dropped}
        vars(self).update(counts, _first=first, _tail=tail, _ids=ids, _summed=None if n_old else self._summed)

    def _write_packed(self, parts: Sequence[mx.array], n: int, n_dropped: int = 0) -> None:
        """Put the codes of n tokens behind those that are counted, less the oldest `n_dropped`."""
        assert self._codec is not None
        begin = self.n_coded - n_dropped
        end = begin + n
        self._now = None  # a view that is kept would have the buffer copied
        if n_dropped or end > self._packed[0].shape[2]:
            self._packed = self._codec.resized(self._codec.cut(self._packed, n_dropped, self.n_coded), coded_room(end))
        else:
            wait_for_readers(self._packed)
        for buffer, new, per in zip(self._packed, parts, self._codec.per_row, strict=True):
            buffer[:, :, begin // per : end // per] = new

    def overwrite(self, *, attended: bool) -> None:
        """Flip bits of every code, or (`attended` False) fill the room that no token owns: for tests of what is read."""
        garbage = 0x5A5A5A5A
        self._hold_all()
        self._now = None
        for i, x in enumerate(self._packed):
            if attended:
                self._packed[i] = x ^ garbage if x.dtype == mx.uint32 else x
            else:
                assert self._codec is not None
                n = self.n_coded // self._codec.per_row[i]
                filler = mx.full(
                    (*x.shape[:2], x.shape[2] - n + 1, x.shape[3]), garbage if x.dtype == mx.uint32 else 1e4, x.dtype
                )
                self._packed[i] = mx.concatenate([x[:, :, :n], filler], axis=2)
        if not attended and self._tail is not None:
            poison = Exact(*(mx.full((*x.shape[:2], 8, x.shape[3]), 1e4, x.dtype) for x in self._tail))
            self._tail = self._tail.cut(0, self._n_leading + self.n_tail).then(poison)

    # Reading

    def _snapshot(self) -> Snapshot:
        assert self._tail is not None
        tail = self._tail.cut(0, self._n_leading + self.n_tail)
        gap = (self.n_first, self.n_dropped)
        return self._new_snapshot(self._history(self.n_coded, self._first), tail, self.size(), gap)

    def _new_snapshot(self, history: History, tail: Exact, n_tokens: int, gap: tuple[int, int]) -> Snapshot:
        return Snapshot(history, tail, n_tokens, gap=gap)

    def _step_snapshot(self, n_new: int) -> Snapshot:
        """What each of the last `n_new` tokens attends to, as if they had come one by one.

        A block that is due between them is encoded, but not for good: they may be a draft that is wrong, and then they are
        trimmed. It is written behind the tokens that are counted.
        """
        n_tail, due = self.n_tail, self._flush_at
        if n_tail <= due:
            return self._snapshot()
        assert self._tail is not None and self._codec is not None
        leading = self._n_leading
        self._write_packed(self._codec.encode(self._tail.cut(leading, leading + BLOCK)), BLOCK)
        # Only now: a view of what was there before would have the buffers copied.
        before = self._history(self.n_coded, self._first)
        n_dropped = self._n_over_within()
        after = self._codec.cut(self._packed, n_dropped, self.n_coded + BLOCK)
        size, gap = self.size(), (self.n_first, self.n_dropped)
        earlier = self._new_snapshot(before, self._tail.cut(0, leading + due), size - n_tail + due, gap)
        first = self._tail.cut(0, leading) if leading else self._first
        tail = self._tail.cut(leading + BLOCK, leading + n_tail)
        history = self._codec.history(after, first)
        snapshot = self._new_snapshot(history, tail, size - n_dropped, (gap[0], gap[1] + n_dropped))
        snapshot.earlier = earlier, n_new - (n_tail - due)
        return snapshot

    def keys_and_values(self) -> tuple[Snapshot, Snapshot]:
        """The snapshot of the last step, twice, for layers that share another layer's tokens.

        Unless the cache is known to be `shared`, and after a trim or once the step was evaluated, that of the present state.
        """
        if self._codec is None:
            raise ValueError("[keys_and_values] cache: expected tokens, got an empty cache")
        self.shared = True
        self._hold_all()
        snapshot = self._last or self._snapshot()
        return snapshot, snapshot

    def _contents(self) -> str:
        if self.size() == 0:
            return "empty"
        dropped = f", {self.n_dropped} dropped" if self.n_dropped else ""
        sizes = f"{self.used_nbytes / 1e6:.2f} MB, {self.fp16_nbytes / 1e6:.2f} MB in fp16"
        return f"{self.n_coded} coded and {self.n_exact} exact tokens{dropped}, {sizes}"

    @property
    def offset(self) -> int:
        """The number of tokens, those that were dropped included."""
        return self.n_first + self.n_dropped + self.n_coded + self.n_tail

    def size(self) -> int:
        """The number of tokens that are held."""
        return self.n_first + self.n_coded + self.n_tail

    def empty(self) -> bool:
        """Whether no token is stored."""
        return self.size() == 0

    @property
    def n_exact(self) -> int:
        """Exact tokens, first and recent ones."""
        return self.n_first + self.n_tail

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens in the buffers, without room for growth."""
        return sum(x.nbytes for x in (*self._own_coded(), *self._exact_arrays(), *self._based_coded()))

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in fp16, without room for growth."""
        if self._codec is None or self._tail is None:
            return 0
        batch, n_kv_heads = self._tail.keys.shape[:2]
        return int(batch * n_kv_heads * self.size() * (self._codec.head_dim + self._codec.value_dim) * 2)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens: None, ``"causal"``, or a bool array if asked for or if a window needs it."""
        n_dropped = self._n_over(self._n_due) if self._n_due else 0
        gap = (self.n_first, self.n_dropped + n_dropped)
        return create_mask(N, self.size() - n_dropped, return_array, window_size, gap)

    # Trimming

    def trim(self, n: int) -> int:
        """Forget the last n tokens; returns how many were there to forget.

        What is left of a block that is cut becomes exact tokens again, at most 63: as the codes had them.

        Raises:
            ValueError: n is negative, or what is left would end among tokens that were dropped.
        """
        n = min(trim_count(n), self.offset)
        self._check_reach(n)
        self._last = None
        left = 0 if n == self.offset else self.size() - n
        if left == 0:
            self._clear()
        elif self.n_coded == 0 or n <= self.n_tail:
            n_first = self.n_first if self.n_coded else min(self.n_first, left)
            vars(self).update(n_first=n_first, n_tail=left - n_first - self.n_coded)
            self._shrink_tail()
        else:
            self._trim_coded(left)
        return n

    def _check_reach(self, n: int) -> None:
        check_reach(n, self.n_first, self.size(), self.n_dropped)

    def _shrink_tail(self) -> None:
        assert self._tail is not None
        room = exact_room(self._n_leading + self.n_tail, self.size())
        if self._tail.n_tokens > 2 * room + BLOCK:
            self._tail = self._tail.resized(room)

    def _trim_coded(self, left: int) -> None:
        """Keep the first `left` tokens, of which the last is a coded or a first one."""
        assert self._codec is not None and self._tail is not None
        n_first = min(self.n_first, left)
        n_coded = (left - n_first) // BLOCK * BLOCK
        n_tail = left - n_first - n_coded
        first, tail, packed, base = self._first, self._tail.cut(0, 0), self._packed, self._base
        if n_coded == 0 and self.n_dropped == 0 and first is not None:
            tail, first = first.cut(0, n_first), None
        if n_tail:
            block = self.coded_parts(n_coded, n_coded + BLOCK)
            tail = tail.then(self._codec.decode(block, 0, n_tail, *(x.dtype for x in tail)))
        tail = tail.resized(exact_room(tail.n_tokens, left))
        if base is not None:
            base = base.shortened(min(n_coded, base.n_coded)) if n_coded else None
        n_own = n_coded - (0 if base is None else base.n_coded)
        room = coded_room(n_own)
        if packed[0].shape[2] > 2 * room:
            packed = self._codec.resized(self._codec.cut(packed, 0, n_own), room)
        counts = {"n_first": n_first, "n_coded": n_coded, "n_tail": n_tail}
        ids = self._ids[: n_coded // BLOCK]
        vars(self).update(counts, _first=first, _tail=tail, _packed=packed, _base=base, _ids=ids, _now=None, _summed=None)

    # State

    @property
    def state(self) -> list[mx.array]:
        """Arrays that hold everything: the header; coded, first and recent tokens unless there are none; the balance if any.

        The header ends in a checksum of itself and the arrays, so that a damaged file is no other cache.
        """
        self._last = None  # mlx-lm evaluates the state when a step is over
        numbers = self._header().numbers()
        coded, exact = self._coded_arrays(), self._exact_arrays()
        if self._balance is not None:
            exact.append(self._balance)
        return [saved.header_of(numbers, exact, 1 + len(coded), self._coded_sum()), *coded, *exact]

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        header = saved.read_header(arrays)
        kinds = ("keys and values", "latents and rotary keys")
        saved.check(
            header.is_latent == self.is_latent, f"a cache of {kinds[self.is_latent]}", f"one of {kinds[header.is_latent]}"
        )
        before = self.recipe
        self.recipe = header.recipe
        try:
            # The last array of tokens, if there are any, has the exact values.
            value_dtype = arrays[max(-1 - header.has_balance, -len(arrays))].dtype
            codec = self._make_codec(header.head_dim, header.value_dim, None, value_dtype)
            saved.check_arrays(arrays[1:], header, codec)
            saved.check_checksum(arrays)
            self._take_bounds(header)
        except BaseException:
            self.recipe = before
            raise
        self._balance = None
        self._clear()
        rest = list(arrays[1:])
        if header.has_balance:
            self._balance = rest.pop()
            good = mx.isfinite(self._balance).all() & (self._balance > 0).all()
            saved.check(bool(good.item()), "a balance of positive numbers", "others")
        if not rest:
            return
        self._codec = self._make_codec(header.head_dim, header.value_dim, self._balance, value_dtype)
        *self._packed, first_keys, first_values, tail_keys, tail_values = rest
        self._first = Exact(first_keys, first_values) if header.n_exact[0] else None
        self._tail = Exact(tail_keys, tail_values)
        self.n_first, self.n_coded, self.n_tail = header.counts
        self.n_dropped = header.n_dropped
        self._ids = new_ids(self.n_coded) if self._has_ids else NO_IDS

    def _take_bounds(self, header: saved.Header) -> None:
        saved.check(header.window is None, "a cache of all tokens", f"a window of {header.window}")
        self.max_size = header.max_size

    def _coded_sum(self) -> mx.array | None:
        """The coded tokens' part of the checksum, if there are any; only that of blocks that are new is computed."""
        n, total = self._summed or (0, None)
        self._hold_all()
        if self._codec is not None and n < self.n_coded:
            begin = [n // per for per in self._codec.per_row]
            total = saved.sum_of(self._codec.cut(self._packed, n, self.n_coded), begin, previous=total)
            self._summed = (self.n_coded, total)
        return total

    def _coded_arrays(self) -> list[mx.array]:
        """The coded tokens without room for growth."""
        self._hold_all()
        return self._own_coded()

    def _own_coded(self) -> list[mx.array]:
        """Those in the packed buffers."""
        if self._codec is None or not self.size():
            return []
        return self._codec.cut(self._packed, 0, self.n_coded - self._n_based)

    def _based_coded(self) -> list[mx.array]:
        """Those in the prefix that other caches may share."""
        return [] if self._base is None else self._base.parts(0, self._base.n_coded)

    def _exact_arrays(self) -> list[mx.array]:
        """The exact tokens, first and recent ones, without room for growth."""
        if self._tail is None or not self.size():
            return []
        first = self._tail.cut(0, 0) if self._first is None else self._first
        return [*first, *self._tail.cut(0, self._n_leading + self.n_tail)]

    def _header(self) -> saved.Header:
        sizes: tuple[int, int, int, int] = (0, 0, 0, 0)
        if self._codec is not None and self._tail is not None and self.size():
            batch, n_kv_heads = self._tail.keys.shape[:2]
            sizes = (self._codec.head_dim, self._codec.value_dim, batch, n_kv_heads)
        elif self._balance is not None:
            sizes = (self._balance.shape[1], 0, 0, self._balance.shape[0])
        counts = (self.n_first, self.n_coded, self.n_tail)
        has_balance = self._balance is not None
        return saved.Header(
            self.recipe, *sizes, counts, has_balance, self.max_size, self.n_dropped, self._window, self.is_latent
        )

    @property
    def meta_state(self) -> str:
        """Nothing: all is in `state` (mlx-lm up to 0.31.3 asks for it)."""
        return ""

    @meta_state.setter
    def meta_state(self, value: str) -> None:
        pass

    @classmethod
    def from_state(cls, state: Sequence[mx.array], meta_state: object = None) -> TurboQuantKVCache:
        """A cache from the arrays of `state`.

        Raises:
            ValueError: The arrays are not a cache's, are incomplete, or of another state or format version.
        """
        cache = cls()
        cache.state = state
        return cache

    def coded_parts(self, begin: int, end: int) -> list[mx.array]:
        """The packed arrays of the coded tokens `begin` to `end`, counted from the first coded one; whole blocks."""
        assert self._codec is not None and 0 <= begin <= end <= self.n_coded
        n = self._n_based
        if begin >= n:
            return self._codec.cut(self._packed, begin - n, end - n)
        assert self._base is not None
        based = self._base.parts(begin, min(end, n))
        if end <= n:
            return based
        own = self._codec.cut(self._packed, 0, end - n)
        return [mx.concatenate([x, y], axis=2) for x, y in zip(based, own, strict=True)]

    def exact_parts(self) -> tuple[Exact | None, Exact]:
        """The first tokens, None if there are none, and the recent ones, once there are codes between them."""
        assert self._tail is not None and self.n_coded
        return self._first, self._tail.cut(0, self.n_tail)

    def fill(self, packed: Sequence[mx.array], first: Exact | None, tail: Exact, ids: Ids | None = None) -> None:
        """Hold these tokens, in a cache that is empty: as many exact first ones as the recipe says, and then whole blocks.

        Args:
            packed: As `coded_parts` gave them, of a cache with the same recipe and balance; at least one block.
            first: As `exact_parts`. ``tail``: likewise, perhaps of no token.
            ids: Names of the blocks, the same for the same bytes. Default: new ones.

        Raises:
            ValueError: Arrays that do not fit the recipe or each other.
        """
        assert self.size() == 0
        head_dim, value_dim = tail.keys.shape[3], tail.values.shape[3]
        codec = self._make_codec(head_dim, value_dim, self._balance, tail.values.dtype)
        n_coded = packed[0].shape[2]
        n_first = 0 if first is None else first.n_tokens
        batch, n_kv_heads = tail.keys.shape[:2]
        counts = (n_first, n_coded, tail.n_tokens)
        numbers = (head_dim, value_dim, batch, n_kv_heads, counts, False, self.max_size, 0)
        header = saved.Header(self.recipe, *numbers)
        saved.check_counts(counts, self.recipe)
        exact = [*(first or tail.cut(0, 0)), *tail]
        saved.check_arrays([*packed, *exact], header, self._make_codec(head_dim, value_dim, None, tail.values.dtype))
        if self._balance is not None and self._balance.shape != (n_kv_heads, head_dim):
            raise ValueError(f"[fill] first: expected {self._balance.shape} as the balance has, got {(n_kv_heads, head_dim)}")
        vars(self).update(n_first=n_first, n_coded=n_coded, n_tail=tail.n_tokens)
        self._codec, self._packed = codec, codec.resized(packed, coded_room(n_coded))
        self._first, self._tail = first, tail
        if self._has_ids:
            self._ids = new_ids(n_coded) if ids is None else ids

    # Sharing

    @property
    def _has_ids(self) -> bool:
        """Whether other caches may share the blocks of this one."""
        return self.can_share and self.max_size is None

    @property
    def _n_based(self) -> int:
        """Coded tokens in the prefix that other caches may share."""
        return 0 if self._base is None else self._base.n_coded

    def share(self) -> None:
        """Let copies of this cache, and what becomes of them in batches, hold its first and its coded tokens together with it.

        Nothing else changes. The cache takes them back, as a copy if others have them still, when it is used again itself. A
        cache of fewer than 512 coded tokens, and one that drops tokens, stays as it is.
        """
        if self._base is None and self._has_ids and is_worth_sharing(self.n_coded) and self._is_single:
            assert self._codec is not None and self._tail is not None
            base = Prefix(self._codec, self._packed, self._first, self._ids)
            packed = self._codec.empty(*self._tail.keys.shape[:2])
            vars(self).update(_base=base, _packed=packed, _now=None, _last=None)

    @property
    def prefixes(self) -> list[Prefix | None]:
        """What each sequence shares with other caches, as `BatchTurboQuantKVCache.prefixes`."""
        return [self._base]

    @property
    def _is_single(self) -> bool:
        return self._tail is not None and self._tail.keys.shape[0] == 1

    def _hold_all(self) -> None:
        """Have all coded tokens in the packed buffers, as writing and attention want them."""
        base = self._base
        if base is None:
            return
        assert self._codec is not None
        parts, n_own = base.parts(0, base.n_coded), self.n_coded - base.n_coded
        if n_own:
            packed = stored(self._codec.stores(parts, 0, base.n_coded, self._codec.cut(self._packed, 0, n_own)))
        else:
            wasteful = is_wasteful(base.n_coded, base.root.n_coded)
            packed = self._codec.resized(parts, coded_room(base.n_coded)) if wasteful else parts
        vars(self).update(_base=None, _packed=packed, _now=None)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room for growth included; a prefix that others hold as well counts whole."""
        if self._base is None or self._tail is None:
            return super().nbytes
        return int(self._base.root.nbytes + sum(x.nbytes for x in self._packed) + self._tail.nbytes)

    # Batches

    def to_batch(self, left_padding: Sequence[int]) -> Buffers:
        """An empty batch with this cache's recipe, for prompts that are padded on their left: mlx-vlm asks for one.

        Raises:
            ValueError: The cache holds tokens; `merge` makes a batch that continues it.
        """
        if not self.empty():
            raise ValueError(f"[to_batch] cache: expected an empty cache, got {self.size()} tokens")
        return self._new_batch(left_padding)

    def _new_batch(self, left_padding: Sequence[int]) -> Buffers:
        """An empty batch with this cache's settings."""
        return self.batch_class(left_padding, self.recipe, balance=self._balance, shared=self.shared, max_size=self.max_size)

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> Buffers:
        """A batch, a `BatchTurboQuantKVCache`, whose sequences continue these caches."""
        batch: Buffers = cls.batch_class.merge(caches)
        return batch
