"""The cache of a layer with a sliding window: codes, then the recent tokens exact, and whole blocks leave at the other end."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from tqext.kv import state as saved
from tqext.kv.buffers import Buffers
from tqext.kv.cache import TurboQuantKVCache
from tqext.kv.codec import History
from tqext.kv.schedule import BLOCK, MIN_WINDOW, check_window, check_window_reach, first_seen
from tqext.kv.snapshot import Snapshot
from tqext.kv.tokens import Exact
from tqext.kv.window_snapshot import WindowSnapshot
from tqext.presets import Recipe


class TurboQuantWindowKVCache(TurboQuantKVCache):
    """The cache of one layer whose tokens attend to the last `window` tokens, themselves included.

    Takes the place of mlx-lm's ``RotatingKVCache(max_size=window)``. Whole blocks leave, when all of their tokens have left the
    window of the next token. So up to 127 tokens more than a window are held, and attention passes them by. The exact first
    tokens leave before the first block.

    Args:
        window: Tokens, at least 2.
        recipe: See `TurboQuantKVCache`. With a `tail` of at least `window` - 1 all tokens stay exact.
        balance: See `TurboQuantKVCache`.
        shared: See `TurboQuantKVCache`.

    Attributes:
        n_dropped: Tokens that have left.
    """

    can_share = False

    def __init__(
        self, window: int, recipe: Recipe | None = None, *, balance: mx.array | None = None, shared: bool = False
    ) -> None:
        super().__init__(recipe, balance=balance, shared=shared)
        self._window = check_window(window)

    @property
    def window(self) -> int:
        """Tokens that a token attends to, itself included."""
        assert self._window is not None
        return self._window

    # Writing

    def _n_over(self, n: int) -> int:
        n_out = first_seen(self.offset, self.window) - self.n_dropped - self.n_first
        return min(max(0, n_out // BLOCK * BLOCK), self.n_coded + n)

    def _n_over_within(self) -> int:
        return 0  # tokens of the step that come before the block still see the oldest

    def _flush(self, *, is_read: bool = False) -> None:
        is_due = self._n_due > 0
        super()._flush(is_read=is_read)
        if is_due and self._first_leaves:
            counts = {"n_dropped": self.n_dropped + self.n_first, "n_first": 0}
            vars(self).update(counts, _first=None, _now=None)

    @property
    def _first_leaves(self) -> bool:
        """Whether the next token sees none of the first ones. They are a block like others, and come before them."""
        return 0 < self.n_first <= first_seen(self.offset, self.window)

    # Reading

    def _new_snapshot(self, history: History, tail: Exact, n_tokens: int, gap: tuple[int, int]) -> Snapshot:
        return WindowSnapshot(history, tail, n_tokens, self.window)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens: None or ``"causal"``, as the snapshot knows the window.

        A bool array ``[N, columns of the snapshot]`` if asked for, or for another window than the cache's.
        """
        window = window_size or self.window
        if N == 1 and window >= self.window:
            return None
        if window == self.window and not return_array:
            return "causal"
        n_held = self.size()
        if self._n_due:
            n_held -= self._n_over(self._n_due) + (self.n_first if self._first_leaves else 0)
        columns, rows = mx.arange(n_held + N)[None], mx.arange(n_held, n_held + N)[:, None]
        # Of a wider window no more than mlx-lm's cache holds.
        return (columns <= rows) & (columns > rows - window) & (columns > n_held - self.window)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be forgotten: as long as none has left, as in mlx-lm's own cache.

        `trim` may still forget as many as came in the last step.
        """
        return self.n_dropped == 0

    def _check_reach(self, n: int) -> None:
        check_window_reach(n, self.offset, self.n_dropped, self.window)

    def can_trim(self, n: int) -> bool:
        """Whether the last n tokens can be forgotten: all that the next token then sees is still held."""
        try:
            self._check_reach(min(n, self.offset))
        except ValueError:
            return False
        return True

    # State

    def _take_bounds(self, header: saved.Header) -> None:
        saved.check(header.window is not None, "a cache of a sliding window", "one of all tokens")
        self._window = header.window

    @classmethod
    def from_state(cls, state: Sequence[mx.array], meta_state: object = None) -> TurboQuantWindowKVCache:
        cache = cls(MIN_WINDOW)
        cache.state = state
        return cache

    def _new_batch(self, left_padding: Sequence[int]) -> Buffers:
        return self.batch_class(left_padding, self.window, self.recipe, balance=self._balance, shared=self.shared)
