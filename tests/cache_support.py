"""What the tests of caches share: recipes, a cache or a batch beside its specification, and steps of both."""

import copy

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from sequence import BLOCK, Sequence, attention
from support import KERNEL_TOLERANCE, on_cuda
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache
from tqext.presets import PRESETS

H, HQ, D, DV = 2, 4, 64, 32


RECIPES = {
    "default": Recipe(),
    "plain": PRESETS["tq3-plain"].recipe,
    "tq33": PRESETS["tq33"].recipe,
    "tq4": PRESETS["tq4"].recipe,
    "no-first": Recipe(first=0, tail=8, balance=False),
    "no-tail": Recipe(tail=0, first=4),
    "orthogonal": Recipe(rotation="orthogonal", tail=20, first=5),
}


def balance_of(recipe):
    """Factors of 1/4 to 4 for the recipes that want any."""
    if not recipe.balance:
        return None
    return mx.array((2.0 ** np.random.default_rng(7).uniform(-2, 2, (H, D))).astype(np.float32))


def make(recipe, max_size=None):
    return TurboQuantKVCache(recipe, balance=balance_of(recipe), max_size=max_size)


def make_reference(recipe, max_size=None):
    return Sequence(recipe, H, D, DV, balance_of(recipe), max_size)


def tokens(n, seed):
    random = np.random.default_rng(seed)
    k = random.standard_normal((H, n, D), np.float32) + np.linspace(-2, 2, D, dtype=np.float32)
    return k, random.standard_normal((H, n, DV), np.float32), random.standard_normal((HQ, n, D), np.float32)


def check_drafts_leave_no_trace(plain, drafted, n_steps, n_draft):
    """Steps of one token, in one of the caches with a wrong draft behind it that is taken back: the states are the same."""
    for i in range(n_steps):
        k, v, _ = (mx.array(x)[None] for x in tokens(1, i))
        plain.update_and_fetch(k, v)
        wrong_k, wrong_v, _ = (mx.array(x)[None] for x in tokens(n_draft, 1000 + i))
        drafted.update_and_fetch(mx.concatenate([k, wrong_k], axis=2), mx.concatenate([v, wrong_v], axis=2))
        assert drafted.trim(n_draft) == n_draft
    plain._flush()
    drafted._flush()
    for a, b in zip(plain.state, drafted.state, strict=True):
        assert mx.array_equal(a, b)


def close(got, expected, *, dense=False):
    """`dense`: by a cache with a dense rotation. On a GPU its products round otherwise than NumPy's, and a code that lies at a
    threshold may turn over: a step of a value's group, times the token's weight."""
    got, expected = np.array(got, np.float64), np.array(expected, np.float64)
    assert got.shape == expected.shape
    # Of the largest output: both sides have the kernel's error.
    tolerance = 2e-2 if dense and on_cuda() else 2 * KERNEL_TOLERANCE[mx.float32]
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def answer(reference, k, v, q, sinks=None, window=None):
    """Append tokens; what their queries find. A few tokens after others find what they would find one by one."""
    n = k.shape[1]
    if not 1 < n <= BLOCK:
        attended, gap = reference.append(k, v), reference.gap_attended
        return attention(q, *attended, D**-0.5, sinks, window, gap)
    alone, rows = copy.deepcopy(reference), []
    for i in range(n):
        attended = alone.append(k[:, i : i + 1], v[:, i : i + 1])
        rows.append(attention(q[:, i : i + 1], *attended, D**-0.5, sinks, window, alone.gap_attended))
    reference.append(k, v)
    return np.concatenate(rows, axis=1)


def step(cache, reference, n, seed, window=None, **kwargs):
    """Append n tokens to both, and compare attention and counts."""
    k, v, q = tokens(n, seed)
    mask = cache.make_mask(n, window_size=window)
    snapshot, _ = cache.update_and_fetch(mx.array(k)[None], mx.array(v)[None])
    got = snapshot.attend(mx.array(q)[None], D**-0.5, mask, **kwargs)
    sinks = kwargs.get("sinks")
    close(got[0], answer(reference, k, v, q, None if sinks is None else np.array(sinks), window))
    assert [cache.n_first, cache.n_coded, cache.n_tail] == reference.counts
    assert cache.size() == reference.n_tokens
    assert cache.offset == reference.n_tokens + reference.n_dropped


def random_tokens(n, *, batch=1, heads=H, dim=D, value_dim=DV, dtype=mx.float32):
    return [mx.random.normal((batch, heads, n, d)).astype(dtype) for d in (dim, value_dim)]


def make_batch(left_padding, recipe, max_size=None):
    return BatchTurboQuantKVCache(left_padding, recipe, balance=balance_of(recipe), max_size=max_size)


class Batch:
    """A compressed batch, mlx-lm's own beside it, and a `Sequence` for each row."""

    def __init__(self, recipe, n_rows, seed=0, max_size=None):
        self.recipe = recipe
        self.cache = make_batch([0] * n_rows, recipe, max_size)
        self.stock = BatchKVCache([0] * n_rows)
        self.rows = [make_reference(recipe, max_size) for _ in range(n_rows)]
        self.seed = seed

    def step(self, lengths, *, mask="own", window=None):
        """Append `lengths` tokens to the rows, padded on the right, and compare the attention of each."""
        self.prepare(lengths)
        self.feed(max(lengths), [0] * len(lengths), lengths, mask=mask, window=window)
        self.finalize()

    def prepare(self, lengths):
        """Announce a prompt of so many tokens for each row, padded on the right."""
        padding = [max(lengths) - length for length in lengths]
        if any(padding):
            for cache in (self.cache, self.stock):
                cache.prepare(lengths=list(lengths), right_padding=padding)

    def finalize(self):
        for cache in (self.cache, self.stock):
            cache.finalize()
        self.check()

    def feed(self, n, skip, lengths, *, mask="own", window=None):
        """One call of the model with `n` columns: `skip` of padding, then `lengths` tokens, then padding, for each row."""
        new = [tokens(n, self.seed + 17 * i) for i in range(len(lengths))]
        self.seed += 1000
        k, v, q = (mx.array(np.stack([x[part] for x in new])) for part in range(3))
        masks = [c.make_mask(n, window_size=window) for c in (self.cache, self.stock)]
        assert mx.array_equal(*masks)
        assert mx.array_equal(self.cache.offset, self.stock.offset)
        if mask == "own":
            chosen = masks[0]
        elif mask == "stock":
            chosen = masks[1]
        else:
            chosen = mx.where(masks[1], 0.0, -float("inf"))
        snapshot, _ = self.cache.update_and_fetch(k, v)
        self.stock.update_and_fetch(k, v)
        assert snapshot.shape[2] == chosen.shape[-1]
        got = snapshot.attend(q, D**-0.5, chosen)
        assert mx.isfinite(got).all()
        for i, (begin, length) in enumerate(zip(skip, lengths, strict=True)):
            if length:
                k, v, q = (x[:, begin : begin + length] for x in new[i])
                expected = answer(self.rows[i], k, v, q, window=window)
                close(got[i, :, begin : begin + length], expected, dense=self.recipe.rotation == "orthogonal")

    def check(self):
        assert self.cache.counts.tolist() == [row.counts for row in self.rows]
        assert mx.array_equal(self.cache.offset, self.stock.offset)
        assert mx.array_equal(self.cache.left_padding, self.stock.left_padding)
        assert self.cache.size() == self.stock.size()
        assert self.cache.offset.tolist() == [r.n_tokens + r.n_dropped for r in self.rows]

    def trimmed(self, n):
        for cache in (self.cache, self.stock):
            assert cache.trim(n) == n
        for row in self.rows:
            row.trim(n)
        self.check()

    def filter(self, keep, *, check=True):
        self.cache.filter(keep)
        self.stock.filter(mx.array(keep))
        self.rows = [self.rows[i] for i in keep]
        if check:
            self.check()

    def extend(self, other):
        self.cache.extend(other.cache)
        self.stock.extend(other.stock)
        self.rows = self.rows + other.rows
        self.check()
