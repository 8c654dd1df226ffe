"""Batches under random operations: sizes, offsets and masks are mlx-lm's, and every sequence answers what it would alone."""

import os

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from mlx_lm.models.cache import BatchKVCache

from cache_support import RECIPES, Batch
from tqext import BatchTurboQuantKVCache

# TQEXT_FUZZ=100000 tries as many other histories; without it the same are tried every time.
EXAMPLES = int(os.environ.get("TQEXT_FUZZ", 0))
MOST_ROWS = 5
masks = st.sampled_from(["own", "stock", "additive"])
lengths = st.sampled_from([1, 2, 9, 31, 63, 64, 65, 90, 170, 280])


def filter_announced(stock, rows):
    """What BatchKVCache.filter leaves out: the padding that `finalize` will move."""
    if stock._right_padding is not None:
        stock._right_padding = stock._right_padding[mx.array(rows)]


class Histories(RuleBasedStateMachine):
    """A `Batch` compares itself with mlx-lm's and with each of its sequences alone, at every step."""

    @initialize(recipe=st.sampled_from(list(RECIPES.values())), n_rows=st.integers(1, 3), seed=st.integers(0, 99))
    def begin(self, recipe, n_rows, seed):
        self.recipe = recipe
        self.batch = Batch(recipe, n_rows, seed=1000 * seed)

    @property
    def n_rows(self):
        return len(self.batch.rows)

    @rule(n=st.integers(1, 9), mask=masks)
    def decode(self, n, mask):
        for _ in range(n):
            self.batch.step((1,) * self.n_rows, mask=mask)

    @rule(data=st.data(), mask=masks)
    def prompt(self, data, mask):
        self.batch.step([data.draw(lengths) for _ in range(self.n_rows)], mask=mask)

    @rule(data=st.data(), chunk=st.integers(3, 130))
    def prompt_in_chunks(self, data, chunk):
        """As mlx-lm feeds long prompts; a request may be cancelled between the chunks."""
        left = [data.draw(lengths) for _ in range(self.n_rows)]
        self.batch.prepare(left)
        for columns in [chunk] * (max(left) // chunk) + [max(left) % chunk]:
            real = [min(n, columns) for n in left]
            if columns:
                self.batch.feed(columns, [0] * len(left), real)
            left = [n - r for n, r in zip(left, real, strict=True)]
            if self.n_rows > 1 and data.draw(st.booleans()):
                rows = self.draw_rows(data)
                filter_announced(self.batch.stock, rows)
                self.batch.filter(rows, check=False)
                left = [left[i] for i in rows]
        self.batch.finalize()

    def draw_rows(self, data):
        rows = data.draw(st.sets(st.integers(0, self.n_rows - 1), min_size=1))
        return data.draw(st.permutations(sorted(rows)))

    @rule(data=st.data())
    def filter(self, data):
        self.batch.filter(self.draw_rows(data))

    @precondition(lambda self: self.n_rows < MOST_ROWS)
    @rule(data=st.data())
    def extend(self, data):
        """By a batch without tokens, with a prompt, or with one padded on the left."""
        other = Batch(self.recipe, data.draw(st.integers(1, MOST_ROWS - self.n_rows)), seed=data.draw(st.integers(100, 199)))
        kind = data.draw(st.sampled_from(["empty", "right", "left"]))
        n_tokens = [data.draw(lengths) for _ in other.rows]
        if kind == "right":
            other.step(n_tokens)
        elif kind == "left":
            padding = [max(n_tokens) - n for n in n_tokens]
            for cache in (other.cache, other.stock):
                cache.prepare(left_padding=padding)
            middle = data.draw(st.integers(0, max(n_tokens)))
            for begin, end in ((0, middle), (middle, max(n_tokens))):
                skip = [min(max(p - begin, 0), end - begin) for p in padding]
                if end > begin:
                    other.feed(end - begin, skip, [end - begin - s for s in skip])
            other.check()
        self.batch.extend(other)

    @precondition(lambda self: min(row.n_tokens for row in self.batch.rows) > 0)
    @rule(data=st.data())
    def trim(self, data):
        n = data.draw(st.integers(0, min(row.n_tokens for row in self.batch.rows)))
        assert self.batch.cache.trim(n) == self.batch.stock.trim(n) == n
        for row in self.batch.rows:
            row.trim(n)
        self.batch.check()

    @rule(data=st.data())
    def take_apart_and_merge(self, data):
        order = data.draw(st.permutations(range(self.n_rows)))
        caches = [self.batch.cache.extract(i) for i in order]
        self.batch.rows = [self.batch.rows[i] for i in order]
        for cache, row in zip(caches, self.batch.rows, strict=True):
            assert [cache.n_first, cache.n_coded, cache.n_tail] == row.counts
        if self.batch.stock.empty():
            return
        before = [[np.array(x) for x in cache.state] for cache in caches]
        stock = [self.batch.stock.extract(i) for i in order]
        self.batch.cache = BatchTurboQuantKVCache.merge(caches)
        self.batch.stock = BatchKVCache.merge(stock)
        self.batch.check()
        for i, arrays in enumerate(before):
            for a, b in zip(self.batch.cache.extract(i).state, arrays, strict=True):
                assert np.array_equal(np.array(a), b)


Histories.TestCase.settings = settings(
    max_examples=EXAMPLES or 25,
    stateful_step_count=10,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_batch_histories = Histories.TestCase
