"""Tokens that several caches of a layer begin with, of which there is one copy; and which caches those are."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tqext.kv.codec import Codec, History
from tqext.kv.schedule import BLOCK
from tqext.kv.tokens import Exact

# Coded tokens from which on a prefix has its own place: attention in two parts costs more launches, whatever their number.
MIN_SHARED = 512
# Buffers of which less than this share is wanted are copied instead of being kept for it.
MIN_SHARE = 0.75

Ids = npt.NDArray[np.int64]
NO_IDS: Ids = np.zeros(0, np.int64)
_numbers = itertools.count(1)


def new_ids(n_tokens: int) -> Ids:
    """Names for the blocks of so many tokens that were encoded now. Copies of a cache keep the names of its blocks."""
    return np.fromiter(itertools.islice(_numbers, n_tokens // BLOCK), np.int64, n_tokens // BLOCK)


class Root(NamedTuple):
    """The buffers that prefixes of several lengths are parts of."""

    number: int
    n_coded: int
    nbytes: int


class Prefix:
    """The first and the coded tokens that caches begin with. It never changes.

    Attributes:
        first: The exact first tokens, None if there are none.
        ids: Names of its blocks.
        root: The buffers.
    """

    __slots__ = ("__weakref__", "_codec", "_history", "_parts", "_shorter", "first", "ids", "root")

    def __init__(self, codec: Codec, parts: Sequence[mx.array], first: Exact | None, ids: Ids, root: Root | None = None):
        self._codec = codec
        self._parts = list(parts)
        self._history: History | None = None
        self._shorter: weakref.WeakValueDictionary[int, Prefix] = weakref.WeakValueDictionary()
        self.first = first
        self.ids = ids
        nbytes = sum(x.nbytes for x in self._parts) + (0 if first is None else first.nbytes)
        self.root = root or Root(next(_numbers), self.n_coded, nbytes)

    def __deepcopy__(self, memo: Any) -> Prefix:
        """Itself: it never changes."""
        return self

    @property
    def n_first(self) -> int:
        return 0 if self.first is None else self.first.n_tokens

    @property
    def n_coded(self) -> int:
        return len(self.ids) * BLOCK

    @property
    def n_tokens(self) -> int:
        return self.n_first + self.n_coded

    @property
    def history(self) -> History:
        """The tokens as attention takes them."""
        if self._history is None:
            self._history = self._codec.history(self.parts(0, self.n_coded), self.first)
        return self._history

    @property
    def arrays(self) -> list[mx.array]:
        return [*self._parts, *(self.first or ())]

    @property
    def used_nbytes(self) -> int:
        """Bytes of its tokens; those of the buffers are in `root`."""
        return sum(x.nbytes for x in (*self.parts(0, self.n_coded), *(self.first or ())))

    def parts(self, begin: int, end: int) -> list[mx.array]:
        """The packed arrays of the coded tokens `begin` to `end`, whole blocks, in the same memory."""
        return self._codec.cut(self._parts, begin, end)

    def shortened(self, n_coded: int) -> Prefix:
        """The first tokens and the first `n_coded` coded ones: in the same memory, unless much of it would be for nothing.

        The same object as long as somebody has it: there is one copy at most.
        """
        if n_coded == self.n_coded:
            return self
        found = self._shorter.get(n_coded)
        if found is None:
            if is_wasteful(n_coded, self.root.n_coded):
                parts, root = self._codec.resized(self.parts(0, n_coded), n_coded), None
            else:
                parts, root = self._parts, self.root
            found = Prefix(self._codec, parts, self.first, self.ids[: n_coded // BLOCK], root)
            self._shorter[n_coded] = found
        return found


def is_worth_sharing(n_coded: int) -> bool:
    """Whether so many coded tokens get their own place when caches begin with them."""
    return n_coded >= MIN_SHARED


def is_wasteful(n_coded: int, n_held: int) -> bool:
    """Whether buffers of `n_held` coded tokens are too large to be kept for so many of them."""
    return n_coded < MIN_SHARE * n_held


def distinct_roots(prefixes: Sequence[Prefix | None]) -> dict[int, int]:
    """The numbers of the buffers of prefixes, and their bytes."""
    return {p.root.number: p.root.nbytes for p in prefixes if p is not None}


def sharing(ids: Sequence[Ids]) -> list[tuple[list[int], int]]:
    """Which of these sequences should share a prefix so that the fewest tokens are held.

    Args:
        ids: The names of each sequence's blocks.

    Returns:
        Sequences that share one, at least two, and how many coded tokens it has, at least `MIN_SHARED`; each sequence once.
    """
    least = MIN_SHARED // BLOCK
    clusters: dict[int, list[int]] = {}
    for row, own in enumerate(ids):
        if len(own) >= least:
            clusters.setdefault(int(own[least - 1]), []).append(row)
    found = []
    for rows in clusters.values():
        if len(rows) > 1:
            rows.sort(key=lambda row: ids[row].tobytes())  # what begins alike is together then
            common = tuple(_n_common(ids[a], ids[b]) for a, b in itertools.pairwise(rows))
            found += [(rows[begin:end], n * BLOCK) for begin, end, n in _partition(common, least)]
    return found


def _n_common(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@functools.lru_cache(maxsize=256)  # the layers of a model ask the same
def _partition(common: tuple[int, ...], least: int) -> list[tuple[int, int, int]]:
    """Runs ``(begin, end, blocks in common)`` of a sorted list, with the most blocks that need not be held again.

    common: Blocks that each member has in common with the next one.
    """
    n = len(common) + 1
    best: list[tuple[int, list[tuple[int, int, int]]]] = [(0, [])]
    for end in range(1, n + 1):
        choice = best[end - 1]
        shared = 1 << 62
        for begin in range(end - 2, -1, -1):
            shared = min(shared, common[begin])
            if shared < least:
                break
            saved = best[begin][0] + (end - begin - 1) * shared
            if saved > choice[0]:
                choice = (saved, [*best[begin][1], (begin, end, shared)])
        best.append(choice)
    return best[n][1]
