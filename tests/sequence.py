"""One sequence of a compressed cache, told again from the specification: what is exact or coded, and attention over it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from tqext._ext import quantize_blocks

import tqext
from tqext import Recipe

BLOCK = 64  # tokens of a block; as many new ones find what they would find one by one


class Sequence:
    """Keys and values ``[n_kv_heads, n_tokens, D]`` of one sequence, and which of them are codes."""

    def __init__(
        self,
        recipe: Recipe,
        n_kv_heads: int,
        head_dim: int,
        value_dim: int,
        balance: mx.array | None = None,
        max_size: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.max_size = max_size
        self.balance = balance
        self.k = np.zeros((n_kv_heads, 0, head_dim), np.float32)
        self.v = np.zeros((n_kv_heads, 0, value_dim), np.float32)
        self.coded_k, self.coded_v = self.k.copy(), self.v.copy()  # same tokens, as the codes have them
        self.n_first = self.n_coded = self.n_dropped = 0
        self.gap_attended = (0, 0)  # in what the last tokens attended to

    @property
    def n_tokens(self) -> int:
        return self.k.shape[1]

    @property
    def n_tail(self) -> int:
        return self.n_tokens - self.n_first - self.n_coded

    @property
    def gap(self) -> tuple[int, int]:
        """Where tokens were dropped, and how many."""
        return self.n_first, self.n_dropped

    @property
    def counts(self) -> list[int]:
        return [self.n_first, self.n_coded, self.n_tail]

    def append(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add tokens; returns the keys and values that they attend to, if they are one token or a prompt."""
        self.flush()
        self.k, self.coded_k = (np.concatenate([x, k], axis=1) for x in (self.k, self.coded_k))
        self.v, self.coded_v = (np.concatenate([x, v], axis=1) for x in (self.v, self.coded_v))
        if self.n_coded == self.n_dropped == 0:
            self.n_first = min(self.recipe.first, self.n_tokens)
        attended, self.gap_attended = self.attended(), self.gap
        if k.shape[1] > BLOCK:
            self.flush()
        return attended

    def flush(self) -> None:
        while self.n_tail >= self.recipe.tail + BLOCK:
            self.encode()
        if self.max_size is not None:
            # Room for the first tokens and for the most recent ones, `tail` and a block; codes in the rest.
            while self.n_coded > (self.max_size - self.recipe.first - self.recipe.tail - BLOCK) // BLOCK * BLOCK:
                self.drop()

    def drop(self) -> None:
        """The oldest block is gone."""
        kept = np.r_[: self.n_first, self.n_first + BLOCK : self.n_tokens]
        for name in ("k", "v", "coded_k", "coded_v"):
            setattr(self, name, getattr(self, name)[:, kept])
        self.n_coded -= BLOCK
        self.n_dropped += BLOCK

    def encode(self) -> None:
        """The oldest recent tokens become a block."""
        r, begin = self.recipe, self.n_first + self.n_coded
        block = slice(begin, begin + BLOCK)
        k, v = mx.array(self.k[None, :, block]), mx.array(self.v[None, :, block])
        # As the cache finds them: on a GPU the sum has another order than block_means, and a mean may round the other way.
        means = quantize_blocks(k, r.key_bits, self.balance, False, r.rotation, None)[-1] if r.means else None
        keys = tqext.quantize_keys(k, bits=r.key_bits, means=means, balance=self.balance, rotation=r.rotation)
        values = tqext.quantize_values(v, bits=r.value_bits, coding=r.value_coding, rotation=r.rotation)
        self.coded_k[:, block] = np.array(tqext.dequantize(keys))[0]
        self.coded_v[:, block] = np.array(tqext.dequantize(values))[0]
        self.n_coded += BLOCK

    def attended(self) -> tuple[np.ndarray, np.ndarray]:
        coded = np.zeros(self.n_tokens, bool)
        coded[self.n_first : self.n_first + self.n_coded] = True
        pick = coded[None, :, None]
        return np.where(pick, self.coded_k, self.k), np.where(pick, self.coded_v, self.v)

    def trim(self, n: int) -> None:
        """What is left of a block that is cut is exact from then on, as the codes had it."""
        left = self.n_tokens - min(n, self.n_tokens)
        if n == self.n_tokens + self.n_dropped:
            left = self.n_dropped = 0
        n_first = min(self.n_first, left)
        n_coded = min(self.n_coded, (left - n_first) // BLOCK * BLOCK)
        again = slice(n_first + n_coded, min(left, self.n_first + self.n_coded))
        for name in ("k", "v"):
            exact, coded = getattr(self, name), getattr(self, f"coded_{name}")
            exact[:, again] = coded[:, again]
            setattr(self, name, exact[:, :left].copy())
            setattr(self, f"coded_{name}", coded[:, :left].copy())
        self.n_first, self.n_coded = n_first, n_coded


class WindowSequence(Sequence):
    """A sequence of which each token sees the last `window`. All tokens are kept here; `n_dropped` says what a cache keeps."""

    def __init__(self, recipe: Recipe, n_kv_heads: int, head_dim: int, value_dim: int, balance: mx.array | None, window: int):
        super().__init__(recipe, n_kv_heads, head_dim, value_dim, balance)
        self.window = window

    @property
    def n_tail(self) -> int:
        return self.n_tokens - self.n_dropped - self.n_first - self.n_coded

    def flush(self) -> None:
        if self.n_tail < self.recipe.tail + BLOCK:
            return
        while self.n_tail >= self.recipe.tail + BLOCK:
            self.encode()
        seen_next = self.n_tokens - self.window + 1  # the oldest token that the next one sees
        if 0 < self.n_first <= seen_next:
            self.n_dropped, self.n_first = self.n_first, 0
        while not self.n_first and self.n_coded and self.n_dropped + BLOCK <= seen_next:
            self.n_dropped += BLOCK
            self.n_coded -= BLOCK

    def encode(self) -> None:
        self.n_first += self.n_dropped
        super().encode()
        self.n_first -= self.n_dropped

    def attended(self) -> tuple[np.ndarray, np.ndarray]:
        coded = np.zeros(self.n_tokens, bool)
        begin = self.n_dropped + self.n_first
        coded[begin : begin + self.n_coded] = True
        # What has left is nothing that may be seen.
        gone = np.arange(self.n_tokens)[None, :, None] < self.n_dropped
        return tuple(
            np.where(gone, 1e6, np.where(coded[None, :, None], x, y))
            for x, y in ((self.coded_k, self.k), (self.coded_v, self.v))
        )

    def trim(self, n: int) -> None:
        left = self.n_tokens - n
        if left == 0:
            self.n_dropped = 0
        n_first = min(self.n_first, left)
        n_coded = min(self.n_coded, (left - self.n_dropped - n_first) // BLOCK * BLOCK)
        begin = self.n_dropped + n_first + n_coded
        again = slice(begin, min(left, self.n_dropped + self.n_first + self.n_coded))
        for name in ("k", "v"):
            exact, coded = getattr(self, name), getattr(self, f"coded_{name}")
            exact[:, again] = coded[:, again]
            setattr(self, name, exact[:, :left].copy())
            setattr(self, f"coded_{name}", coded[:, :left].copy())
        self.n_first, self.n_coded = n_first, n_coded


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    sinks: np.ndarray | None = None,
    window: int | None = None,
    gap: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Causal attention of the last tokens: q ``[n_q_heads, L, D]``, k and v ``[n_kv_heads, S, ...]``; float64.

    `gap`: that many tokens are missing after so many first ones; a window counts them.
    """
    n_repeats = q.shape[0] // k.shape[0]
    k, v = (np.repeat(x.astype(np.float64), n_repeats, axis=0) for x in (k, v))
    scores = scale * q.astype(np.float64) @ k.swapaxes(1, 2)
    n_queries, n_keys = scores.shape[1:]
    rows, columns = np.arange(n_keys - n_queries, n_keys)[:, None], np.arange(n_keys)[None]
    seen = columns <= rows
    if window is not None:
        seen = seen & (rows < np.where(columns < gap[0], columns - gap[1], columns) + window)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=2, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    return weights / total @ v
