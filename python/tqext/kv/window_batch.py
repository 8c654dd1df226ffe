"""The cache of a batch for a layer with a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np

from tqext.kv.batch import BatchTurboQuantKVCache, Due, LastDue, LastStep
from tqext.kv.codec import History
from tqext.kv.columns import CODED, FIRST, Columns, Ints, StreamColumns
from tqext.kv.schedule import BLOCK, check_window, check_window_reach, first_seen
from tqext.kv.snapshot import Snapshot
from tqext.kv.tokens import Exact
from tqext.kv.window import TurboQuantWindowKVCache
from tqext.kv.window_snapshot import WindowSnapshot
from tqext.presets import Recipe


class BatchTurboQuantWindowKVCache(BatchTurboQuantKVCache):
    """The cache of one layer with a sliding window for a batch: instead of mlx-lm's ``BatchRotatingKVCache``.

    Every sequence holds what it would hold alone. `offset` and `left_padding` are those of a left-padded batch that keeps all
    columns.

    Args:
        left_padding: See `BatchTurboQuantKVCache`.
        window: See `TurboQuantWindowKVCache`. So are the others.
    """

    _last_step: ClassVar[LastStep] = LastStep()
    _last_due: ClassVar[LastDue] = LastDue()
    can_share = False

    def __init__(
        self,
        left_padding: Sequence[int],
        window: int,
        recipe: Recipe | None = None,
        *,
        balance: mx.array | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__(left_padding, recipe, balance=balance, shared=shared)
        self._window = check_window(window)

    @property
    def window(self) -> int:
        """See `TurboQuantWindowKVCache`."""
        assert self._window is not None
        return self._window

    def _n_over(self, n_due: Ints, n_held: Ints) -> Ints:
        n_first, n_coded = self._counts[:, FIRST], self._counts[:, CODED]
        begin = self._dropped + n_first + self._n_leading(n_held)
        n_out = first_seen(self._dropped + n_first + n_coded + n_held, self.window) - begin
        return np.clip(n_out // BLOCK * BLOCK, 0, n_coded + n_due).astype(np.int32)

    def _encode_oldest(self, source: Exact, columns: StreamColumns, due: Due) -> None:
        super()._encode_oldest(source, columns, due)
        n_first = self._counts[due.rows, FIRST]
        n_tokens = self._counts[due.rows].sum(axis=1) + self._dropped[due.rows]
        rows = due.rows[(n_first > 0) & (n_first <= first_seen(n_tokens, self.window))]
        if len(rows):
            dropped = self._dropped.copy()
            dropped[rows] += self._counts[rows, FIRST]
            self._counts[rows, FIRST] = 0
            self._dropped, self._now = dropped, None
            if not self._counts[:, FIRST].any():
                self._first = None

    def _new_snapshot(self, history: History, tail: Exact, n_tokens: int, columns: Columns) -> Snapshot:
        return WindowSnapshot(history, tail, n_tokens, self.window, columns)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:  # type: ignore[override]
        """As `TurboQuantWindowKVCache.make_mask`, without arrays.

        Raises:
            ValueError: An array is asked for, or another window than the cache's.
        """
        if return_array or (window_size or self.window) != self.window:
            raise ValueError(
                f"[make_mask] window_size: expected the cache's {self.window} and no array in a batch, got {window_size}; "
                "windows=False leaves these layers to mlx-lm's cache"
            )
        return None if N == 1 else "causal"

    def is_trimmable(self) -> bool:
        """See `TurboQuantWindowKVCache.is_trimmable`."""
        return not self._dropped.any()

    def _check_reach(self, row: int, n: int) -> None:
        n_dropped = int(self._dropped[row])
        check_window_reach(n, int(self._counts[row].sum()) + n_dropped, n_dropped, self.window)

    def _new_single(self) -> TurboQuantWindowKVCache:
        return TurboQuantWindowKVCache(self.window, self.recipe, balance=self._balance, shared=self.shared)


TurboQuantWindowKVCache.batch_class = BatchTurboQuantWindowKVCache
