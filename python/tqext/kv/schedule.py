"""When tokens are encoded, how many are kept, and the room that their buffers have."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import mlx.core as mx

from tqext._ext import format as packed_format
from tqext.presets import Recipe

BLOCK: int = packed_format.BLOCK
MAX_CODED = (1 << 31) - 1  # tokens are counted in 32 bits
# The coded buffers double up to so many tokens, then grow by as many: copying them costs 1/256 of reading them at each step.
GROWTH = 512
# A window that is left with a token of the history once something left it.
MIN_WINDOW = 2
# The exact buffer has room for one token more in so many tokens of the cache, so that a short cache is not much larger than its
# tokens, and for a block at most.
ROOM_SHARE = 12
# Copying so many bytes costs as much as waiting.
WAIT_BYTES = 1 << 20


def exact_room(n_held: int, n_tokens: int) -> int:
    """Tokens that the buffer of `n_held` exact tokens has room for, in a cache of `n_tokens`."""
    return n_held + min(BLOCK, n_tokens // ROOM_SHARE)


def coded_room(n_coded: int) -> int:
    """Tokens that the buffers of `n_coded` coded tokens have room for."""
    room = BLOCK
    while room < n_coded and room < GROWTH:
        room *= 2
    return 0 if n_coded == 0 else room if room >= n_coded else -(-n_coded // GROWTH) * GROWTH


def wait_for_readers(buffers: Sequence[mx.array]) -> None:
    """Wait for a step in flight before its buffers are written to, where that is cheaper than the copy it would cost.

    In a pipelined loop the last step's attention still holds the packed buffers, and writing to them would copy them.
    """
    if sum(x.nbytes for x in buffers) > WAIT_BYTES:
        mx.synchronize()


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


def check_window(window: int) -> int:
    """The tokens of a sliding window."""
    window = operator.index(window)
    if not MIN_WINDOW <= window <= MAX_CODED:
        raise ValueError(f"[TurboQuantWindowKVCache] window: expected at least {MIN_WINDOW} tokens, got {window}")
    return window


def first_seen(n_tokens: Any, window: int) -> Any:
    """The place of the oldest token that the next one of so many attends to; also of arrays of numbers."""
    return (n_tokens - window + 1) * (n_tokens >= window)


def check_window_reach(n: int, n_tokens: int, n_dropped: int, window: int) -> None:
    """Forgetting n of so many tokens leaves all of the window of what comes next, or nothing at all."""
    most = n_tokens - n_dropped - window + 1
    if n_dropped and most < n < n_tokens:
        raise ValueError(f"[trim] n: expected at most {most}, as older tokens have left the window, or all, got {n}")


def trim_count(n: SupportsIndex) -> int:
    """A number of tokens to forget."""
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"[trim] n: expected at least 0, got {n}")
    return n
