"""A KV cache that stores compressed tokens and hands them to attention as they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext.ops import PackedKeys, PackedValues, quantize_keys, quantize_values, turboquant_attention
from tqext.presets import ROTATIONS, Recipe

if TYPE_CHECKING:
    from tqext.batch import BatchTurboQuantKVCache, Columns

# At most so many new tokens are a decode step (or the check of a draft); more are a prompt.
MAX_STEP_TOKENS = 8
# The packed buffers grow by so many tokens: copying them then costs 1/256 of reading them at every step.
GROWTH = 512
# Tokens the key mean is taken over; with fewer than the lower number at hand, encoding waits.
MEAN_TOKENS = (64, 256)
# In a pipelined loop the last step's attention still holds the packed buffers, and writing to them would copy them.
# Waiting for it is cheaper than copying this many bytes.
WAIT_BYTES = 1 << 20

STATE_MAGIC = 0x54515854
STATE_VERSION = 1


class Exact(NamedTuple):
    """Keys and values as the model made them: ``[B, n_kv_heads, n_tokens, D]`` and ``[..., Dv]``."""

    keys: mx.array
    values: mx.array

    @property
    def n_tokens(self) -> int:
        return int(self.keys.shape[2])

    def cut(self, begin: int, end: int) -> Exact:
        return Exact(self.keys[:, :, begin:end], self.values[:, :, begin:end])

    def then(self, other: Exact) -> Exact:
        return Exact(
            mx.concatenate([self.keys, other.keys.astype(self.keys.dtype)], axis=2),
            mx.concatenate([self.values, other.values.astype(self.values.dtype)], axis=2),
        )

    def resized(self, n_tokens: int) -> Exact:
        """A copy with room for `n_tokens` (a slice would keep the longer array it was cut from alive)."""
        return Exact(resize_tokens(self.keys, n_tokens), resize_tokens(self.values, n_tokens))

    def write(self, begin: int, other: Exact) -> None:
        """Store tokens from `begin` on, in place where nothing else holds the buffers."""
        for buffer, x in zip(self, other, strict=True):
            buffer[:, :, begin : begin + other.n_tokens] = owned(x) if other.n_tokens == self.n_tokens else x

    @property
    def nbytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)


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


def flush_at(recipe: Recipe, has_mean: bool) -> int:
    """The tail's length at which its oldest tokens are encoded."""
    least = recipe.tail + recipe.flush
    return max(least, MEAN_TOKENS[0]) if recipe.mean and not has_mean else least


def crosses_block(n_new: Any, n_tail: Any, least: Any) -> Any:
    """Whether a few tokens (numbers, or arrays of them) would have a block encoded between them if they came one by one."""
    return (n_new > 1) & (n_new <= MAX_STEP_TOKENS) & (n_tail + n_new > least)


def n_for_mean(n_tokens: int) -> int:
    """Tokens to take the mean of, of so many at hand. In whole steps: a few more from a draft change nothing."""
    least, most = MEAN_TOKENS
    return min(n_tokens // least * least, most)


def wait_for_readers(buffers: Sequence[mx.array]) -> None:
    """Wait for a step in flight before its buffers are written to, where that is cheaper than the copy it would cost."""
    if sum(x.nbytes for x in buffers) > WAIT_BYTES:
        mx.synchronize()


class Codec:
    """The packed form of a recipe as a flat list of arrays, token axis at -2."""

    __slots__ = ("head_dim", "recipe", "value_dim")

    def __init__(self, recipe: Recipe, head_dim: int, value_dim: int):
        self.recipe = recipe
        self.head_dim = head_dim
        self.value_dim = value_dim

    @property
    def n_key_parts(self) -> int:
        return 4 if self.recipe.qjl else 2

    def encode(self, tokens: Exact, mean: mx.array | None) -> list[mx.array]:
        """Packed arrays of exact tokens: codes, norms(, signs, residual norms) of keys; codes, params of values."""
        r = self.recipe
        k = quantize_keys(tokens.keys, bits=r.key_bits, mean=mean, qjl=r.qjl, rotation=r.rotation)
        v = quantize_values(tokens.values, bits=r.value_bits, rotation=r.rotation)
        residual = [] if k.signs is None or k.residual_norms is None else [k.signs, k.residual_norms]
        return [k.codes, k.norms, *residual, v.codes, v.params]

    def pack(self, parts: Sequence[mx.array], mean: mx.array | None) -> tuple[PackedKeys, PackedValues]:
        """The objects that attention takes."""
        r, n = self.recipe, self.n_key_parts
        signs, residual_norms = (parts[2], parts[3]) if r.qjl else (None, None)
        keys = PackedKeys(
            codes=parts[0],
            norms=parts[1],
            mean=mean,
            signs=signs,
            residual_norms=residual_norms,
            bits=r.key_bits,
            head_dim=self.head_dim,
            rotation=r.rotation,
        )
        values = PackedValues(
            codes=parts[n], params=parts[n + 1], bits=r.value_bits, head_dim=self.value_dim, rotation=r.rotation
        )
        return keys, values

    def empty(self, batch: int, n_kv_heads: int) -> list[mx.array]:
        """Packed arrays of no tokens."""
        no_keys = mx.zeros((batch, n_kv_heads, 0, self.head_dim))
        no_values = mx.zeros((batch, n_kv_heads, 0, self.value_dim))
        return self.encode(Exact(no_keys, no_values), None)


class Snapshot:
    """What a layer attends to in one step: immutable, in place of both keys and values.

    It is not an array, so a model that computes with the keys itself fails at once instead of giving wrong numbers.

    Attributes:
        packed_keys: Codes of the history. ``packed_values``: the same for values.
        first: The exact first tokens, None if there are none.
        tail: The exact last tokens; the step's own tokens are its last ones.
        shape: ``(B, n_kv_heads, n_tokens, D)``, as the keys would have it.
        columns: None, or how a batch's mask columns and lengths are told (`tqext.batch.Columns`).
        earlier: What the step's earlier tokens attend to, where a block was encoded in between.
        alone: Sequences of a batch for which a block is encoded within the step, and what their tokens attend to.
    """

    __slots__ = ("alone", "columns", "dtype", "earlier", "first", "packed_keys", "packed_values", "shape", "tail")

    def __init__(
        self,
        packed: tuple[PackedKeys, PackedValues],
        first: Exact | None,
        tail: Exact,
        n_tokens: int,
        columns: Columns | None = None,
    ) -> None:
        self.packed_keys, self.packed_values = packed
        self.first = first
        self.tail = tail
        self.shape = (*tail.keys.shape[:2], n_tokens, tail.keys.shape[3])
        self.dtype = tail.keys.dtype
        self.columns = columns
        self.earlier: tuple[Snapshot, ...] = ()
        self.alone: tuple[Alone, ...] = ()

    def __deepcopy__(self, memo: Any) -> Snapshot:
        """Itself: a cache that is copied within a step holds one, and nothing can change it."""
        return self

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
        if self.earlier:
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
        begin = int(self.columns.left_padding[one.row])
        own = mask[..., begin : begin + one.snapshot.shape[2]]
        own = own[..., one.begin : one.end, :] if mask.ndim > 1 and mask.shape[-2] > 1 else own
        return own[one.row : one.row + 1] if mask.ndim == 4 and mask.shape[0] > 1 else own

    def _attend_whole(self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None) -> mx.array:
        lengths = None
        if self.columns is not None:
            mask, lengths = self.columns.translate(mask, queries.shape[2])
        return turboquant_attention(
            queries,
            self.packed_keys,
            self.packed_values,
            scale=scale,
            mask=mask,
            tail=(self.tail.keys, self.tail.values),
            sinks=sinks,
            first=None if self.first is None else (self.first.keys, self.first.values),
            lengths=lengths,
        )

    def _attend_in_parts(
        self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None
    ) -> mx.array:
        """Each of a draft's tokens over what it would have found without the draft."""
        outs = []
        begin, n_before = 0, self.shape[2] - queries.shape[2]
        for part in (*self.earlier, self):
            n_keys = part.shape[2]
            end = n_keys - n_before
            own = mask
            if isinstance(mask, mx.array):
                own = mask[..., begin:end, :n_keys] if mask.shape[-2] > 1 else mask[..., :n_keys]
            rows = queries[:, :, begin:end]
            outs.append(part._attend_whole(rows, scale, own, sinks))
            begin = end
        return mx.concatenate(outs, axis=2)


class Alone(NamedTuple):
    """The step's tokens ``begin`` to ``end`` of the sequence ``row`` of a batch."""

    row: int
    begin: int
    end: int
    snapshot: Snapshot


def create_mask(n_new: int, offset: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
    """The mask of `n_new` tokens after `offset` others, as mlx-lm's caches make it."""
    if window_size is None and n_new == 1:
        return None
    if window_size is None and not return_array:
        return "causal"
    columns = mx.arange(offset + n_new)[None]
    rows = mx.arange(offset, offset + n_new)[:, None]
    mask = rows >= columns
    return mask if window_size is None else mask & (rows < columns + window_size)


class Buffers:
    """What the caches of one sequence and of a batch keep."""

    recipe: Recipe
    _codec: Codec | None
    _mean: mx.array | None
    _packed: list[mx.array]
    _first: Exact | None
    _tail: Exact | None

    def _open(self, keys: mx.array, values: mx.array) -> None:
        """Make room for tokens like these."""
        self._codec = Codec(self.recipe, keys.shape[-1], values.shape[-1])
        self._packed = self._codec.empty(*keys.shape[:2])
        nothing = Exact(keys[:, :, :0], values[:, :, :0])
        self._tail = nothing.resized(self._tail_room)
        self._first = nothing.resized(self.recipe.sinks)

    @property
    def _tail_room(self) -> int:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room for growth included."""
        exact = sum(part.nbytes for part in (self._first, self._tail) if part is not None)
        mean = 0 if self._mean is None else self._mean.nbytes
        return int(exact + mean + sum(x.nbytes for x in self._packed))

    @property
    def keys(self) -> mx.array | None:
        """The exact recent keys: pipeline-parallel models hang the next stage's dependency on them."""
        return None if self._tail is None else self._tail.keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        assert self._tail is not None
        self._tail = self._tail._replace(keys=value)

    def is_trimmable(self) -> bool:
        return True


class TurboQuantKVCache(Buffers):
    """The cache of one layer: first tokens exact, then codes, then the recent tokens exact.

    Takes the place of mlx-lm's ``KVCache``. `update_and_fetch` returns a `Snapshot` in place of keys and values;
    attention over it is ``snapshot.attend``, which `tqext.install` routes ``mx.fast.scaled_dot_product_attention`` to.

    Args:
        recipe: What to store. Default: 3-bit keys, 2-bit values, the last 32 and the first 4 tokens exact.
        shared: Other layers attend to these tokens too (`keys_and_values`), and find what this layer found.
    """

    def __init__(self, recipe: Recipe | None = None, *, balance: mx.array | None = None, shared: bool = False) -> None:
        self.recipe = recipe or Recipe()
        self.balance = balance
        self.shared = shared
        self._clear()

    def _clear(self) -> None:
        self._codec: Codec | None = None
        self._mean: mx.array | None = None
        self._packed: list[mx.array] = []
        self._first: Exact | None = None
        self._tail: Exact | None = None
        self._last: Snapshot | None = None
        self.n_first = 0
        self.n_coded = 0
        self.n_tail = 0

    # Writing

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        """Append tokens and return what the step attends to.

        Args:
            keys: ``[B, n_kv_heads, L, D]``, any float type.
            values: ``[B, n_kv_heads, L, Dv]``.

        Returns:
            The same snapshot twice. The L tokens themselves are exact in it.
        """
        before = dict(vars(self))
        try:
            return self._update(keys, values)
        except BaseException:  # an interrupt, wherever it comes, leaves what was there: tokens past the counts are nobody's
            vars(self).update(before)
            raise

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Snapshot, Snapshot]:
        self._last = None
        if self._codec is None:
            self._open(keys, values)
        # Before this step, not after the last one: tokens that a draft got wrong were trimmed in between, and the
        # step before no longer holds the packed buffers.
        self._flush()
        tokens = Exact(keys, values)
        # The first tokens of all are a prompt, however short.
        if self.offset > 0 and crosses_block(tokens.n_tokens, self.n_tail, self._flush_at):
            snapshot = self._draft_snapshot(tokens)
            self._append(tokens)
        else:
            self._append(tokens)
            snapshot = self._snapshot()
        self._keep_first()
        if tokens.n_tokens > MAX_STEP_TOKENS:
            self._flush()  # at once: no layer keeps its prompt uncompressed while the next one runs
        self._last = snapshot if self.shared else None
        return snapshot, snapshot

    def _draft_snapshot(self, tokens: Exact) -> Snapshot:
        """What each of a few tokens would attend to if they came one by one, some of them after a block is encoded.

        Checking a draft then gives the answer that decoding without one gives. Nothing is encoded for good: the draft may be
        wrong, and then its tokens are trimmed.
        """
        fork = copy.copy(self)
        fork._packed = [x[:] for x in self._packed]
        fork._first = None if self._first is None else Exact(*(x[:] for x in self._first))
        fork._tail = None if self._tail is None else Exact(*(x[:] for x in self._tail))
        parts: list[Snapshot] = []
        begin = 0
        while begin < tokens.n_tokens:
            fork._flush()
            end = min(tokens.n_tokens, begin + max(1, fork._flush_at - fork.n_tail))
            fork._append(tokens.cut(begin, end))
            parts.append(fork._snapshot())
            fork._keep_first()
            begin = end
        parts[-1].earlier = tuple(parts[:-1])
        return parts[-1]

    @property
    def _tail_room(self) -> int:
        return self._flush_at + MAX_STEP_TOKENS

    @property
    def _flush_at(self) -> int:
        return flush_at(self.recipe, self._mean is not None)

    def _append(self, tokens: Exact) -> None:
        assert self._tail is not None
        end = self.n_tail + tokens.n_tokens
        if end <= self._tail.n_tokens:
            self._tail.write(self.n_tail, tokens)
        else:
            self._tail = self._tail.cut(0, self.n_tail).then(tokens)
        self.n_tail = end

    def overwrite(self, *, attended: bool) -> None:
        """Flip bits of every code, or (`attended` False) fill the room that no token owns: for tests of what is read."""
        garbage = 0x5A5A5A5A
        n = self.n_coded
        for i, x in enumerate(self._packed):
            if attended:
                self._packed[i] = x ^ garbage if x.dtype == mx.uint32 else x
            else:
                filler = mx.full(
                    (*x.shape[:2], x.shape[2] - n + 1, x.shape[3]), garbage if x.dtype == mx.uint32 else 1e4, x.dtype
                )
                self._packed[i] = mx.concatenate([x[:, :, :n], filler], axis=2)
        if not attended and self._tail is not None:
            poison = Exact(*(mx.full((*x.shape[:2], 8, x.shape[3]), 1e4, x.dtype) for x in self._tail))
            self._tail = self._tail.cut(0, self.n_tail).then(poison)

    def _keep_first(self) -> None:
        """Move the first tokens ever from the tail to their place."""
        missing = self.recipe.sinks - self.n_first
        if missing <= 0 or self.n_coded or self._tail is None or self._first is None:
            return
        n = min(missing, self.n_tail)
        self._first.write(self.n_first, self._tail.cut(0, n))
        self.n_first += n
        self._drop_from_tail(n)

    def _drop_from_tail(self, n: int) -> None:
        assert self._tail is not None
        self.n_tail -= n
        self._tail = self._tail.cut(n, n + self.n_tail).resized(max(self.n_tail, self._tail_room))

    def _flush(self) -> None:
        """Encode the tail's oldest tokens, in whole blocks, down to `tail` and a part of a block."""
        if self.n_tail < self._flush_at or self._tail is None or self._codec is None:
            return
        if self.recipe.mean and self._mean is None:
            n = n_for_mean(self.n_tail)
            self._mean = self._tail.keys[:, :, :n].astype(mx.float32).sum(axis=2) / n
        n = (self.n_tail - self.recipe.tail) // self.recipe.flush * self.recipe.flush
        self._append_packed(self._codec.encode(self._tail.cut(0, n), self._mean), n)
        self._drop_from_tail(n)

    def _append_packed(self, parts: Sequence[mx.array], n: int) -> None:
        end = self.n_coded + n
        if end > self._packed[0].shape[2]:
            room = (end + GROWTH - 1) // GROWTH * GROWTH
            self._packed = [resize_tokens(x[:, :, : self.n_coded], room) for x in self._packed]
        else:
            wait_for_readers(self._packed)
        for buffer, new in zip(self._packed, parts, strict=True):
            buffer[:, :, self.n_coded : end] = new
        self.n_coded = end

    # Reading

    def _snapshot(self) -> Snapshot:
        assert self._codec is not None and self._tail is not None
        packed = self._codec.pack([x[:, :, : self.n_coded] for x in self._packed], self._mean)
        first = self._first.cut(0, self.n_first) if self._first is not None and self.n_first else None
        return Snapshot(packed, first, self._tail.cut(0, self.n_tail), self.offset)

    def keys_and_values(self) -> tuple[Snapshot, Snapshot]:
        """The snapshot of the last step, twice, for layers that share another layer's tokens.

        Unless the cache is known to be `shared`, and after a trim or once the step was evaluated, that of the present state.
        """
        if self._codec is None:
            raise ValueError("[keys_and_values] cache: expected tokens, got an empty cache")
        self.shared = True
        snapshot = self._last or self._snapshot()
        return snapshot, snapshot

    @property
    def offset(self) -> int:
        """The number of tokens."""
        return self.n_first + self.n_coded + self.n_tail

    def size(self) -> int:
        """The number of tokens."""
        return self.offset

    def empty(self) -> bool:
        """Whether no token is stored."""
        return self.offset == 0

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens in the buffers, without room for growth."""
        return sum(x.nbytes for x in self._arrays())

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that the same tokens take in fp16, without room for growth."""
        if self._codec is None or self._tail is None:
            return 0
        batch, n_kv_heads = self._tail.keys.shape[:2]
        return int(batch * n_kv_heads * self.offset * (self._codec.head_dim + self._codec.value_dim) * 2)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens: None, ``"causal"``, or a bool array if asked for or if a window needs it."""
        return create_mask(N, self.offset, return_array, window_size)

    # Trimming

    def trim(self, n: int) -> int:
        """Forget the last n tokens; returns how many were there to forget."""
        self._last = None
        n = min(n, self.offset)
        from_tail = min(n, self.n_tail)
        from_coded = min(n - from_tail, self.n_coded)
        self.n_tail -= from_tail
        self.n_coded -= from_coded
        self.n_first -= n - from_tail - from_coded
        if from_coded and self.n_coded == 0:
            self._mean = None  # the mean belongs to codes that are gone
        return n

    # State

    @property
    def state(self) -> list[mx.array]:
        """Arrays that hold everything: the header, mean, first tokens, tail, and the packed arrays.

        The header ends in a checksum of itself and the arrays, so that a damaged file is no other cache.
        """
        self._last = None  # mlx-lm evaluates the state when a step is over
        arrays = self._arrays()
        sizes = (self._codec.head_dim, self._codec.value_dim, arrays[0].shape[0]) if self._codec is not None else (0, 0, 0)
        return [_with_checksum(self._header(*sizes), arrays), *arrays]

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        header = _read_header(arrays)
        self.recipe = header.recipe
        self._clear()
        if len(arrays) == 1:
            _check_state(sum(header.counts) == 0, "no tokens without arrays", header.counts)
            _check_checksum(arrays)
            return
        codec = Codec(self.recipe, header.head_dim, header.value_dim)
        _check_arrays(arrays, header, codec)
        _check_checksum(arrays)
        self._codec = codec
        mean, first_keys, first_values, tail_keys, tail_values, *packed = arrays[1:]
        self.n_first, self.n_coded, self.n_tail = header.counts
        self._mean = mean if mean.size else None
        self._packed = list(packed)
        self._tail = Exact(tail_keys, tail_values).resized(max(self.n_tail, self._tail_room))
        if self.recipe.sinks:
            self._first = Exact(first_keys, first_values).resized(self.recipe.sinks)

    def _arrays(self) -> list[mx.array]:
        """The tokens without room for growth: mean, first tokens, tail, packed arrays; nothing if none was ever stored."""
        if self._tail is None:
            return []
        tail = self._tail.cut(0, self.n_tail)
        first = tail.cut(0, 0) if self._first is None else self._first.cut(0, self.n_first)
        mean = mx.zeros((*tail.keys.shape[:2], 0)) if self._mean is None else self._mean
        return [mean, *first, *tail, *(x[:, :, : self.n_coded] for x in self._packed)]

    def _header(self, head_dim: int, value_dim: int, batch: int) -> list[int]:
        r = self.recipe
        rotation = ROTATIONS.index(r.rotation)
        recipe = [r.key_bits, r.value_bits, int(r.qjl), rotation, int(r.mean), r.tail, r.sinks, r.flush]
        counts = [self.n_first, self.n_coded, self.n_tail]
        head = [STATE_MAGIC, STATE_VERSION, packed_format.VERSION]
        return [*head, *recipe, head_dim, value_dim, batch, *counts]

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
            ValueError: The arrays are not a cache's, are incomplete, or of another format version.
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


class _Header(NamedTuple):
    recipe: Recipe
    head_dim: int
    value_dim: int
    batch: int
    counts: tuple[int, int, int]


_HEADER_INTS = 18  # with the checksum


def _check_state(ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[TurboQuantKVCache] state: expected {expected}, got {got}")


def _read_header(arrays: Any) -> _Header:
    _check_state(isinstance(arrays, (list, tuple)) and len(arrays) > 0, "a list of arrays", type(arrays).__name__)
    for x in arrays:
        _check_state(isinstance(x, mx.array), "a list of arrays", f"one with {type(x).__name__} in it")
    first = arrays[0]
    _check_state(first.dtype == mx.int32 and first.ndim == 1, "an int32 header first", f"{first.shape} of {first.dtype}")
    ints: Any = first.tolist()
    _check_state(len(ints) >= 3 and ints[0] == STATE_MAGIC, "a tqext cache", "arrays of something else")
    versions = (STATE_VERSION, packed_format.VERSION)
    _check_state((ints[1], ints[2]) == versions, f"state and format versions {versions}", (ints[1], ints[2]))
    _check_state(len(ints) == _HEADER_INTS, f"a header of {_HEADER_INTS} numbers", len(ints))
    key_bits, value_bits, qjl, rotation, mean, tail, sinks, flush, head_dim, value_dim, batch, *counts = ints[3:-1]
    _check_state(rotation in range(len(ROTATIONS)), "a known rotation", rotation)
    _check_state(min(counts) >= 0, "counts of tokens", counts)
    _check_state(min(head_dim, value_dim, batch) >= 0, "sizes of at least 0", (head_dim, value_dim, batch))
    recipe = Recipe(key_bits, value_bits, bool(qjl), ROTATIONS[rotation], bool(mean), tail, sinks, flush)
    return _Header(recipe, head_dim, value_dim, batch, (counts[0], counts[1], counts[2]))


def _checksum(header: Sequence[int], arrays: Sequence[mx.array]) -> mx.array:
    """uint32 ``[1]``: all words, each array's and each number's times another odd number, modulo 2**32."""
    total = mx.array([sum((2 * i + 1) * n for i, n in enumerate(header)) % 2**32], mx.uint32)
    for i, x in enumerate(arrays):
        words = x.view(mx.uint32 if x.dtype.size == 4 else mx.uint16)
        total = total + words.astype(mx.uint32).sum() * mx.array(2 * i + 1, mx.uint32)
    return total


def _with_checksum(header: Sequence[int], arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([mx.array(list(header), mx.int32), _checksum(header, arrays).view(mx.int32)])


def _check_checksum(arrays: Sequence[mx.array]) -> None:
    numbers: Any = arrays[0].tolist()
    *header, stored = numbers
    found = _checksum(header, arrays[1:]).view(mx.int32).item()
    _check_state(found == stored, f"arrays with the checksum {stored} (the file is damaged)", found)


def _check_arrays(arrays: Sequence[mx.array], header: _Header, codec: Codec) -> None:
    """Every array has the shape and type that the header implies."""
    n_arrays = 6 + codec.n_key_parts + 2
    _check_state(len(arrays) == n_arrays, f"{n_arrays} arrays", len(arrays))
    tail_keys = arrays[4]
    _check_state(tail_keys.ndim == 4, "tail keys with 4 axes", tail_keys.shape)
    n_kv_heads, dtype = tail_keys.shape[1], tail_keys.dtype
    _check_state(dtype in (mx.float32, mx.float16, mx.bfloat16), "tail keys of a float type", dtype)
    n_first, n_coded, n_tail = header.counts
    rows = (header.batch, n_kv_heads)
    mean_dim = header.head_dim if header.recipe.mean and n_coded else 0
    dims = (header.head_dim, header.value_dim)
    expected: list[tuple[int, ...]] = [(*rows, mean_dim)]
    expected += [(*rows, n, dim) for n in (n_first, n_tail) for dim in dims]
    dtypes = [mx.float32] + [dtype] * 4
    for template in codec.empty(*rows):
        expected.append((*rows, n_coded, template.shape[-1]))
        dtypes.append(template.dtype)
    for x, shape, kind in zip(arrays[1:], expected, dtypes, strict=True):
        _check_state(x.shape == shape and x.dtype == kind, f"{shape} of {kind}", f"{x.shape} of {x.dtype}")
