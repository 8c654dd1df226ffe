"""What a layer attends to in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import mlx.core as mx

from tqext.kv.codec import History
from tqext.kv.columns import Columns
from tqext.kv.tokens import Exact
from tqext.ops import PackedKeys, PackedValues


class AttendsItself:
    """Stands in for the keys and values that a cache returns: the attention to them is asked of it.

    ``mx.fast.scaled_dot_product_attention``, once `tqext.mlx_lm.hook` was called, passes such calls on.
    """

    __slots__ = ()

    @property
    def ndim(self) -> int:
        return 4

    def astype(self, dtype: mx.Dtype) -> Self:
        """Itself: attention computes in the queries' type (stablelm asks for this)."""
        return self

    def attention(
        self,
        previous: Callable[..., mx.array],
        queries: mx.array,
        values: object,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """The output of attention.

        Args:
            previous: MLX's function.
            queries: ``[B, n_q_heads, L, D]``.
            values: This very object, unless the model mixes the tokens of two caches.
            scale: Of the scores.
            mask: None, ``"causal"`` or an array.
            sinks: Logits of softmax that belong to no token.
            **options: MLX's other arguments.
        """
        if values is not self:
            raise TypeError("[scaled_dot_product_attention] v: expected the values of the keys' snapshot")
        stream = options.pop("stream", None)
        options.pop("force_fused", None)  # there is no unfused form
        if options:
            raise TypeError(f"[scaled_dot_product_attention] unknown arguments {sorted(options)} for a compressed cache")
        if stream is None:
            return self.attend(queries, scale, mask, sinks)
        with mx.stream(stream):
            return self.attend(queries, scale, mask, sinks)

    def attend(
        self, queries: mx.array, scale: float, mask: mx.array | str | None = None, sinks: mx.array | None = None
    ) -> mx.array:
        """softmax(scale q k^T + mask) v of the queries ``[B, n_q_heads, L, D]`` over all tokens."""
        raise NotImplementedError


class Snapshot(AttendsItself):
    """What a layer attends to in one step: immutable, instead of both keys and values.

    It is not an array, so a model that computes with the keys itself fails at once instead of giving wrong numbers.

    Attributes:
        packed_keys: Codes of the history. ``packed_values``: the same for values.
        first: The exact first tokens, None if there are none.
        tail: The exact last tokens; the step's own tokens are its last ones.
        shape: ``(B, n_kv_heads, n_tokens, D)``, as the keys would have it.
        columns: None, or how a batch's mask columns and lengths are told (`Columns`).
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

    def __deepcopy__(self, memo: dict[int, object]) -> Snapshot:
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

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        lse: bool = False,
    ) -> mx.array:
        """softmax(scale q k^T + mask) v of the queries ``[B, n_q_heads, L, D]`` over all tokens of the snapshot.

        lse: in fp32, with the log of the sum of weights as one column more.
        """
        if self.earlier is not None:
            return self._attend_in_parts(queries, scale, mask, sinks, lse)
        out = self._attend_whole(queries, scale, mask, sinks, lse)
        for one in self.alone:
            rows = slice(one.row, one.row + 1), slice(None), slice(one.begin, one.end)
            out[rows] = one.snapshot.attend(queries[rows], scale, self._mask_alone(one, mask), sinks, lse)
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

    def _attend_whole(
        self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None, lse: bool = False
    ) -> mx.array:
        lengths = None
        if self.columns is not None:
            mask, lengths = self.columns.translate(mask, queries.shape[2])
        return self.history.attend(queries, *self.tail, scale, mask, sinks, lengths, lse=lse)

    def _attend_in_parts(
        self, queries: mx.array, scale: float, mask: mx.array | str | None, sinks: mx.array | None, lse: bool = False
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
            outs.append(part._attend_whole(queries[:, :, begin:end], scale, own, sinks, lse))
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
