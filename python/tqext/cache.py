"""A KV cache that stores compressed tokens and hands them to attention as they are."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from tqext import state as saved
from tqext._ext import append_token
from tqext.ops import PackedKeys, PackedValues
from tqext.presets import Recipe
from tqext.state import STATE_MAGIC, STATE_VERSION
from tqext.state import checksum as _checksum
from tqext.tokens import (
    BLOCK,
    GROWTH,
    Codec,
    Exact,
    History,
    check_balance,
    check_tokens,
    coded_room,
    exact_room,
    wait_for_readers,
)

if TYPE_CHECKING:
    from tqext.batch import BatchTurboQuantKVCache, Columns

MAX_CODED = (1 << 31) - 1  # tokens are counted in 32 bits
__all__ = [
    "BLOCK",
    "GROWTH",
    "STATE_MAGIC",
    "STATE_VERSION",
    "Exact",
    "Snapshot",
    "TurboQuantKVCache",
    "_checksum",
]


class Snapshot:
    """What a layer attends to in one step: immutable, in place of both keys and values.

    It is not an array, so a model that computes with the keys itself fails at once instead of giving wrong numbers.

    Attributes:
        packed_keys: Codes of the history. ``packed_values``: the same for values.
        first: The exact first tokens, None if there are none.
        tail: The exact last tokens; the step's own tokens are its last ones.
        shape: ``(B, n_kv_heads, n_tokens, D)``, as the keys would have it.
        columns: None, or how a batch's mask columns and lengths are told (`tqext.batch.Columns`).
        earlier: What the step's earlier tokens attend to, where a block is encoded in between, and how many they are.
        gap: Tokens that a bounded cache dropped: where they were, and how many. ``earlier`` may hold some of them yet.
        alone: Sequences of a batch for which a block is encoded within the step, and what their tokens attend to.
    """

    __slots__ = ("alone", "columns", "earlier", "gap", "history", "n_tokens", "tail")

    def __init__(
        self, history: History, tail: Exact, n_tokens: int, columns: Columns | None = None, gap: tuple[int, int] = (0, 0)
    ) -> None:
        self.history = history
        self.tail = tail
        self.n_tokens = n_tokens
        self.columns = columns
        self.gap = gap
        self.earlier: tuple[Snapshot, int] | None = None
        self.alone: tuple[Alone, ...] = ()

    def __deepcopy__(self, memo: Any) -> Snapshot:
        """Itself: a cache that is copied within a step holds one, and nothing can change it."""
        return self

    @property
    def packed_keys(self) -> PackedKeys:
        return self.history.packed_keys

    @property
    def packed_values(self) -> PackedValues:
        return self.history.packed_values

    @property
    def first(self) -> Exact | None:
        return self.history.first

    @property
    def shape(self) -> tuple[int, ...]:
        keys = self.tail.keys
        return (*keys.shape[:2], self.n_tokens, keys.shape[3])

    @property
    def dtype(self) -> mx.Dtype:
        return self.tail.keys.dtype

    @property
    def ndim(self) -> int:
        return 4

    def astype(self, dtype: mx.Dtype) -> Snapshot:
        """Itself: attention computes in the queries' type (stablelm asks for this)."""
        return self

    def attend(
        self, queries: mx.array, scale: float, mask: mx.array | str | None = None, sinks: mx.array | None = None
    ) -> mx.array:
        """softmax(scale q k^T + mask) v of the queries ``[B, n_q_heads, L, D]`` over all tokens of the snapshot."""
        if self.earlier is not None:
            return self._attend_in_parts(queries, scale, mask, sinks)
        out = self._attend_whole(queries, scale, mask, sinks)
        for one in self.alone:
            rows = slice(one.row, one.row + 1), slice(None), slice(one.begin, one.end)
            out[rows] = one.snapshot.attend(queries[rows], scale, self._mask_alone(one, mask), sinks)
        return out

    def _mask_alone(self, one: Alone, mask: mx.array | str | None) -> mx.array | str | None:
        """A batch's mask as the sequence would have it alone: its columns follow its padding."""
        assert self.columns is not None
        if not isinstance(mask, mx.array) or self.columns.is_own(mask, self.columns.n_queries):
            return "causal"
        whole = one.snapshot if one.snapshot.earlier is None else one.snapshot.earlier[0]
        at, n_dropped = whole.gap
        begin = int(self.columns.left_padding[one.row])
        n_tokens = self.columns.n_stock + one.end - begin - n_dropped
        own = without(mask[..., begin:], at, n_dropped)[..., :n_tokens]
        own = own[..., one.begin : one.end, :] if mask.ndim > 1 and mask.shape[-2] > 1 else own
        return own[one.row : one.row + 1] if mask.ndim == 4 and mask.shape[0] > 1 else own

    def _attend_whole(self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None) -> mx.array:
        lengths = None
        if self.columns is not None:
            mask, lengths = self.columns.translate(mask, queries.shape[2])
        return self.history.attend(queries, *self.tail, scale, mask, sinks, lengths)

    def _attend_in_parts(
        self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None
    ) -> mx.array:
        """The step's earlier tokens over what there was before a block was encoded, the others over what there is now."""
        assert self.earlier is not None
        earlier, n = self.earlier
        at = self.gap[0]
        outs = []
        for part, begin, end in ((earlier, 0, n), (self, n, queries.shape[2])):
            own = mask
            if isinstance(mask, mx.array):
                own = mask[..., begin:end, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
                own = without(own, at, part.gap[1] - earlier.gap[1])[..., : part.shape[2]]
            outs.append(part._attend_whole(queries[:, :, begin:end], scale, own, sinks))
        return mx.concatenate(outs, axis=2)


def without(mask: mx.array, at: int, n: int) -> mx.array:
    """A mask less its n columns from `at` on."""
    return mask if n == 0 else mx.concatenate([mask[..., :at], mask[..., at + n :]], axis=-1)


class Alone(NamedTuple):
    """The step's tokens ``begin`` to ``end`` of the sequence ``row`` of a batch."""

    row: int
    begin: int
    end: int
    snapshot: Snapshot


def create_mask(
    n_new: int,
    n_held: int,
    return_array: bool = False,
    window_size: int | None = None,
    gap: tuple[int, int] = (0, 0),
) -> mx.array | str | None:
    """The mask of `n_new` tokens after `n_held` others, as mlx-lm's caches make it; `gap` as in `Snapshot`."""
    if window_size is None and n_new == 1:
        return None
    if window_size is None and not return_array:
        return "causal"
    at, n_dropped = gap
    columns = mx.arange(n_held + n_new)[None]
    rows = mx.arange(n_held, n_held + n_new)[:, None]
    mask = rows >= columns
    if window_size is None:
        return mask
    return mask & (rows < mx.where(columns < at, columns - n_dropped, columns) + window_size)


class Buffers:
    """What the caches of one sequence and of a batch keep.

    A bounded cache drops its oldest blocks whole. Until the first block is encoded all tokens are in the buffer of recent
    tokens, the first ones as well; then the first ones get their own.
    """

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
        self._codec = Codec(self.recipe, keys.shape[3], values.shape[3], self._balance)
        self._packed = self._codec.empty(*keys.shape[:2])
        self._now = None
        self._tail = Exact(*(mx.zeros((*x.shape[:2], 0, x.shape[3]), x.dtype) for x in (keys, values)))

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
    def to_quantized(self) -> Any:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that shares the balance, which never changes."""
        out = copy.copy(self)
        memo[id(self)] = out
        if self._balance is not None:
            memo[id(self._balance)] = self._balance
        # Not what holds its buffers: the copy has others.
        vars(out).update(copy.deepcopy({**vars(self), "_now": None}, memo))
        return out


class TurboQuantKVCache(Buffers):
    """The cache of one layer: first tokens exact, then codes, then the recent tokens exact.

    Takes the place of mlx-lm's ``KVCache``. `update_and_fetch` returns a `Snapshot` in place of keys and values;
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
        self._summed: tuple[int, mx.array] | None = None  # coded tokens in the checksum so far, and their part of it
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
        if n_first < self.recipe.first:
            n_first += 1
        else:
            n_tail += 1
        snapshot = Snapshot(now, Exact(*views), self.size() + 1, gap=(n_first, self.n_dropped))
        vars(self).update(n_first=n_first, n_tail=n_tail, _last=snapshot if self.shared else None)
        return snapshot

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        check_tokens(keys, values, self._tail)
        self._last = None
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
            self._flush()  # at once: no layer keeps its prompt uncompressed while the next one runs
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
        """Tokens that are dropped when n more are encoded."""
        return max(0, self.n_coded + n - self._most_coded)

    def _append(self, tokens: Exact) -> None:
        assert self._tail is not None
        held = self._n_leading + self.n_tail
        end = held + tokens.n_tokens
        n_tokens = self.size() + tokens.n_tokens
        if tokens.n_tokens > BLOCK:
            self._tail = self._tail.cut(0, held).then(tokens)
        else:
            if end > self._tail.n_tokens:
                self._tail = self._tail.cut(0, held).resized(exact_room(end, n_tokens))
            self._tail.write(held, tokens)
        n_first = self.n_first if self.n_coded else min(self.recipe.first, n_tokens)
        vars(self).update(n_first=n_first, n_tail=n_tokens - n_first - self.n_coded)

    def _flush(self) -> None:
        """Encode the oldest recent tokens, in whole blocks, down to `tail` and a part of a block."""
        n = self._n_due
        if n == 0:
            return
        assert self._tail is not None and self._codec is not None
        leading = self._n_leading
        begin, end = leading + n, leading + self.n_tail
        n_dropped = self._n_over(n)
        n_old = min(n_dropped, self.n_coded)
        n_new = n - (n_dropped - n_old)
        self._write_packed(self._codec.encode(self._tail.cut(begin - n_new, begin)), n_new, n_old)
        first = self._tail.cut(0, leading).resized(leading) if leading else self._first
        tail = self._tail.cut(begin, end).resized(exact_room(end - begin, self.size()))
        counts = {"n_coded": self.n_coded - n_old + n_new, "n_tail": self.n_tail - n, "n_dropped": self.n_dropped + n_dropped}
        vars(self).update(counts, _first=first, _tail=tail, _summed=None if n_old else self._summed)

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
        return Snapshot(self._history(self.n_coded, self._first), tail, self.size(), gap=(self.n_first, self.n_dropped))

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
        n_dropped = self._n_over(BLOCK)
        after = self._codec.cut(self._packed, n_dropped, self.n_coded + BLOCK)
        size, gap = self.size(), (self.n_first, self.n_dropped)
        earlier = Snapshot(before, self._tail.cut(0, leading + due), size - n_tail + due, gap=gap)
        first = self._tail.cut(0, leading) if leading else self._first
        tail = self._tail.cut(leading + BLOCK, leading + n_tail)
        snapshot = Snapshot(self._codec.history(after, first), tail, size - n_dropped, gap=(gap[0], gap[1] + n_dropped))
        snapshot.earlier = earlier, n_new - (n_tail - due)
        return snapshot

    def keys_and_values(self) -> tuple[Snapshot, Snapshot]:
        """The snapshot of the last step, twice, for layers that share another layer's tokens.

        Unless the cache is known to be `shared`, and after a trim or once the step was evaluated, that of the present state.
        """
        if self._codec is None:
            raise ValueError("[keys_and_values] cache: expected tokens, got an empty cache")
        self.shared = True
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
        return sum(x.nbytes for x in (*self._coded_arrays(), *self._exact_arrays()))

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
        check_reach(n, self.n_first, self.size(), self.n_dropped)
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
        first, tail, packed = self._first, self._tail.cut(0, 0), self._packed
        if n_coded == 0 and self.n_dropped == 0 and first is not None:
            tail, first = first.cut(0, n_first), None
        if n_tail:
            tail = tail.then(self._codec.decode(packed, n_coded, n_coded + n_tail, *(x.dtype for x in tail)))
        tail = tail.resized(exact_room(tail.n_tokens, left))
        room = coded_room(n_coded)
        if packed[0].shape[2] > 2 * room:
            packed = self._codec.resized(self._codec.cut(packed, 0, n_coded), room)
        counts = {"n_first": n_first, "n_coded": n_coded, "n_tail": n_tail}
        vars(self).update(counts, _first=first, _tail=tail, _packed=packed, _now=None, _summed=None)

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
        total = saved.checksum(numbers, exact, begin=1 + len(coded)) + self._coded_sum()
        return [saved.header_array(numbers, total), *coded, *exact]

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        header = saved.read_header(arrays)
        codec = Codec(header.recipe, header.head_dim, header.value_dim)
        saved.check_arrays(arrays[1:], header, codec)
        saved.check_checksum(arrays)
        self.recipe, self.max_size = header.recipe, header.max_size
        self._balance = None
        self._clear()
        rest = list(arrays[1:])
        if header.has_balance:
            self._balance = rest.pop()
            good = mx.isfinite(self._balance).all() & (self._balance > 0).all()
            saved.check(bool(good.item()), "a balance of positive numbers", "others")
        if not rest:
            return
        self._codec = Codec(header.recipe, header.head_dim, header.value_dim, self._balance)
        *self._packed, first_keys, first_values, tail_keys, tail_values = rest
        self._first = Exact(first_keys, first_values) if header.n_exact[0] else None
        self._tail = Exact(tail_keys, tail_values)
        self.n_first, self.n_coded, self.n_tail = header.counts
        self.n_dropped = header.n_dropped

    def _coded_sum(self) -> mx.array:
        """The coded tokens' part of the checksum; only that of blocks that are new is computed."""
        n, total = self._summed or (0, mx.zeros(1, mx.uint32))
        if self._codec is not None and n < self.n_coded:
            begin = [n // per for per in self._codec.per_row]
            total = total + saved.sum_of(self._codec.cut(self._packed, n, self.n_coded), begin)
            self._summed = (self.n_coded, total)
        return total

    def _coded_arrays(self) -> list[mx.array]:
        """The coded tokens without room for growth."""
        return self._codec.cut(self._packed, 0, self.n_coded) if self._codec is not None and self.size() else []

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
        return saved.Header(self.recipe, *sizes, counts, self._balance is not None, self.max_size, self.n_dropped)

    @property
    def meta_state(self) -> str:
        """Nothing: all is in `state` (mlx-lm up to 0.31.3 asks for it)."""
        return ""

    @meta_state.setter
    def meta_state(self, value: str) -> None:
        pass

    @classmethod
    def from_state(cls, state: Sequence[mx.array], meta_state: Any = None) -> TurboQuantKVCache:
        """A cache from the arrays of `state`.

        Raises:
            ValueError: The arrays are not a cache's, are incomplete, or of another state or format version.
        """
        cache = cls()
        cache.state = state
        return cache

    # Batches

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """A batch whose sequences continue these caches."""
        from tqext.batch import BatchTurboQuantKVCache

        return BatchTurboQuantKVCache.merge(caches)


def check_max_size(max_size: int | None, recipe: Recipe) -> int | None:
    """The bound of a cache, if the recipe leaves room for codes in it."""
    least = recipe.first + recipe.tail + 2 * BLOCK
    if max_size is not None and not least <= operator.index(max_size) <= MAX_CODED:
        raise ValueError(f"[TurboQuantKVCache] max_size: expected None or {least} (first + tail + 128) or more, got {max_size}")
    return max_size


def check_reach(n: int, n_first: int, n_held: int, n_dropped: int) -> None:
    """Forgetting n of the tokens, of which so many are held and were dropped, leaves some behind the gap, or nothing at all."""
    most = n_held - max(n_first, 1)
    if n_dropped and most < n < n_held + n_dropped:
        raise ValueError(f"[trim] n: expected at most {most}, as older tokens were dropped (max_size), or all, got {n}")


def trim_count(n: Any) -> int:
    """A number of tokens to forget."""
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"[trim] n: expected at least 0, got {n}")
    return n
