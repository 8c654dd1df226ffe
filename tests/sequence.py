"""One sequence of a compressed cache, told again from the specification: what is exact or coded, and attention over it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import tqext
from tqext import Recipe

STEP = 8  # at most so many tokens are a decode step
MEAN_LEAST, MEAN_MOST = 64, 256


class Sequence:
    """Keys and values ``[n_kv_heads, n_tokens, D]`` of one sequence, and which of them are codes."""

    def __init__(self, recipe: Recipe, n_kv_heads: int, head_dim: int, value_dim: int) -> None:
        self.recipe = recipe
        self.k = np.zeros((n_kv_heads, 0, head_dim), np.float32)
        self.v = np.zeros((n_kv_heads, 0, value_dim), np.float32)
        self.coded_k, self.coded_v = self.k.copy(), self.v.copy()  # same tokens, as the codes have them
        self.n_first = self.n_coded = 0
        self.mean: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        return self.k.shape[1]

    @property
    def n_tail(self) -> int:
        return self.n_tokens - self.n_first - self.n_coded

    def append(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add tokens; returns the keys and values that they attend to."""
        self.flush()
        self.k, self.coded_k = (np.concatenate([x, k], axis=1) for x in (self.k, self.coded_k))
        self.v, self.coded_v = (np.concatenate([x, v], axis=1) for x in (self.v, self.coded_v))
        attended = self.attended()
        if self.n_coded == 0:
            self.n_first = min(self.recipe.sinks, self.n_tokens)
        if k.shape[1] > STEP:
            self.flush()
        return attended

    def flush(self) -> None:
        r = self.recipe
        least = r.tail + r.flush
        if r.mean and self.mean is None:
            least = max(least, MEAN_LEAST)
        if self.n_tail < least:
            return
        begin = self.n_first + self.n_coded
        if r.mean and self.mean is None:
            n = min(self.n_tail // MEAN_LEAST * MEAN_LEAST, MEAN_MOST)
            self.mean = self.k[:, begin : begin + n].mean(axis=1)
        n = (self.n_tail - r.tail) // r.flush * r.flush
        mean = None if self.mean is None else mx.array(self.mean)[None]
        keys = tqext.quantize_keys(
            mx.array(self.k[None, :, begin : begin + n]), bits=r.key_bits, mean=mean, rotation=r.rotation
        )
        values = tqext.quantize_values(mx.array(self.v[None, :, begin : begin + n]), bits=r.value_bits, rotation=r.rotation)
        self.coded_k[:, begin : begin + n] = np.array(tqext.dequantize(keys))[0]
        self.coded_v[:, begin : begin + n] = np.array(tqext.dequantize(values))[0]
        self.n_coded += n

    def attended(self) -> tuple[np.ndarray, np.ndarray]:
        coded = np.zeros(self.n_tokens, bool)
        coded[self.n_first : self.n_first + self.n_coded] = True
        pick = coded[None, :, None]
        return np.where(pick, self.coded_k, self.k), np.where(pick, self.coded_v, self.v)

    def trim(self, n: int) -> None:
        n = min(n, self.n_tokens)
        left = self.n_tokens - n
        was_coded = self.n_coded
        self.n_first = min(self.n_first, left)
        self.n_coded = min(self.n_coded, left - self.n_first)
        if was_coded and not self.n_coded:
            self.mean = None
        for name in ("k", "v"):
            exact, coded = getattr(self, name), getattr(self, f"coded_{name}")
            kept = np.arange(left)
            # A token that is no longer in the coded range is gone, so what is left there is unchanged.
            setattr(self, name, exact[:, kept])
            setattr(self, f"coded_{name}", coded[:, kept])


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, sinks: np.ndarray | None = None, window: int | None = None
) -> np.ndarray:
    """Causal attention of the last tokens: q ``[n_q_heads, L, D]``, k and v ``[n_kv_heads, S, ...]``; float64."""
    n_repeats = q.shape[0] // k.shape[0]
    k, v = (np.repeat(x.astype(np.float64), n_repeats, axis=0) for x in (k, v))
    scores = scale * q.astype(np.float64) @ k.swapaxes(1, 2)
    n_queries, n_keys = scores.shape[1:]
    rows, columns = np.arange(n_keys - n_queries, n_keys)[:, None], np.arange(n_keys)[None]
    seen = columns <= rows if window is None else (columns <= rows) & (rows < columns + window)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=2, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    return weights / total @ v
