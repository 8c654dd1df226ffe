"""What a layer attends to in one step of a batch in which sequences share prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from tqext.kv.codec import History
from tqext.kv.columns import Columns, Ints
from tqext.kv.prefix import Prefix
from tqext.kv.snapshot import Snapshot
from tqext.kv.tokens import Exact
from tqext.ops import folded, joined, unfolded


class Groups:
    """Which sequences of a batch begin with which prefix. It never changes.

    Args:
        prefixes: Of each sequence, None for none; the same object for those that share it.
    """

    __slots__ = ("_order", "_some_alone", "members")

    def __init__(self, prefixes: Sequence[Prefix | None]) -> None:
        rows: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                rows.setdefault(id(prefix), []).append(row)
        self.members: list[tuple[Prefix, Ints]] = []
        for of_one in rows.values():
            prefix = prefixes[of_one[0]]
            assert prefix is not None
            self.members.append((prefix, np.array(of_one, np.int32)))
        self._some_alone = any(prefix is None for prefix in prefixes)
        # Where each sequence is among the members, one group behind the other; those in none get what is behind them all.
        order = np.full(len(prefixes), sum(len(x) for x in rows.values()), np.int32)
        together = [row for of_one in rows.values() for row in of_one]
        order[together] = np.arange(len(together), dtype=np.int32)
        self._order = None if (order == np.arange(len(order))).all() else mx.array(order)

    def __deepcopy__(self, memo: Any) -> Groups:
        """Itself: it never changes."""
        return self

    def attend(self, queries: mx.array, tail: Exact, scale: float, mask: mx.array | None, left_padding: Ints) -> mx.array:
        """Attention of each sequence's queries over its prefix, in fp32, with the log of the sum of weights as one column more.

        Args:
            queries: ``[B, n_q_heads, L, D]``.
            tail: Exact tokens of the sizes and types that the layer has.
            scale: Of the scores.
            mask: In mlx-lm's columns; None where every query sees the whole prefix.
            left_padding: Where in these columns each sequence begins.
        """
        nothing = Exact(*(x[:1, :, :0] for x in tail))
        outs = []
        for prefix, rows in self.members:
            every = len(rows) == queries.shape[0]
            own = queries if every else queries[mx.array(rows)]
            seen = None if mask is None else folded(_of_prefix(mask, own, rows, left_padding, prefix.n_tokens))
            out = prefix.history.attend(folded(own), *nothing, scale, seen, None, None, lse=True)
            outs.append(unfolded(out, own))
        if self._some_alone:
            empty = mx.zeros((1, *outs[0].shape[1:]), mx.float32)
            empty[..., -1] = -mx.inf
            outs.append(empty)
        whole = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=0)
        return whole if self._order is None else whole[self._order]


def _of_prefix(mask: mx.array, queries: mx.array, rows: Ints, left_padding: Ints, n_tokens: int) -> mx.array:
    """The columns of a mask that are the prefix's, ``[len(rows), n_heads, L, n_tokens]``."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    parts = []
    for row in rows.tolist():
        begin = int(left_padding[row])
        own = mask[row : row + 1] if mask.shape[0] > 1 else mask
        parts.append(own if own.shape[3] == 1 else own[..., begin : begin + n_tokens])
    whole = mx.concatenate(parts, axis=0)
    return mx.broadcast_to(whole, (len(rows), *queries.shape[1:3], n_tokens))


class PrefixedSnapshot(Snapshot):
    """As `Snapshot`, of each sequence's own tokens, behind the prefixes that they share.

    Attributes:
        groups: Who shares what.
    """

    __slots__ = ("groups",)

    def __init__(self, history: History, tail: Exact, n_tokens: int, columns: Columns, groups: Groups) -> None:
        super().__init__(history, tail, n_tokens, columns)
        self.groups = groups

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        lse: bool = False,
    ) -> mx.array:
        """As `Snapshot.attend`."""
        if lse:
            raise ValueError("[attend] lse: expected False for a batch whose sequences share prefixes, got True")
        assert self.columns is not None
        own = super().attend(queries, scale, mask, sinks, lse=True)
        given = mask if isinstance(mask, mx.array) and not self.columns.is_own(mask, queries.shape[2]) else None
        shared = self.groups.attend(queries, self.tail, scale, given, self.columns.left_padding)
        return joined(shared, own).astype(queries.dtype)
